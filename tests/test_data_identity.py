"""Which images a run has: folders by their content, exact amounts, hidden folders, names beside the weights."""

import json

import pandas as pd
import pytest
import torch
from conftest import command, compose_config, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from repmlp.checkpoints import load_model
from repmlp.data import build_data
from repmlp.data.base import first_of_classes, split_per_class
from repmlp.data.imagenet import ImageFolderData, eval_transform, fingerprint
from repmlp.runs.key import run_key
from repmlp.runs.run import execute, with_identities
from repmlp.runs.settings import run_of


def write_folder(root, classes=("cat", "dog"), n=4, colour=0):
    for part in ("train", "val"):
        for number, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (20, 24), (60 * number + colour, 10 * i, 90)).save(folder / f"{i}.png")
    return root


def key_of(root, *overrides):
    return run_key(vars_of(with_identities(run_of(compose_config("data=imagenet", f"data.root={root}", *overrides)))))


def vars_of(settings):
    from dataclasses import asdict

    return asdict(settings)


def test_a_folder_is_its_content_and_not_its_place(tmp_path):
    one = write_folder(tmp_path / "one/images")
    same = write_folder(tmp_path / "other/images")
    more = write_folder(tmp_path / "more/images", classes=("cat", "dog", "emu"))
    assert key_of(one) == key_of(same) != key_of(more)
    longer = write_folder(tmp_path / "longer/images")
    (longer / "val/cat/0.png").write_bytes((longer / "val/cat/0.png").read_bytes() + b" ")
    assert key_of(longer) != key_of(one)
    before = fingerprint(one)
    (one / "train/.ipynb_checkpoints").mkdir()
    (one / "train/.ipynb_checkpoints/x.png").write_bytes(b"x")
    assert fingerprint(one) == before


def test_the_label_is_the_folders_name(tmp_path):
    config = compose_config("data=imagenet", f"data.root={tmp_path / 'bilder'}")
    assert config["data"]["label"] == "bilder"


def test_hidden_folders_are_no_classes(tmp_path):
    root = write_folder(tmp_path / "images")
    for part in ("train", "val"):
        (root / part / ".ipynb_checkpoints").mkdir()
        Image.new("RGB", (8, 8)).save(root / part / ".ipynb_checkpoints/a.png")
    data = ImageFolderData(root, 16, 2, workers=0)
    assert data.info.num_classes == 2 and data.info.class_names == ("cat", "dog")


def test_evaluation_resizes_as_the_setting_says():
    image = Image.effect_noise((40, 56), 80).convert("RGB")
    for name, mode in (("bilinear", v2.InterpolationMode.BILINEAR), ("bicubic", v2.InterpolationMode.BICUBIC)):
        tensor = v2.functional.to_image(v2.functional.center_crop(v2.functional.resize(image, 16, mode), [16, 16]))
        mean, std = (torch.tensor(each)[:, None, None] for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        assert torch.allclose(eval_transform(16, name)(image), (tensor / 255 - mean) / std, atol=1e-6)
    assert compose_config("data=imagenet")["data"]["interpolation"] == "bilinear"
    with pytest.raises(ValueError, match=r"data\.interpolation='nearest': use bilinear"):
        eval_transform(16, "nearest")


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.data())
def test_exactly_as_many_images_as_asked_spread_over_classes(sizes, data):
    labels = torch.cat([torch.full((n,), label) for label, n in enumerate(sizes)])
    labels = labels[torch.randperm(len(labels))]
    n = data.draw(st.integers(1, len(labels)))
    chosen = first_of_classes(labels, len(sizes), n)
    assert len(chosen.unique()) == len(chosen) == n
    for label, size in enumerate(sizes):
        members = torch.nonzero(labels == label).flatten()
        mine = [index for index in chosen.tolist() if labels[index] == label]
        assert mine == members[: len(mine)].tolist()
        assert abs(len(mine) - size * n / len(labels)) < 1


def test_amounts_that_were_exact_draw_the_same_images():
    labels = torch.arange(5000) % 100
    for n in (100, 2000, 5000):
        assert torch.equal(first_of_classes(labels, 100, n), split_per_class(labels, 100, n / 5000)[0])


def test_150_and_49_of_the_patterns():
    for wanted in (150, 49):
        settings = {"name": "patterns", "n_train": 400, "n_test": 200, "n_eval": wanted}
        data = build_data(settings, batch_size=10, seed=0)
        data.prepare_data()
        data.setup()
        assert data.n_images == (400, wanted)


def test_names_and_numbers_stand_beside_the_weights_and_other_data_are_refused(tmp_path):
    config = tiny_config(tmp_path)
    assert execute(config).state == "finished"
    file = next((tmp_path / "outputs").rglob("model.safetensors"))
    metadata = load_model(file)[1]
    assert json.loads(metadata["data"])["name"] == config["data"]["name"]
    assert set(json.loads(metadata["normalisation"])) == {"mean", "std"}
    done = command("experiments/evaluate.py", f"checkpoint={file}")
    assert done.returncode == 1 and "was trained on data=patterns" in done.stderr and "say data=patterns" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_predictions_of_own_images(tmp_path):
    """Trained on a folder, asked about another: names, probabilities that sum to 1, merged and not alike."""
    root = write_folder(tmp_path / "mine", n=4)
    config = compose_config(
        f"data.root={root}", "data.workers=0", "model=repmlpnet_tiny", "recipe.epochs=1",
        "recipe.warmup_epochs=0", "recipe.batch_size=4", "trainer.accelerator=cpu", f"results_dir={tmp_path / 'r'}",
        f"output_dir={tmp_path / 'o'}", name="train",
    )  # fmt: skip
    outcome = execute(config)
    assert outcome.state == "finished", outcome.message
    file = next((tmp_path / "o").rglob("model.safetensors"))
    (root / "val/cat/broken.png").write_bytes(b"no image")
    tables = []
    for merged in ("true", "false"):
        out = tmp_path / f"{merged}.csv"
        done = command(
            "experiments/predict.py", f"checkpoint={file}", f"images={root / 'val'}", f"out={out}", f"merged={merged}"
        )
        assert done.returncode == 1 and "1 image(s) could not be read" in done.stderr
        assert f"left out: {root / 'val/cat/broken.png'} is no readable image" in done.stderr
        tables.append(pd.read_csv(out))
    for table in tables:
        assert len(table) == 8 and set(table["class"]) <= {"cat", "dog"}
        assert (table["p(cat)"] + table["p(dog)"]).sub(1).abs().max() < 1e-5
    assert (tables[0]["p(cat)"] - tables[1]["p(cat)"]).abs().max() < 1e-4
    assert sorted(tables[0]["image"])[0] == "cat/0.png"
    done = command("experiments/predict.py", f"checkpoint={file}", "images=nowhere")
    assert done.returncode == 1 and "images=nowhere: there is no such folder" in done.stderr
