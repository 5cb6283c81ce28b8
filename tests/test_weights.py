"""The shipped weights: the cards are the records', repmlp and timm build the same nets, pictures come of them."""

import importlib
import json
import os
import pickle
import re
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from safetensors import safe_open

import repmlp
from repmlp.checkpoints import open_checkpoint
from repmlp.data.cifar100 import CIFAR100Data
from repmlp.models.build import merged_copy

for room in ("analysis", "experiments"):
    sys.path.insert(0, str(ROOT / room))
explore_kernels = importlib.import_module("explore_kernels")
plot_kernels = importlib.import_module("plot_kernels")
publish = importlib.import_module("publish")
FOLDERS = sorted(path.parent for path in (ROOT / "results/weights").glob("*/model.safetensors"))
REAL = os.environ.get("REPMLP_DATA")
# timm before 1.0.16 has no local-dir
LOCAL_DIR = hasattr(timm.models._hub, "load_model_config_from_path")


def record_of(folder: Path) -> tuple[str, dict]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        about = file.metadata()
    path = ROOT / "results" / about["study"] / "records" / f"{about['key']}.json"
    return about["key"], json.loads(path.read_text())


def test_none_and_both_of_two_nets_are_there():
    assert {folder.name for folder in FOLDERS} == {
        f"{net}_small_{branches}" for net in ("repmlpnet", "resmlp") for branches in ("none", "both")
    }


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_is_what_its_record_says(folder):
    key, record = record_of(folder)
    opened = open_checkpoint(folder / "model.safetensors")
    assert opened.config == record["config"]["model"]
    assert sum(p.numel() for p in opened.model.parameters()) == record["params"]
    card = (folder / "README.md").read_text()
    assert card == publish.card(record, key, folder)  # the numbers are the record's, not typed
    assert f"{record['top1_pct']:.2f}, {record['top5_pct']:.2f} %" in card
    numbers = json.loads(opened.metadata["normalisation"])
    assert json.loads((folder / "config.json").read_text()) == publish.timm_config(opened, numbers)
    assert (folder / "model.safetensors").stat().st_size < 5e6


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_repmlp_and_timm_build_the_same_net(folder, monkeypatch, tmp_path):
    if not LOCAL_DIR:
        pytest.skip(f"timm {timm.__version__} has no local-dir")
    monkeypatch.chdir(ROOT)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    exec(compile(code, str(folder / "README.md"), "exec"), {})
    moved = shutil.copytree(folder, tmp_path / "anywhere")
    other = timm.create_model(f"local-dir:{moved}", pretrained=True, num_classes=7)  # a fresh head, the rest loaded
    net = repmlp.load(folder / "model.safetensors")
    head, rest = ("head.weight", "head.bias"), other.state_dict()
    assert all(torch.equal(value, rest[name]) for name, value in net.state_dict().items() if name not in head)
    assert other.get_classifier().out_features == 7
    assert timm.data.resolve_model_data_config(other)["input_size"] == (3, 32, 32)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_merging_a_shipped_net_is_exact(folder):
    net = repmlp.load(folder / "model.safetensors").double()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        before, after = net(images), merged_copy(net)(images)
    assert float((after - before).norm() / before.norm()) < 1e-12


def test_heatmap_and_explorer_come_out_of_a_clone(tmp_path, capsys):
    """The commands of the guide, on a shipped file; nothing of outputs/ is needed."""
    file = str(ROOT / "results/weights/repmlpnet_small_both/model.safetensors")
    plot_kernels.main([file, "--block", "1", "--out", str(tmp_path)])
    drawn = matplotlib.image.imread(tmp_path / "kernel_repmlpnet_small_both_block1.png")
    shown = re.search(r"\]\((results/[^)]*kernel_[^)]*png)\)", (ROOT / "README.md").read_text())[1]
    if f"matplotlib=={version('matplotlib')} " in (ROOT / "requirements.lock").read_text():
        assert np.array_equal(drawn, matplotlib.image.imread(ROOT / shown)), "the README's picture is of this net"
    explore_kernels.main([file, "--layer", "3", "--output", str(tmp_path / "page.html")])
    assert "repmlpnet_small" in (tmp_path / "page.html").read_text()
    assert "stages.1.0" in capsys.readouterr().out


def test_weights_of_another_run_are_refused(tmp_path):
    key, record = record_of(FOLDERS[0])
    with pytest.raises(ValueError, match=rf"is of run {key}, the record of other"):
        publish.publish(record, "other", FOLDERS[0] / "model.safetensors", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        publish.publish(record, key, tmp_path / "missing.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def test_images():
    """The first 500 test images and their labels, normalised."""
    if REAL is None or not Path(REAL, "cifar-100-python").is_dir():
        pytest.skip("REPMLP_DATA names no folder with the real CIFAR-100")
    with open(Path(REAL, "cifar-100-python/test"), "rb") as file:
        content = pickle.load(file, encoding="latin1")
    # (N, 3*32*32) -> (N, 3, 32, 32)
    images = torch.from_numpy(content["data"][:500]).view(-1, 3, 32, 32) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (CIFAR100Data.info.mean, CIFAR100Data.info.std))
    return (images - mean) / std, torch.tensor(content["fine_labels"][:500])


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_shipped_net_has_the_recorded_accuracy(folder, test_images):
    """float32 here, bfloat16 there, and a twentieth of the images: within three standard errors of the record."""
    images, labels = test_images
    with torch.inference_mode():
        guesses = repmlp.load(folder / "model.safetensors")(images).argmax(1)
    share = record_of(folder)[1]["top1_pct"] / 100
    accuracy = float((guesses == labels).double().mean())
    assert abs(accuracy - share) < 3 * (share * (1 - share) / 500) ** 0.5
