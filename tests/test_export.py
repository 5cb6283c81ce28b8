"""Export to torch.export, ONNX and int8; the commands evaluate.py and export.py as a user types them."""

import builtins
import copy
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import onnx
import pytest
import torch
from conftest import ROOT, command, compose_config, randomise_norms, tiny_config
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import nn

from repmlp import RepMLPNet, build_model, deploy, load_model, save_model
from repmlp.checkpoints import open_checkpoint, to_official
from repmlp.compare import compare, random_batches
from repmlp.cost import count_macs
from repmlp.data import build_data
from repmlp.export import (
    count_quantised,
    image_size,
    onnx_session,
    quantize_int8,
    run_onnx,
    to_exported_program,
    to_onnx,
)
from repmlp.models.mixers import build_resmlp
from repmlp.runs.key import run_key
from repmlp.runs.run import execute

BATCHES = (1, 3, 7)
PATTERNS = ("data=patterns", "data.n_train=200", "data.n_test=100", "device=cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The weights of a tiny net, trained for two epochs."""
    config = tiny_config(tmp_path_factory.mktemp("row"), "model.blocks=[1,1]")
    assert execute(config).state == "finished"
    return Path(config["output_dir"]) / config["study"] / run_key(config) / "model.safetensors"


@pytest.fixture(scope="module")
def net(trained) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        return randomise_norms(load_model(trained)[0])


@pytest.fixture(scope="module")
def program(net):
    return to_exported_program(net, 32)


@pytest.fixture(scope="module")
def written(program, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    to_onnx(program, path)
    return path


@pytest.fixture(scope="module")
def exported(trained) -> tuple[Path, str]:
    """Where export.py writes by default, and what it prints."""
    done = command("experiments/export.py", f"checkpoint={trained}", "rounds=2", "threads=1", "opset=20")
    assert done.returncode == 0, done.stderr
    return trained.parent / "export", done.stdout


def assert_same(net: nn.Module, other) -> None:
    for n in BATCHES:
        images = torch.randn(n, 3, 32, 32)
        with torch.no_grad():
            expected, found = net(images), other(images)
        assert found.shape == expected.shape
        assert (found - expected).norm() < 3e-6 * expected.norm(), n


def test_exported_program_equals_the_net(net, program, tmp_path):
    torch.export.save(program, tmp_path / "model.pt2")
    assert_same(net, torch.export.load(tmp_path / "model.pt2").module())
    assert not any("local_perceptron" in name or "channel_perceptron.norm" in name for name in program.state_dict)


def test_onnx_equals_the_net(net, written):
    session = onnx_session(written, threads=1)
    assert [i.name for i in session.get_inputs()] == ["images"]
    assert [o.name for o in session.get_outputs()] == ["logits"]
    assert_same(net, lambda images: run_onnx(session, images))


def test_onnx_is_one_file_of_the_merged_net(net, written):
    assert [path.name for path in written.parent.iterdir()] == ["model.onnx"]
    graph = onnx.load(written).graph
    operators = [node.op_type for node in graph.node]
    # stem and one down-sampling; a MatMul for both set-sharing FCs
    assert operators.count("Conv") == 2 and operators.count("MatMul") == 2
    # two before the parts of both units, and the last one: none after an FC or beside it
    assert operators.count("BatchNormalization") == 5
    assert [end[0].type.tensor_type.shape.dim[0].dim_param for end in (graph.input, graph.output)] == ["batch"] * 2


def test_the_net_itself_is_left_as_it_was(net, program):
    assert any("local_perceptron" in name for name in net.state_dict()) and not net.training


def test_larger_images_go_through_in_partitions(net, tmp_path):
    program = to_exported_program(net, (48, 64))
    assert compare(net, program.module(), random_batches((3, 48, 64))).relative < 3e-6


def test_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        to_exported_program(RepMLPNet(channels=(4, 8), blocks=(1, 1), share_sets=(1, 2)), 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_of_half_precision_are_counted_and_exported(net, dtype):
    half = copy.deepcopy(net).to(dtype)
    assert count_macs(half, 32) == count_macs(net, 32) and count_macs(deploy(half), 32) > 0
    for form in (half, deploy(half)):
        x = torch.randn(3, 3, 32, 32, dtype=dtype)
        found = to_exported_program(form, 32).module()(x)
        assert found.dtype == dtype
        with torch.no_grad():
            assert (found - form(x)).float().norm() < 0.05 * form(x).float().norm()


def test_the_opset_is_chosen_or_refused(net, program, tmp_path):
    to_onnx(program, tmp_path / "model.onnx", opset=20)
    assert {o.domain: o.version for o in onnx.load(tmp_path / "model.onnx").opset_import}[""] == 20
    session = onnx_session(tmp_path / "model.onnx")
    assert_same(net, lambda images: run_onnx(session, images))
    for opset in (13, 999, True, "18"):
        with pytest.raises(ValueError, match=f"opset={opset!r}: "):
            to_onnx(program, tmp_path / "none.onnx", opset=opset)
    assert not (tmp_path / "none.onnx").exists()


def test_a_file_that_cannot_hold_the_weights_is_refused(program, tmp_path, monkeypatch):
    monkeypatch.setattr("repmlp.export.ONNX_LIMIT", 1000)
    with pytest.raises(ValueError, match="one ONNX file holds less"):
        to_onnx(program, tmp_path / "model.onnx")


def test_int8_quantises_every_product(net, written, tmp_path):
    images = [torch.randn(20, 3, 32, 32) for _ in range(3)]
    path = tmp_path / "int8.onnx"
    counts = quantize_int8(written, path, images)
    # four Gemms a unit (Global Perceptron and FFN) and the classifier; the set-sharing FCs have one scale
    assert counts.per_channel == {"Conv": 2, "Gemm": 9} and counts.per_tensor == {"MatMul": 2} and not counts.left
    assert "2 MatMul in int8 with one scale" in str(counts)
    assert count_quantised(written).left == {"Conv": 2, "Gemm": 9, "MatMul": 2}
    graph = onnx.load(path).graph
    weights = {t.name: t for t in graph.initializer}
    stacks = [t for t in weights.values() if len(t.dims) == 3 and t.dims[1] == t.dims[2]]
    assert len(stacks) == 2 and all(t.data_type == onnx.TensorProto.INT8 for t in stacks)
    with torch.no_grad():
        expected, found = net(images[0]), run_onnx(onnx_session(path), images[0])
    assert (found - expected).norm() < 0.15 * expected.norm()
    assert torch.corrcoef(torch.stack([expected.flatten(), found.flatten()]))[0, 1] > 0.99
    assert path.stat().st_size < 0.5 * written.stat().st_size


def test_int8_needs_calibration_images(written, tmp_path):
    with pytest.raises(ValueError, match="no calibration images"):
        quantize_int8(written, tmp_path / "int8.onnx", [])


def test_calibration_takes_training_images_as_evaluation_would_see_them():
    data = build_data({"name": "patterns", "n_train": 300, "n_test": 100}, batch_size=10, seed=0)
    data.setup()
    batches = list(data.calibration(100))
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    assert labels.sort().values.equal(torch.arange(100))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.info.mean, data.info.std))
    pool = (data.train_set.images.float() / 255 - mean) / std
    for image, label in zip(images, labels, strict=True):
        nearest = (pool - image).abs().amax(dim=(1, 2, 3)).argmin()
        assert torch.allclose(pool[nearest], image, atol=1e-5) and data.train_set.labels[nearest] == label
    assert len(torch.cat([y for _, y in data.calibration(7)]).unique()) == 7
    assert sum(len(y) for _, y in data.calibration(1000)) == 300


def test_image_sizes():
    assert image_size(RepMLPNet((32, 48), channels=(4, 8), blocks=(1, 1), share_sets=(1, 2))) == (32, 48)
    assert image_size(build_resmlp(64, 4, 1, 8)) == (64, 64)
    other = nn.Conv2d(3, 4, 3)
    assert image_size(other, {"img_size": 40}) == (40, 40)
    other.pretrained_cfg = {"input_size": (3, 20, 30)}
    assert image_size(other) == (20, 30)
    with pytest.raises(ValueError, match="give img_size"):
        image_size(nn.Linear(2, 2))


def test_checkpoints_of_both_kinds_are_opened(trained, net, tmp_path):
    model, config, _ = open_checkpoint(trained)
    assert config["name"] == "repmlpnet_tiny" and model.num_classes == 100
    torch.save(to_official(net.state_dict()), tmp_path / "official.pth")
    model, config, _ = open_checkpoint(tmp_path / "official.pth")
    assert config["channels"] == [16, 32] and compare(net, model, random_batches((3, 32, 32))).relative == 0
    save_model(tmp_path / "again.safetensors", model, config)
    assert compare(model, load_model(tmp_path / "again.safetensors")[0], random_batches((3, 32, 32))).relative == 0
    (tmp_path / "half.safetensors").write_bytes(trained.read_bytes()[:1000])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        open_checkpoint(tmp_path / "half.safetensors")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_the_remedy(program, written, tmp_path, monkeypatch, package):
    monkeypatch.setattr("repmlp.imports.importlib.import_module", lambda name: _import_without(package, name))
    call = {"onnxruntime": lambda: onnx_session(written)}.get(package, lambda: to_onnx(program, tmp_path / "m.onnx"))
    with pytest.raises(ModuleNotFoundError, match=rf"^{package} cannot be imported.*pip install 'repmlp\[export\]'"):
        call()


def _import_without(package: str, name: str):
    if name == package:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return builtins.__import__(name)


def test_files_that_are_no_usable_onnx(tmp_path, net):
    with pytest.raises(FileNotFoundError, match="no ONNX file at"):
        onnx_session(tmp_path / "absent.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match="ONNX Runtime cannot open"):
        onnx_session(tmp_path / "bad.onnx")
    helper = onnx.helper
    value = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [4, 3]) for n in "ab"]
    graph = helper.make_graph([helper.make_node("Relu", ["a"], ["b"])], "fixed", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "fixed.onnx")
    with pytest.raises(ValueError, match="takes batches of 4 only"):
        onnx_session(tmp_path / "fixed.onnx")


