"""Runs of segmentation: record, resuming, weights to start from, mistakes; through execute and the command."""

import csv
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import evaluate
import masks
import numpy as np
import predict
import pytest
import timm
import torch
from conftest import command, compose_config, interrupt, tiny_config, write_camvid
from hydra.errors import HydraException
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import save_file
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import repmlp
from repmlp.backbones import start_backbone
from repmlp.checkpoints import load_model, save_model
from repmlp.cost import count_macs
from repmlp.models.build import build_model, merged_copy
from repmlp.models.pspnet import PSPNet, build_pspnet
from repmlp.models.upernet import predict as predict_pixels
from repmlp.reading import read
from repmlp.repmlp_block import RepMLP
from repmlp.runs import run as runs
from repmlp.runs.command_line import message_of
from repmlp.runs.key import run_key
from repmlp.runs.record import record_path
from repmlp.runs.run import execute
from repmlp.runs.settings import run_of
from repmlp.trained_on import TrainedOn

CLASSIFIER = {
    "arch": "repmlpnet", "img_size": 32, "stem_stride": 4, "channels": [8, 16, 32, 64], "blocks": [1, 1, 1, 1],
    "share_sets": [1, 2, 4, 8], "kernels": [1, 3],
}  # fmt: skip
ARGUMENTS = "{channels: [8, 16, 32, 64], blocks: [1, 1, 1, 1], share_sets: [1, 2, 4, 8]}"
TINY = [
    "model.img_size=32", f"model.arguments={ARGUMENTS}", "model.decoder_channels=16", "model.auxiliary_channels=8",
    "data.crop_size=[32,64]", "data.workers=0", "recipe.epochs=3", "recipe.warmup_epochs=1", "recipe.batch_size=2",
    "trainer.accelerator=cpu",
]  # fmt: skip


PSPNET = {  # of 32x64 pixels: maps of 4x8, two partitions
    "pspnet_slim_res50": (narrow := {"channels": [4, 4, 8, 16], "layers": [1, 2, 2, 1]}),
    "pspnet_slim_repmlp": {**narrow, "partition": 4, "reductions": 1, "groups": 2, "global_reductions": [1, 2]},
}


@pytest.fixture(scope="module")
def camvid(tmp_path_factory):
    return write_camvid(tmp_path_factory.mktemp("data"))


def tiny(folder, camvid, *overrides):
    folders = [f"data.root={camvid}", f"results_dir={folder}/results", f"output_dir={folder}/outputs"]
    return compose_config(*TINY, *folders, *overrides, name="segment")


def pspnet(folder, camvid, name, *overrides, **arguments):
    """Compose a run of seconds of a PSPNet."""
    kernels = "[1,3]" if name == "pspnet_slim_repmlp" else "[]"
    model = [f"model={name}", "model.img_size=[32,64]", f"model.kernels={kernels}", "model.decoder_channels=8"]
    data = [f"data.root={camvid}", "data.crop_size=[32,64]", "data.workers=0"]
    recipe = ["recipe.epochs=2", "recipe.warmup_epochs=1", "recipe.batch_size=2", "recipe.window=[32,64]"]
    where = [f"results_dir={folder}/results", f"output_dir={folder}/outputs", "trainer.accelerator=cpu"]
    config = compose_config(*model, *data, *recipe, *where, *overrides, name="segment")
    config["model"]["arguments"] = {**PSPNET[name], **arguments}
    return config


def key_of(config):
    """Return the key of a run; the files that it finds are part of it."""
    return run_key(asdict(runs.with_identities(run_of(config))))


def record_of(config):
    return json.loads(record_path(config["results_dir"], config["study"], key_of(config)).read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, camvid):
    config = tiny(tmp_path_factory.mktemp("run"), camvid)
    outcome = execute(config)
    assert outcome.state == "finished", outcome.message
    return config


