"""The baseline computes what our networks compute, fused peers what they did; the command writes records."""

import importlib
import json
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import ROOT, command, randomise_norms
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from scipy import stats
from torch import nn

from repmlp import RepMLPNet, SetSharingFC, conv_to_fc, deployment
from repmlp.statistics import fit_power_law

sys.path[:0] = [str(ROOT / "experiments"), str(ROOT / "analysis")]
bench, engines, networks, older_networks, plain_net, settings = (
    importlib.import_module(f"benchmarks.{name}")
    for name in ("bench", "engines", "networks", "older_networks", "plain_net", "settings")
)
make_benchmark, scaling_tables = (importlib.import_module(name) for name in ("make_benchmark", "scaling_tables"))

SMALL = {"channels": (16, 32), "blocks": (2, 1), "share_sets": (4, 16)}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("form", settings.FORMS)
def test_every_form_computes_the_same(form, monkeypatch):
    monkeypatch.setattr(networks, "usual_product", lambda: "convolution")  # then there are all of them
    net = randomise_norms(RepMLPNet(**SMALL)).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        shaped = networks.in_form(net, form).double()
        assert relative(shaped(x), net(x)) < 1e-12


def test_our_training_step_is_the_straightforward_one():
    """Loss to 1e-12 and gradients to 1e-10 in float64: every fast path of training against convolutions."""
    ours = RepMLPNet(**SMALL).double().train()
    plain = plain_net.PlainRepMLPNet(ours).double().train()
    x, labels = torch.randn(4, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 5, 7, 99])
    losses = [nn.functional.cross_entropy(net(x), labels) for net in (ours, plain)]
    assert abs(float((losses[0] - losses[1]).detach())) < 1e-12
    for loss in losses:
        loss.backward()
    from repmlp.checkpoints import to_official

    gradients = to_official({name: p.grad for name, p in ours.named_parameters()} | dict(ours.named_buffers()))
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "regnetx_002"])
def test_fused_peers_compute_what_they_did_and_have_no_norm_left(name):
    model = randomise_norms(timm.create_model(name, num_classes=10)).eval()
    for module in model.modules():  # keep a deep net's numbers in range
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.0)
    fused = networks.fused(model)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative(fused(x), model(x)) < 1e-4
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules()), "the model stays as it was"
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())


def test_merging_by_identity_is_the_same_matrix():
    kernel = torch.randn(3, 1, 3, 3)
    ours = conv_to_fc(kernel, (5, 4), groups=3)
    assert torch.equal(ours.reshape(60, 20), plain_net.conv_to_fc_by_identity(kernel, (5, 4)))
    net = randomise_norms(RepMLPNet(**SMALL)).eval()
    weight, bias = plain_net.merge_by_identity(plain_net.PlainRepMLPNet(net).stages[0][0].repmlp_block)
    expected = net.stages[0][0].block.channel_perceptron.merged()
    torch.testing.assert_close(weight.view_as(expected[0]), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.view_as(expected[1]), expected[1], rtol=1e-5, atol=1e-5)


def test_merging_in_place_needs_no_second_weight():
    fc = randomise_norms(SetSharingFC((6, 6), 2, (1, 3))).eval()
    expected = [tensor.detach().clone() for tensor in fc.merged()]
    memory = fc.weight.data_ptr()
    fc.reparameterize()
    assert fc.weight.data_ptr() == memory
    assert torch.equal(fc.weight, expected[0]) and torch.equal(fc.bias, expected[1])


def test_an_exponent_is_fitted_with_its_error():
    """Synthetic times: exact ones have no error; with noise the truth lies within it as often as it should."""
    points = [4, 8, 16, 32, 64]
    exact = fit_power_law(points, [3 * n**2 for n in points])
    assert exact.exponent == pytest.approx(2) and exact.error < 1e-12
    assert exact(1024) == pytest.approx(3 * 1024**2)
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        noisy = fit_power_law(points, [3 * n**1.5 * np.exp(rng.normal(0, 0.1)) for n in points])
        held += abs(noisy.exponent - 1.5) < stats.t.ppf(0.975, 3) * noisy.error
    assert 0.92 < held / 400 < 0.98
    slope = stats.linregress(np.log(points), np.log([5.0, 11, 19, 44, 80]))
    ours = fit_power_law(points, [5.0, 11, 19, 44, 80])
    assert (ours.exponent, ours.error) == pytest.approx((slope.slope, slope.stderr))
    for x, y, words in (([1, 2], [1, 2], "need three points"), ([1, 2, 3], [1, 0, 2], "needs positive values, not 0")):
        with pytest.raises(ValueError, match=words):
            fit_power_law(x, y)