def test_export_command(exported, trained):
    folder, printed = exported
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "model.pt2", "model.onnx"}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    assert [row[0].split(", ")[-1] for row in rows[2:]] == ["PyTorch", "PyTorch", "torch.export", "ONNX Runtime"]
    assert float(rows[2][4]) == 0 and all(0 < float(row[4]) < 3e-6 for row in rows[3:])
    assert all(float(row[5]) > 0 for row in rows[2:])
    assert "1 thread(s)" in printed and "onnxruntime" in printed
    train_time = load_model(trained)[0]
    merged = load_model(folder / "model.safetensors")[0]
    assert len(merged.state_dict()) < len(train_time.state_dict())
    assert_same(train_time, merged)
    session = onnx_session(folder / "model.onnx")
    assert_same(train_time, lambda images: run_onnx(session, images))


def test_deployed_form_is_exported(trained, tmp_path):
    done = command(
        *("experiments/export.py", f"checkpoint={trained}", "form=deployed", f"out={tmp_path}"), "rounds=1", "threads=1"
    )
    assert done.returncode == 0, done.stderr
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert not {"BatchNormalization", "Expand"} & {node.op_type for node in graph.node}
    # both layers of the two FFNs: a weight is a constant, and not copied for every image
    weights = {tensor.name for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    assert len(products) == 2 * 5 + 1 and all(node.input[1] in weights for node in products)
    session = onnx_session(tmp_path / "model.onnx")
    assert_same(load_model(trained)[0], lambda images: run_onnx(session, images))


def test_file_names_with_any_marks_where_the_user_stands(trained, tmp_path):
    """Hydra reads = in a value as its grammar, and the command works in the repository's folder."""
    from repmlp.runs.command_line import place, quote_file_names

    given = ["checkpoint=/x/epoch=3-step=10.safetensors", "checkpoint=a(1),b.pth", "checkpoint='c=d'", "rounds=[1,2]"]
    assert quote_file_names(given) == [
        "checkpoint='/x/epoch=3-step=10.safetensors'",
        "checkpoint='a(1),b.pth'",
        "checkpoint='c=d'",
        "rounds=[1,2]",
    ]
    assert place("/a/b") == Path("/a/b")
    (tmp_path / "epoch=3-step=10.safetensors").write_bytes(trained.read_bytes())
    found, absent = (
        command("experiments/export.py", f"checkpoint={name}", "rounds=1", cwd=tmp_path, fresh=name == "no=where.pth")
        for name in ("epoch=3-step=10.safetensors", "no=where.pth")
    )
    assert found.returncode == 0 and (tmp_path / "export/model.onnx").is_file(), found.stderr
    assert absent.stderr == f"error: no checkpoint at {tmp_path}/no=where.pth\n"


def test_an_older_net_is_exported_without_batch_norms(tmp_path):
    config = {"arch": "timm", "variant": "repmlp_res50_224", "img_size": 64, "kernels": [1, 3]}
    config["arguments"] = {"layers": [2, 2, 2, 2], "channels": [8, 16, 32, 64], "partition": 4, "groups": 4}
    save_model(tmp_path / "older.safetensors", randomise_norms(build_model(config, 5)).eval(), config)
    arguments = [f"checkpoint={tmp_path}/older.safetensors", "rounds=1", f"out={tmp_path}/out", "form=deployed"]
    assert "model.onnx" in script("export").export(OmegaConf.to_container(settings("export", *arguments)))
    graph = onnx.load(tmp_path / "out/model.onnx").graph
    assert not any(node.op_type == "BatchNormalization" for node in graph.node)


def test_evaluate_command(exported, trained, tmp_path):
    out = tmp_path / "new" / "results.json"
    arguments = ["precisions=[float32,bf16,int8]", "calibration_images=100", f"out={out}"]
    arguments += [f"onnx={exported[0] / 'model.onnx'}"]
    done = command("experiments/evaluate.py", f"checkpoint={trained}", *PATTERNS, *arguments)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())
    assert [p.name for p in out.parent.iterdir()] == ["results.json"]
    rows = {row["network"]: row for row in results["rows"]}
    assert list(rows) == [
        *("as trained, float32", "merged, float32", "merged, bf16", "deployed, int8, ONNX Runtime"),
        "model.onnx, ONNX Runtime",
    ]
    # counted here: top-1 and top-5 of the train-time net on the same images
    data = build_data(compose_config("data=patterns", "data.n_train=200", "data.n_test=100")["data"], 10, 0)
    data.setup()
    images, labels = next(iter(data.whole_evaluation()))
    with torch.no_grad():
        ranked = load_model(trained)[0](images).argsort(1, descending=True)
    assert results["images"] == len(labels) == 100
    for name in ("as trained, float32", "merged, float32", "model.onnx, ONNX Runtime"):
        assert rows[name]["top1_pct"] == pytest.approx(100 * float((ranked[:, 0] == labels).float().mean()))
        assert rows[name]["top5_pct"] == pytest.approx(100 * float((ranked[:, :5] == labels[:, None]).sum() / 100))
        assert rows[name]["disagreements"] == 0 and rows[name]["drop_points"] == 0
    assert rows["merged, bf16"]["disagreements"] < 40 and rows["deployed, int8, ONNX Runtime"]["disagreements"] < 40
    for row in rows.values():
        assert row["drop_points"] == pytest.approx(rows["merged, float32"]["top1_pct"] - row["top1_pct"], abs=1e-5)
    assert results["quantised"]["per_tensor"] == {"MatMul": 2} and "2 MatMul in int8 with one scale" in done.stdout
    assert "scales of activations from 100 training images" in done.stdout and "root" not in results["data"]
    assert sum(line.startswith("|") for line in done.stdout.splitlines()) == 2 + len(rows)


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"experiments/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "experiments/conf"), version_base="1.3"):
        return compose(name, overrides=list(overrides))