def test_record_says_what_was_trained_and_measured(finished):
    record = record_of(finished)
    assert record["task"] == "segmentation" and record["data"] == "camvid" and record["num_classes"] == 11
    assert (record["n_train"], record["n_eval"], record["eval_pixels"]) == (6, 4, 4 * 48 * 64)
    assert len(record["class_iou_pct"]) == 11
    assert record["miou_pct"] == pytest.approx(np.mean(list(record["class_iou_pct"].values())))
    assert record["curve"][-1]["miou_pct"] == pytest.approx(record["miou_pct"], abs=0.01)
    assert record["merge_error"] < 1e-5 and record["merge_disagreements"] <= 0.001 * record["eval_pixels"]
    assert "root" not in record["config"]["data"] and finished["data"]["root"] not in json.dumps(record)
    assert len(record["locality"]) == 4  # layers
    net = build_model(record["config"]["model"], 11)
    assert record["params"] == sum(p.numel() for p in net.parameters())


def test_weights_are_kept_and_the_run_is_not_done_again(finished):
    path = f"{finished['output_dir']}/{finished['study']}/{key_of(finished)}/model.safetensors"
    net, metadata = load_model(path)
    assert net.num_classes == 11 and metadata["study"] == finished["study"]
    assert execute(finished).state == "skipped"


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(finished, camvid, tmp_path):
    config = tiny(tmp_path, camvid)

    interrupt(config, epoch=2)
    assert execute(config).state == "finished"
    ours, whole = record_of(config), record_of(finished)
    assert ours["curve"] == whole["curve"] and ours["class_iou_pct"] == whole["class_iou_pct"]


def test_a_classifier_to_start_from_is_part_of_the_run_by_its_content(finished, camvid, tmp_path, caplog):
    caplog.set_level("INFO")
    files = [tmp_path / f"{name}.safetensors" for name in ("one", "other")]
    for file in files:
        save_model(file, build_model(CLASSIFIER, 7), CLASSIFIER)
    one, other = (tiny(tmp_path, camvid, f"backbone={file}") for file in files)
    short = ["recipe.epochs=1", "recipe.warmup_epochs=0"]
    config = tiny(tmp_path, camvid, f"backbone={files[0]}", *short)
    outcome = execute(config)
    assert outcome.state == "finished", outcome.message
    assert f"backbone from {files[0]}; fresh: downsamples.0, downsamples.1, downsamples.2" in caplog.text
    record = json.loads(record_path(config["results_dir"], config["study"], outcome.key).read_text())
    assert str(tmp_path) not in json.dumps(record) and len(record["config"]["model"]["backbone"]) == 64
    keys = {key_of(each) for each in (one, other, finished)}
    assert len(keys) == 3
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(files[0].read_bytes())
    assert execute({**config, "backbone": str(moved)}).state == "skipped"


def test_the_backbone_really_starts_from_the_weights(camvid, tmp_path):
    file = tmp_path / "classifier.safetensors"
    save_model(file, build_model(CLASSIFIER, 7), CLASSIFIER)
    task = runs.TASKS["segmentation"]
    settings = run_of(tiny(tmp_path, camvid, f"backbone={file}"))
    net = task.build_net(settings, task.build_data(settings))
    name = "stages.2.0.block.channel_perceptron.weight"
    assert net.backbone.state_dict()[name].equal(read(file)[name])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["backbone=nowhere.pth"], ["backbone=nowhere.pth", "no such file"]),
        (["data.crop_size=[30,64]"], ["data.crop_size=[30, 64]", "32"]),
        (["recipe.schedule=steps"], ["recipe.schedule='steps'", "cosine or poly"]),
        (["recipe.window=[30,32]"], ["recipe.window=[30, 32]", "multiples of 32"]),
        (["recipe.window=512"], ["recipe.window=512: use a list in [ ] or null"]),
        (["recipe=cifar100", "recipe.batch_size=4"], ["the recipe lacks auxiliary_weight and window"]),
        (["recipe.auxiliary_weight=abc"], ["recipe.auxiliary_weight=abc: use a number"]),
        (["recipe.batch_size=1"], ["recipe.batch_size=1 on 1 process", "two images"]),
        (["task=x"], ["task='x'", "classification or segmentation"]),
        (["task=classification"], ["there is no setting recipe.auxiliary_weight"]),
        (["model.embed_kernel=4"], ["embed_kernel=4", "odd"]),
        (["model.encoder=resnet10t"], ["resnet10t is no RepMLPNet"]),
        (["data.root=nowhere"], ["nowhere", "data.root=FOLDER"]),
    ],
)
def test_mistakes_are_one_line(camvid, tmp_path, overrides, words):
    try:
        outcome = execute(tiny(tmp_path, camvid, *overrides))
        message = outcome.message
        assert outcome.state == "failed"
    except HydraException as error:
        message = message_of(error)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_classifier_takes_no_backbone_and_masks_no_classifier(tmp_path, camvid):
    outcome = execute({**tiny_config(tmp_path), "backbone": "file"})
    assert outcome.state == "failed" and "backbone is a setting of experiments/segment.py" in outcome.message
    outcome = execute({**tiny(tmp_path, camvid), "model": tiny_config(tmp_path)["model"]})
    assert outcome.state == "failed" and "model=repmlpnet_tiny labels no pixels" in outcome.message