def test_a_curve_is_taken_apart():
    """Parts that were put in come out, and go on where the exponent of the points does not."""
    points = [256, 400, 576, 1024, 1600]
    curve = scaling_tables.Curve.fit("positions", points, [0.02 + 1e-5 * p + 3e-8 * p**2 for p in points])
    assert curve.coefficients == pytest.approx((0.02, 1e-5, 3e-8))
    assert curve(65536) == pytest.approx(0.02 + 0.65536 + 3e-8 * 65536**2)
    assert curve.shares(1600) == pytest.approx(100 * np.array([0.02, 0.016, 0.0768]) / 0.1128)
    assert "linear" in scaling_tables.parts("channels", points, [2.0 * p for p in points])


def synthetic(form: str, of: str, exponent: float) -> dict:
    """A record of the scaling of a layer whose time is a power of one value."""
    base = {"positions": 576, "channels": 256, "share_sets": 4}
    points = [base[of] * factor for factor in (1, 4, 16)]
    exact = {"exponent": exponent, "error": 0.0}
    sizes = [4 * {**base, of: n}["share_sets"] * (p := {**base, of: n}["positions"]) * (p + 1) for n in points]
    times = [(n / base[of]) ** exponent for n in points]
    return {
        "form": form, "of": of, "base": base, "points": points, "point_seconds": times,
        "weight_bytes": sizes, "exponents": {"seconds": exact, "weight_bytes": exact, "peak_memory_bytes": None},
    }  # fmt: skip


def test_estimates_of_a_layer_that_follows_theory():
    theory = {"positions": 2, "channels": 1, "share_sets": 0}
    rows = pd.DataFrame([synthetic(form, of, p) for form in scaling_tables.FORMS for of, p in theory.items()])
    assert not scaling_tables.exponents_table(rows)["time"].str.contains(r"\*").any()
    table = scaling_tables.estimates_table(rows).set_index(["input", "stage"])
    # two FCs on 128x128 with 64 channels and one share-set, the layer of 576 positions and 256 channels taking 1 s
    seconds = 2 * (128**2 / 576) ** 2 * 64 / 256
    found = table.loc[(512, "1: 2 FCs on 128x128")]
    for name in ("deployed s", "deployed s, by exponents"):
        assert float(found[name]) == pytest.approx(seconds, rel=5e-3)
    assert (
        found["weights GiB"] == f"{2 * 4 * 128**2 * (128**2 + 1) / 2**30:.3f}" and found["estimate"] == "extrapolated"
    )
    departing = pd.DataFrame([synthetic("deployed", "positions", 1.8)])
    assert scaling_tables.exponents_table(departing)["time"].tolist() == ["1.80 ± 0.00 *"]


def test_committed_records_lie_under_their_keys():
    paths = list((ROOT / "results/benchmark/measured").glob("*.json"))
    assert len(paths) > 150
    wrong = [path.name for path in paths if bench.record_key(json.loads(path.read_text())) != path.stem]
    assert not wrong