@pytest.fixture
def resmlp(tmp_path) -> Path:
    """An untrained ResMLP of ten classes."""
    config = {"arch": "resmlp", "depth": 1, "width": 8, "init_std": 0.3}
    save_model(tmp_path / "resmlp.safetensors", build_resmlp(32, 2, 1, 8, init_std=0.3, num_classes=10), config)
    return tmp_path / "resmlp.safetensors"


def test_resmlp_has_scales_for_the_outputs_of_every_layer(resmlp, tmp_path):
    config = OmegaConf.to_container(settings("export", f"checkpoint={resmlp}", "rounds=1", f"out={tmp_path}/out"))
    assert "model.pt2, model.onnx" in script("export").export(config)
    images = [torch.randn(8, 3, 32, 32)]
    counts = quantize_int8(tmp_path / "out/model.onnx", tmp_path / "int8.onnx", images)
    assert counts.per_channel == {"Conv": 1, "MatMul": 3, "Gemm": 1} and not counts.per_tensor
    run_onnx(onnx_session(tmp_path / "int8.onnx"), images[0])  # a wrong axis shows here


def test_nothing_is_written_where_a_file_differs_from_the_net(resmlp, tmp_path, monkeypatch):
    module = script("export")
    monkeypatch.setattr("repmlp.export.run_onnx", lambda session, images: run_onnx(session, images) * 1.001)
    config = OmegaConf.to_container(settings("export", f"checkpoint={resmlp}", "rounds=1", f"out={tmp_path}/out"))
    with pytest.raises(ValueError, match=r"model\.onnx differs from the network by 1\.0e-03.*not written"):
        module.export(config)
    assert not list((tmp_path / "out").iterdir())