def test_names_that_timm_flattens_are_found(tmp_path):
    weights = timm.create_model("convnext_atto", num_classes=7).state_dict()
    save_file(weights, tmp_path / "convnext.safetensors")
    config = {"arch": "upernet", "encoder": "convnext_atto", "decoder_channels": 16, "auxiliary_channels": 0}
    net = build_model(config, 11)
    assert start_backbone(net, tmp_path / "convnext.safetensors") == []
    assert net.backbone.state_dict()["stem_0.weight"].equal(weights["stem.0.weight"])


def test_images_without_any_label_are_said(camvid, tmp_path):
    root = write_camvid(tmp_path / "data", train=2, test=1)
    Image.fromarray(np.full((48, 64), 11, dtype=np.uint8)).save(root / "CamVid/testannot/a0.png")
    outcome = execute(tiny(tmp_path, root, "recipe.epochs=1", "recipe.warmup_epochs=0"))
    assert outcome.state == "failed" and "no pixel of the images to evaluate on has a label" in outcome.message


def test_other_backbones_start_from_timms_weights(camvid, tmp_path):
    slim = {"channels": (32, 64, 128, 256), "stem_width": 16}
    weights = timm.create_model("resnet18d", num_classes=7, **slim).state_dict()
    file = tmp_path / "resnet.safetensors"
    save_file(weights, file)
    task = runs.TASKS["segmentation"]
    config = compose_config("model=upernet_slim_resnet", f"backbone={file}", f"data.root={camvid}", name="segment")
    net = task.build_net(run_of(config), task.build_data(run_of(config)))
    own = net.backbone.state_dict()
    assert len(own) > 100 and all(own[name].equal(weights[name]) for name in own)

    wrong = {"model": CLASSIFIER, "file": tmp_path / "repmlpnet.safetensors"}
    save_model(wrong["file"], build_model(wrong["model"], 7), wrong["model"])
    with pytest.raises(ValueError, match=r"repmlpnet\.safetensors: conv1\.0\.weight is missing: .*resnet18d"):
        task.build_net(run_of({**config, "backbone": str(wrong["file"])}), task.build_data(run_of(config)))
    outcome = execute(tiny(tmp_path, camvid, f"backbone={file}"))
    assert outcome.state == "failed" and "resnet.safetensors: these weights have none of the formats" in outcome.message


def test_the_command_names_a_mask_with_unknown_labels_and_runs_side_by_side(tmp_path):
    root = write_camvid(tmp_path / "data", train=2, test=1)
    bad = root / "CamVid/trainannot/a1.png"
    Image.fromarray(np.full((48, 64), 77, dtype=np.uint8)).save(bad)
    folders = [f"data.root={root}", f"results_dir={tmp_path}/r", f"output_dir={tmp_path}/o"]
    done = command("experiments/segment.py", *TINY, "data.workers=1", *folders)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert str(bad) in done.stderr and "77" in done.stderr
    Image.fromarray(np.zeros((48, 64), dtype=np.uint8)).save(bad)
    joblib = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "trainer.threads=1", "seed=0,1"]
    short = ["recipe.epochs=1", "recipe.warmup_epochs=0", "data.workers=1"]
    done = command("experiments/segment.py", *joblib, *TINY, *short, *folders)
    assert done.returncode == 0, done.stderr
    assert "upernet_slim, branches 1x1+3x3, 3x3 embeddings, 1 epoch, seed 0" in done.stdout + done.stderr