def test_every_benchmark_has_its_file_and_its_place_on_the_command_line():
    folder = ROOT / "experiments/benchmarks"
    found = {path.stem for path in folder.glob("*.py") if "def measure(bench: Bench" in path.read_text()}
    assert found == set(settings.WHAT)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    done = command(
        *(
            "experiments/benchmark.py",
            "models=[repmlpnet_cifar,resnet18@32]",
            "batch_sizes=[1]",
            "rounds=1",
            "warmup=0",
        ),
        *("what=[inference,training,conv_to_fc,segmentation,scaling]", "training_batch_sizes=[2]", "device=cpu"),
        "threads=1",
        *("segmentation_models=[upernet_slim@96x64,upernet_slim_resnet@96x64]", f"results_dir={folder}"),
        *("scaling_sides=[4,6,8]", "scaling_channels=[8,16,32]", "scaling_share_sets=[1,2,4]"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_command_writes_records(measured):
    records = [json.loads(path.read_text()) for path in (measured / "benchmark/measured").glob("*.json")]
    inference = {r["form"]: r for r in records if r["kind"] == "inference" and r["model"] == "repmlpnet_cifar"}
    assert inference.keys() == set(settings.FORMS)
    assert len({r["run"] for r in records}) == 1
    for record in inference.values():
        assert record["images_per_second"] == pytest.approx(1 / record["seconds"])
        assert record["macs"] in (468_329_472 + 2_949_120, 468_329_472)
    (ours,) = (r for r in records if r["kind"] == "conv_to_fc" and r["form"] == "ours")
    assert ours["same_bits"]
    scaling = [r for r in records if r["kind"] == "scaling"]
    assert {(r["form"], r["of"]) for r in scaling} == {
        (f, a) for f in scaling_tables.FORMS for a in scaling_tables.AXES
    }
    weight = {r["of"]: r["exponents"]["weight_bytes"]["exponent"] for r in scaling if r["form"] == "training"}
    assert (
        weight == pytest.approx({"positions": 2, "channels": 0, "share_sets": 1}) and scaling[0]["clock"] == "processor"
    )
    forms = {(r["model"], r["form"]): r for r in records if r["kind"] == "segmentation"}
    assert len(forms) == 3 and forms["upernet_slim", "merged"]["macs"] < forms["upernet_slim", "train-time"]["macs"]


@pytest.mark.parametrize("usual", ["linear", "convolution"])
def test_both_products_are_measured_where_convolutions_suit_the_processor(tmp_path, monkeypatch, usual):
    for room in ("networks", "training"):
        monkeypatch.setattr(importlib.import_module(f"benchmarks.{room}"), "usual_product", lambda: usual)
    monkeypatch.setattr(deployment, "usual_product", lambda: usual)
    monkeypatch.setattr(bench, "MATMUL_SIDE", 64)
    monkeypatch.setitem(networks.CONSTRUCTORS, "repmlpnet_cifar", partial(RepMLPNet, **SMALL))
    with initialize_config_dir(str(ROOT / "experiments/conf"), version_base="1.3"):
        given = ["models=[repmlpnet_cifar]", "batch_sizes=[1]", "rounds=1", "warmup=0", "training_batch_sizes=[2]"]
        options = OmegaConf.to_container(compose("benchmark", [*given, "device=cpu", f"results_dir={tmp_path}"]))
    here = bench.Bench(options)
    for what in ("inference", "training"):
        importlib.import_module(f"benchmarks.{what}").measure(here, options)
    forms = {json.loads(path.read_text())["form"] for path in (tmp_path / "benchmark/measured").glob("*.json")}
    assert forms >= {"deployed", "ours", "plain"}
    assert (forms >= {"deployed-linear", "ours-linear"}) is (usual == "convolution")
    assert ("deployed-linear" in forms) is ("ours-linear" in forms)


def test_all_forms_in_bfloat16(tmp_path, monkeypatch):
    """No form is cast before the next is made of it; what was measured in float32 says so."""
    # a processor without products in bfloat16 takes ten seconds for the large one
    monkeypatch.setattr(bench, "MATMUL_SIDE", 64)
    monkeypatch.setitem(networks.CONSTRUCTORS, "repmlpnet_cifar", partial(RepMLPNet, **SMALL))
    with initialize_config_dir(str(ROOT / "experiments/conf"), version_base="1.3"):
        given = ["models=[repmlpnet_cifar]", "batch_sizes=[1]", "rounds=1", "warmup=0", "dtype=bfloat16", "device=cpu"]
        options = OmegaConf.to_container(compose("benchmark", [*given, f"results_dir={tmp_path}"]))
    inference, dtypes = importlib.import_module("benchmarks.inference"), []

    def in_form(model, form):
        dtypes.extend({p.dtype for p in model.parameters()})
        return networks.in_form(model, form)

    monkeypatch.setattr(inference, "in_form", in_form)
    here = bench.Bench(options)
    for what in ("inference", "conv_to_fc"):
        importlib.import_module(f"benchmarks.{what}").measure(here, options)
    records = [json.loads(path.read_text()) for path in (tmp_path / "benchmark/measured").glob("*.json")]
    forms = set(settings.FORMS) - {"deployed-linear"}  # in bfloat16 there is one kind of product
    assert dtypes == [torch.float32] * len(forms)
    assert {r["form"] for r in records if r["kind"] == "inference"} == forms
    assert {(r["kind"], r["dtype"]) for r in records} == {("inference", "bfloat16"), ("conv_to_fc", "float32")}


def test_the_older_networks_and_their_ratio(tmp_path):
    from paper_tables import older

    options = {"device": "cpu", "threads": None, "dtype": "float32", "rounds": 2, "warmup": 0, "engine": "eager"}
    options |= {"results_dir": tmp_path, "older_models": ["repmlp_faceres_96", "mobilefacenet_96"], "batch_sizes": [1]}
    importlib.import_module("benchmarks.older").measure(bench.Bench(options), options)
    records = [json.loads(path.read_text()) for path in (tmp_path / "benchmark/measured").glob("*.json")]
    speed = {r["model"]: r["images_per_second"] for r in records}
    assert {r["model"]: (r["params"], r["macs"]) for r in records} == {
        name: (older.counts(name).folded_params, older.counts(name).folded_macs) for name in speed
    }
    table = older.claims_table(older.read_benchmark(tmp_path)).set_index(["network", "against", "what"])["ours"]
    ratio = speed["repmlp_faceres_96"] / speed["mobilefacenet_96"]
    assert table["repmlp_faceres_96", "mobilefacenet_96", "speed, %"] == f"{100 * (ratio - 1):+.1f}"


def test_older_networks_are_those_of_the_tables():
    from paper_tables import older

    for name, (construct, size) in older_networks.OLDER.items():
        with torch.device("meta"):
            assert networks.count_params(construct()) == older.counts(name).params, name
        assert size == older.NETWORKS[name].img_size


def test_a_runner_leaves_the_network_as_it_was():
    options = {"device": "cpu", "threads": None, "dtype": "bfloat16", "rounds": 1, "warmup": 0}
    here = bench.Bench({**options, "results_dir": "results", "engine": "eager"})
    net = RepMLPNet(**SMALL).eval()
    engines.runner(net, "eager", torch.randn(1, 3, 32, 32), here)()
    assert {p.dtype for p in net.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (("engine=onnxruntime", "dtype=bfloat16"), "engine=onnxruntime runs in float32 alone, not in dtype=bfloat16"),
        ("older_models=[resnet18]", "older_models: 'resnet18' is none of resnet50"),
        ("what=[speed]", "what=['speed']: use a list of inference"),
        ("engine=tensorrt", "engine='tensorrt': use eager"),
        ("models=[resnet_18]", "models: 'resnet_18' is no network"),
        ("segmentation_models=[upernet_slim@384]", "'upernet_slim@384' is no upernet of"),
        ("segmentation_models=[upernet_slim@360x480]", "have to be multiples of 32"),
        ("scaling_sides=[8,16]", "scaling_sides=[8, 16]: use a list of three or more growing whole numbers"),
        ("scaling_share_sets=[1,3,4]", "3 share-sets do not divide 64 channels"),
        ("rounds=0", "rounds=0: use a whole number, at least 1"),
        ("batch_sizes=[0]", "batch_sizes=[0]: use a list of whole numbers"),
    ],
)
def test_bad_settings_are_one_line(override, words, tmp_path):
    done = command(
        "experiments/benchmark.py", *([override] if isinstance(override, str) else override), f"results_dir={tmp_path}"
    )
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert words in done.stderr, done.stderr


def test_tables_are_made_of_the_records(measured):
    done = command("analysis/make_benchmark.py", f"--results={measured}")
    assert done.returncode == 0, done.stderr
    folder = measured / "benchmark"
    inference = pd.read_csv(folder / "inference.csv")
    assert len(inference) == len(settings.FORMS) + 1
    speed_ups = inference.set_index("form")["speed-up over plain"]
    assert speed_ups["plain"] == 1.0 and speed_ups["deployed"] > 0 and pd.isna(speed_ups["fused"])
    assert "ours ms" in (folder / "training.md").read_text()
    assert "MiB" in (folder / "conv_to_fc.md").read_text()
    assert "theory" in (folder / "scaling.md").read_text()
    assert "extrapolated" in (folder / "scaling_estimates.md").read_text()
    segmentation = folder / "segmentation.csv"
    assert [line.rsplit(",", 1)[1] != "" for line in segmentation.read_text().splitlines()[1:]].count(True) == 1


def test_without_records_the_tables_say_what_to_run(tmp_path):
    done = command("analysis/make_benchmark.py", f"--results={tmp_path}")
    assert done.returncode == 1 and "run experiments/benchmark.py first" in done.stderr


def test_a_share_is_of_the_bare_net_in_the_same_run():
    common = {"model": "repmlpnet_cifar", "seconds_quartiles": [1.0, 1.0], "images_per_second": 1.0, "run": "a"}
    rows = pd.DataFrame([{**common, "kernels": k, "seconds": s} for k, s in (([], 1.0), ([1, 3], 1.25), ([3], 1.0))])
    table = make_benchmark.branches_table(rows)
    assert list(table["branches"]) == ["none", "3x3", "1x1+3x3"]
    assert list(table["share of the bare net's"]) == ["1.00", "1.00", "0.80"]
    assert list(table["paper share"]) == ["1.00", "0.91", "0.85"]


def test_pairs_are_of_one_setting():
    common = {"model": "repmlpnet_cifar", "batch_size": 32, "threads": 2, "dtype": "float32", "peak_memory_bytes": 0}
    rows = [
        {**common, "device": device, "engine": engine, "run": engine, "form": form, "seconds": seconds,
         "seconds_quartiles": [seconds] * 2, "kernels_started": kernels}
        for device, engine, form, seconds, kernels in (
            ("cpu", "eager", "ours", 1.0, None), ("cpu", "eager", "plain", 2.0, None),
            ("gpu", "compile", "ours", 0.1, 80.0), ("gpu", "compile", "plain", 0.4, 900.0),
        )
    ]  # fmt: skip
    table = make_benchmark.pairs_table(pd.DataFrame(rows), "plain")
    assert list(table["times faster"]) == ["2.00", "4.00"] and list(table["device"]) == ["cpu", "gpu"]
    assert table["plain kernels"].iloc[1] == "900" and table["plain kernels"].iloc[0] == ""
    alone = make_benchmark.pairs_table(pd.DataFrame(rows[:2]), "plain")
    assert not {"device", "engine", "ours kernels"} & set(alone)


def test_precision_measures_all_numbers_in_one_run(tmp_path, monkeypatch):
    monkeypatch.setitem(networks.CONSTRUCTORS, "repmlpnet_cifar", partial(RepMLPNet, **SMALL))
    with initialize_config_dir(str(ROOT / "experiments/conf"), version_base="1.3"):
        given = ["what=[precision]", "precision_models=[repmlpnet_cifar]", "batch_sizes=[2]", "rounds=1", "warmup=0"]
        options = OmegaConf.to_container(compose("benchmark", [*given, "device=cpu", f"results_dir={tmp_path}"]))
    importlib.import_module("benchmarks.precision").measure(bench.Bench(options), options)
    records = pd.DataFrame([json.loads(path.read_text()) for path in (tmp_path / "benchmark/measured").glob("*.json")])
    found = set(zip(records["engine"], records["dtype"], strict=True))
    assert found == {
        (e, d) for e, ds in (("eager", ("float32", "bfloat16")), ("onnxruntime", ("float32", "int8"))) for d in ds
    }
    table = make_benchmark.precision_table(records).set_index(["engine", "dtype"])
    seconds = records.set_index(["engine", "dtype"])["seconds"]
    ratio = seconds["eager", "float32"] / seconds["onnxruntime", "int8"]
    assert table.loc[("onnxruntime", "int8"), "over float32 in torch"] == f"{ratio:.2f}"
    assert table.loc[("eager", "float32"), "over float32 in torch"] == "1.00"
    with pytest.raises(ValueError, match="use device=cpu"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        settings.check({**options, "device": "cuda"})


def test_a_table_names_the_processor():
    rows = pd.DataFrame([{"versions": {"torch": "2.15.0"}, "rounds": 5, "device": "x86_64 CPU", "threads": 2}])
    assert "x86_64 CPU, 2 threads, torch 2.15.0" in make_benchmark.note(rows)
    rows["processor"] = [{"name": "AMD EPYC", "family": "26.2", "amx": False}]
    rows["capability"] = "AVX512"
    assert "AMD EPYC (family 26.2, AVX512, no AMX), 2 threads" in make_benchmark.note(rows)