def test_weights_that_cannot_be_read_back_are_left_out_and_it_is_said(resmlp, tmp_path, monkeypatch):
    module = script("export")
    monkeypatch.setattr(
        "repmlp.checkpoints.load_model", lambda path: (_ for _ in ()).throw(ValueError("another architecture"))
    )
    config = OmegaConf.to_container(settings("export", f"checkpoint={resmlp}", "rounds=1", f"out={tmp_path}/out"))
    assert "No model.safetensors: load_model cannot build" in module.export(config)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.pt2", "model.onnx"}


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("evaluate", ["data=patterns"], "pass checkpoint=FILE"),
        ("evaluate", ["data=imagenet", "data.root=nowhere", "checkpoint=RESMLP"], "no folder nowhere/val"),
        ("evaluate", ["checkpoint=RESMLP", "precisions=[bf16,fp8]"], "'fp8' is none of float32, bf16, int8"),
        ("evaluate", ["checkpoint=RESMLP", "precisions=bf16"], "precisions=bf16: use a list"),
        ("evaluate", ["checkpoint=RESMLP", "calibration_images=0"], "calibration_images=0: use a whole number"),
        ("evaluate", ["checkpoint=RESMLP", "threads=two"], "threads='two': use a whole number"),
        ("evaluate", ["checkpoint=RESMLP", "device=mps"], "device='mps': use cpu, cuda or auto"),
        ("evaluate", [*PATTERNS, "checkpoint=TRAINED", "onnx=ONNX"], "the data set has (3, 32, 32, 100)"),
        ("export", [], "pass checkpoint=FILE"),
        ("export", ["checkpoint=RESMLP", "rounds=0"], "rounds=0: use whole numbers"),
        ("export", ["checkpoint=RESMLP", "img_size=[32,0]"], "img_size=[32, 0]: use whole numbers"),
        ("export", ["checkpoint=RESMLP", "batch_sizes=[]"], "batch_sizes=[]: give at least one"),
        ("export", ["checkpoint=TRAINED", "out=SAME"], "holds the checkpoint itself"),
    ],
)
def test_wrong_settings(trained, resmlp, tmp_path, name, overrides, words):
    if "onnx=ONNX" in overrides:
        to_onnx(to_exported_program(load_model(resmlp)[0], 32), tmp_path / "ten.onnx")
    paths = {"TRAINED": trained, "RESMLP": resmlp, "SAME": trained.parent, "ONNX": tmp_path / "ten.onnx"}
    for short, path in paths.items():
        overrides = [override.replace(f"={short}", f"={path}") for override in overrides]
    config = settings(name, *overrides)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        script(name).evaluate(config) if name == "evaluate" else script(name).export(OmegaConf.to_container(config))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("evaluate", [*PATTERNS, "checkpoint=RESMLP"], "tells 10 classes, data=patterns has 100"),
        ("export", ["checkpoint=absent.safetensors"], "/absent.safetensors"),
    ],
)
def test_commands_tell_errors_on_one_line(resmlp, name, overrides, words):
    done = command(f"experiments/{name}.py", *(o.replace("RESMLP", str(resmlp)) for o in overrides))
    assert done.returncode == 1 and words in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: ") and not done.stdout