@pytest.fixture(scope="module", params=PSPNET)
def trained(request, camvid, tmp_path_factory):
    """Train a tiny PSPNet; returns its configuration, record and weights."""
    config = pspnet(tmp_path_factory.mktemp("pspnet"), camvid, request.param)
    outcome = execute(config)
    assert outcome.state == "finished", outcome.message
    return config, record_of(config), f"{config['output_dir']}/{config['study']}/{outcome.key}/model.safetensors"


def test_pspnet_trains_is_merged_and_comes_back(trained):
    config, record, weights = trained
    assert record["task"] == "segmentation" and len(record["curve"]) == 2
    assert record["merge_error"] < 1e-5 and record["merge_disagreements"] <= 0.001 * record["eval_pixels"]
    net, metadata = load_model(weights)
    assert isinstance(net, PSPNet) and metadata["study"] == config["study"]
    assert record["macs"] == count_macs(net, (32, 64))  # of a window
    merges = any(isinstance(module, RepMLP) for module in net.modules())
    assert merges == (config["model"]["name"] == "pspnet_slim_repmlp")
    net.double().requires_grad_(False)
    images = torch.randn(1, 3, 32, 64, dtype=torch.float64)
    expected, found = net(images), merged_copy(net)(images)
    assert float((found - expected).norm() / expected.norm()) < 1e-12
    assert execute(config).state == "skipped"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["recipe.window=null"], ["recipe.window=null", "use recipe.window=[32,64]"]),
        (["recipe.window=[32,32]"], ["recipe.window=[32, 32]", "1x1 partitions in c3", "1x2", "=[32,64]"]),
        (["data.crop_size=[64,64]"], ["data.crop_size=[64, 64]", "2x2 partitions in c3", "=[32,64]"]),
        (["model.kernels=[1,5]"], ["branch 5x5 covers 5x5 cells, a partition has 4x4"]),
        (["model.kernels=[1,3,7,9]"], ["branch 7x7"]),
        (["model.encoder=repmlp_res50_g4_8_32"], ["timm has no model", "repmlp_res50_g4_8_320"]),
        (["model.pooling=3"], ["there is no setting model.pooling"]),
        (["weights=file"], ["weights is a setting of classifiers", "backbone=FILE"]),
    ],
)
def test_mistakes_in_pspnet_are_one_line(camvid, tmp_path, overrides, words):
    add = [f"+{each}" if "pooling" in each else each for each in overrides]
    outcome = execute(pspnet(tmp_path, camvid, "pspnet_slim_repmlp", *add))
    assert outcome.state == "failed" and "\n" not in outcome.message
    assert all(word in outcome.message for word in words), outcome.message


def test_a_pspnet_without_global_perceptron_takes_whole_images(camvid, tmp_path):
    config = pspnet(tmp_path, camvid, "pspnet_slim_repmlp", "recipe.window=null", global_perceptron=False)
    outcome = execute(config)
    assert outcome.state == "finished", outcome.message


def test_pspnet_starts_from_a_classifier(camvid, tmp_path):
    """A plain ResNet's weights as a whole; of a RepMLP-ResNet all but FC1 and FC2, for other partitions."""
    task = runs.TASKS["segmentation"]
    for name, fresh in (("pspnet_slim_res50", []), ("pspnet_slim_repmlp", ["fc1", "fc2"])):
        config = pspnet(tmp_path, camvid, name)
        given = dict(config["model"]["arguments"])
        if fresh:
            given |= {"img_size": 128, "kernels": (1, 3)}
        classifier = timm.create_model(config["model"]["encoder"], num_classes=7, **given)
        file = tmp_path / f"{name}.safetensors"
        save_file(classifier.state_dict(), file)
        run = run_of({**config, "backbone": str(file)})
        net = task.build_net(run, task.build_data(run))
        own, there = net.backbone.state_dict(), classifier.state_dict()
        differing = {n.split(".")[-2] for n in own if own[n].shape != there[n].shape or not own[n].equal(there[n])}
        assert differing == set(fresh)
        assert start_backbone(net, file) == [
            f"{layer}.1.repmlp.global_perceptron.{fc}" for layer in ("layer2", "layer3") for fc in fresh
        ]
    with pytest.raises(ValueError, match=r"\.safetensors: layer1\.0\.conv1\.weight is .* there and .* here"):
        save_file(timm.create_model("resnet50", num_classes=0, channels=(8, 8, 8, 8)).state_dict(), file)
        run = run_of({**pspnet(tmp_path, camvid, "pspnet_slim_res50"), "backbone": str(file)})
        task.build_net(run, task.build_data(run))


def test_evaluation_measures_what_the_record_says(trained, finished, camvid, tmp_path):
    _, record, weights = trained
    given = compose_config(
        f"checkpoint={weights}", "data=camvid", f"data.root={camvid}", "data.workers=0", name="evaluate"
    )
    results = evaluate.evaluate(OmegaConf.create(given))
    for name in ("miou_pct", "miou_merged_pct", "class_iou_pct", "merge_disagreements", "eval_pixels"):
        assert results[name] == pytest.approx(record[name]), name
    assert results["window"] == [32, 64] and results["merge_error"] < 1e-5
    table = masks.mask_table(results)
    assert (
        f"| merged, float32     | {record['miou_merged_pct']:.2f} " in table and "in windows of 32x64 pixels" in table
    )
    whole = f"{finished['output_dir']}/{finished['study']}/{key_of(finished)}/model.safetensors"
    results = evaluate.evaluate(OmegaConf.create({**given, "checkpoint": whole}))
    assert results["window"] is None and results["miou_pct"] == pytest.approx(record_of(finished)["miou_pct"])
    for name, value in (("precisions", ["bf16"]), ("onnx", "a.onnx"), ("calibration_images", 5)):
        with pytest.raises(ValueError, match=f"{name}=.*: a network that labels pixels is evaluated in float32 alone"):
            evaluate.evaluate(OmegaConf.create({**given, name: value}))
    with pytest.raises(ValueError, match=r"was trained on data=camvid, and would be measured on cifar100"):
        evaluate.evaluate(OmegaConf.create(compose_config(f"checkpoint={weights}", name="evaluate")))


def test_other_meanings_of_the_classes_are_refused():
    trained = TrainedOn({"name": "patterns", "data_seed": 0, "shift": 2, "answer": "texture"})
    given = {"name": "patterns", "data_seed": 0, "shift": 2, "answer": "texture"}
    evaluate.check_data("f", trained, given)
    evaluate.check_data("f", TrainedOn({"name": "patterns"}), given)  # an older file does not tell
    for name, other in (("shift", 0), ("answer", "both"), ("data_seed", 1)):
        with pytest.raises(ValueError, match=f"f was trained on data.{name}=.* measured on {other}: say data.{name}="):
            evaluate.check_data("f", trained, {**given, name: other})


def test_predictions_are_label_maps_of_whole_images(trained, camvid, tmp_path):
    _, _, weights = trained
    images = tmp_path / "images"
    (images / "below").mkdir(parents=True)
    shutil.copy(camvid / "CamVid/test/a0.png", images / "below")
    Image.fromarray(np.zeros((30, 70, 3), np.uint8)).save(images / "b.jpg")
    (images / "c.png").write_bytes(b"none")
    out = tmp_path / "pixels.csv"
    given = compose_config(f"checkpoint={weights}", f"images={images}", f"out={out}", name="predict")
    assert predict.predict(OmegaConf.create(given)) == [Path("c.png")]
    rows = list(csv.DictReader(out.open()))
    assert [(row["image"], row["labels"]) for row in rows] == [
        ("b.jpg", "pixels/b.jpg.png"), ("below/a0.png", "pixels/below/a0.png.png"),
    ]  # fmt: skip
    with Image.open(tmp_path / rows[1]["labels"]) as picture:
        found = np.asarray(picture)
    net, image = merged_copy(load_model(weights)[0]), Image.open(camvid / "CamVid/test/a0.png")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    pixels = (pixels - torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_DEFAULT_STD).view(
        3, 1, 1
    )
    # two windows of 32x64 on the image of 48x64, padded to 64x64
    padded = torch.nn.functional.pad(pixels, (0, 0, 0, 16))[None]
    total, seen = torch.zeros(1, 11, 64, 64), torch.zeros(64, 1)
    for top in (0, 32):
        total[:, :, top : top + 32] += net(padded[:, :, top : top + 32]).detach()
        seen[top : top + 32] += 1
    assert np.array_equal(found, (total / seen).argmax(1)[0, :48].numpy())
    names = [name for name in rows[1] if name.startswith("share(")]
    assert len(names) == 11 and names[0] == "share(Sky)"
    for number, name in enumerate(names):
        assert float(rows[1][name]) == pytest.approx((found == number).mean(), abs=1e-6)


@pytest.mark.parametrize("out", ["images.csv", "images/maps.csv"])
def test_label_maps_never_lie_among_the_images(trained, tmp_path, out):
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(np.zeros((32, 64, 3), np.uint8)).save(images / "a.png")
    given = compose_config(f"checkpoint={trained[2]}", f"images={images}", f"out={tmp_path / out}", name="predict")
    with pytest.raises(ValueError, match="among the images: choose another"):
        predict.predict(OmegaConf.create(given))
    assert [path.name for path in tmp_path.rglob("*")] == ["images", "a.png"]


def test_a_network_of_one_size_sees_windows_of_it():
    """Also where the file does not tell how it was evaluated."""
    narrow = {"channels": (4, 4, 8, 16), "layers": (1, 2, 2, 1)}
    assert masks.window_of(TrainedOn(), build_pspnet("resnet50", 64, arguments=narrow)) is None
    repmlp = {**narrow, "partition": 4, "groups": 2, "reductions": 1}
    net = build_pspnet("repmlp_res50_224", (32, 64), (1, 3), arguments=repmlp)
    assert masks.window_of(TrainedOn(), net) == [32, 64]
    assert masks.window_of(TrainedOn(window=(64, 64)), net) == [64, 64]
    small, net = torch.randn(1, 3, 20, 30), net.eval()  # padded to a window
    with torch.no_grad():
        expected = net(torch.nn.functional.pad(small, (0, 34, 0, 12)))[:, :, :20, :30]
        assert torch.allclose(predict_pixels(net, small, [32, 64]), expected, atol=1e-6)
    free = build_pspnet("repmlp_res50_224", (32, 64), (1, 3), arguments={**repmlp, "global_perceptron": False})
    assert masks.window_of(TrainedOn(), free) is None


@pytest.mark.parametrize("overrides", [
    ["data=patterns", "model=timm", "model.variant=resmlp_12_patch4_32", "model.img_size=32", "model.kernels=[1,3]",
     "model.arguments={num_blocks: 1, embed_dim: 16}"],
    ["data=patterns", "model=repmlp_pure_tiny"],
    ["data=patterns", "model=repmlpnet_tiny"],
    ["data=camvid"],
    ["data=camvid", "pspnet"],
])  # fmt: skip
def test_a_runs_checkpoint_is_loaded_whatever_its_network(overrides, camvid, tmp_path):
    if overrides == ["data=camvid", "pspnet"]:
        config = pspnet(tmp_path, camvid, "pspnet_slim_repmlp")
    elif overrides == ["data=camvid"]:
        config = tiny(tmp_path, camvid)
    else:
        config = tiny_config(tmp_path, *overrides)

    interrupt(config, epoch=1)
    (file,) = tmp_path.rglob("last.ckpt")
    weights = torch.load(file, weights_only=True)["state_dict"]
    net = repmlp.load(file)
    own = net.state_dict()
    assert own and all(torch.equal(tensor, weights[f"net.{name}"]) for name, tensor in own.items())
    assert not net.training and len(own) == sum(name.startswith("net.") for name in weights)
