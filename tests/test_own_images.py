"""Own images to the end: a run on a folder of uneven classes, its evaluation, and predictions as a user tries them."""

import csv
import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, compose_config
from hydra import compose, initialize_config_dir
from PIL import Image
from torch import nn

from repmlp.data import build_data
from repmlp.runs.command_line import place_files
from repmlp.runs.progress import told
from repmlp.runs.record import read_record
from repmlp.runs.run import execute
from repmlp.training.classifier import accuracy_metrics
from repmlp.training.recalls import Recalls

CLASSES = {"cat": 6, "dog, small": 3, "emu": 1}  # images of each in val/


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / f"experiments/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(name: str, *overrides: str):
    """Return the configuration of a command."""
    with initialize_config_dir(str(ROOT / "experiments/conf"), version_base="1.3"):
        return compose(name, overrides=list(overrides))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pets") / "pets"
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for number, (name, n) in enumerate(CLASSES.items()):
            (root / part / name).mkdir(parents=True)
            for i in range(n + 2 * (part == "train")):
                pixels = generator.integers(0, 120, (20 + i, 24, 3), dtype=np.uint8)
                pixels[..., number] += 100
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """Train one tiny net; returns (weights, record, what the log says)."""
    folder = tmp_path_factory.mktemp("run")
    config = compose_config(
        f"data.root={images}", "data.workers=0", "data.randaugment=null", "model=repmlpnet_tiny", "recipe.epochs=1",
        "recipe.warmup_epochs=0", "recipe.batch_size=4", "recipe.mixup=0", "recipe.cutmix=0", "trainer.accelerator=cpu",
        f"results_dir={folder}/results", f"output_dir={folder}/outputs", name="train",
    )  # fmt: skip
    outcome = execute(config)
    assert outcome.state == "finished", outcome.message
    return next(folder.rglob("model.safetensors")), read_record(Path(outcome.message))


def recalls_by_hand(file: Path, images: Path) -> dict[str, float]:
    from repmlp import load_model

    net = load_model(file)[0].eval()
    img_size = json.loads(load_model(file)[1]["data"])["img_size"]
    data = build_data({"name": "imagenet", "root": images, "img_size": img_size, "interpolation": "bilinear",
                       "workers": 0}, 1, 0, evaluation_only=True)  # fmt: skip
    data.prepare_data()
    data.setup()
    pixels, labels = next(iter(data.whole_evaluation()))
    with torch.no_grad():
        right = net(pixels).argmax(1) == labels
    return {name: 100 * float(right[labels == number].float().mean()) for number, name in enumerate(CLASSES)}


# ---- the record and evaluate.py


def test_a_record_of_uneven_classes_has_recalls_and_no_top5(run, images):
    file, record = run
    assert "top5_pct" not in record and not any("top5" in name for entry in record["curve"] for name in entry)
    expected = recalls_by_hand(file, images)
    assert {each["class"]: each["recall_pct"] for each in record["recall_by_class"]} == pytest.approx(expected)
    assert record["balanced_accuracy_pct"] == pytest.approx(np.mean(list(expected.values())))


def evaluation(file: Path, root: Path, *more: str):
    return settings("evaluate", f"checkpoint={file}", "data=imagenet", f"data.root={root}", "data.workers=0", *more)


def test_evaluation_tells_the_recall_of_uneven_classes(run, images, tmp_path):
    evaluate = script("evaluate")
    (tmp_path / "alone").mkdir()
    shutil.copytree(images / "val", tmp_path / "alone/val")  # train/ is not needed
    results = evaluate.evaluate(evaluation(run[0], tmp_path / "alone"))
    expected = recalls_by_hand(run[0], images)
    assert {each["class"]: each["images"] for each in results["classes"]} == CLASSES
    assert {each["class"]: each["recall_pct"] for each in results["classes"]} == pytest.approx(expected)
    assert results["balanced_accuracy_pct"] == pytest.approx(np.mean(list(expected.values())))
    text = evaluate.table(results)
    assert "top-5" not in text and "top5" not in json.dumps(results)
    assert f"the mean of the recalls: {np.mean(list(expected.values())):.2f} %." in text
    assert "Classes have 1 to 6 images." in text and "| dog, small" in text
    results["classes"] = [{**each, "images": 3} for each in results["classes"]]
    assert "Balanced" not in evaluate.table(results)


def test_calibration_says_that_it_needs_training_images(run, images, tmp_path):
    (tmp_path / "val").symlink_to(images / "val")
    with pytest.raises(FileNotFoundError, match=r"no folder .*train: int8 is calibrated on training images"):
        script("evaluate").evaluate(evaluation(run[0], tmp_path, "precisions=[int8]", "calibration_images=4"))


def test_other_classes_and_other_data_are_refused(run, images, tmp_path):
    evaluate = script("evaluate")
    shutil.copytree(images / "val", tmp_path / "val")
    (tmp_path / "val/emu").rename(tmp_path / "val/gnu")
    with pytest.raises(ValueError, match="trained on other classes: 'emu' there, 'gnu' in the images"):
        evaluate.evaluate(evaluation(run[0], tmp_path))
    with pytest.raises(ValueError, match=r"was trained on data=imagenet.*say data=imagenet"):
        evaluate.evaluate(settings("evaluate", f"checkpoint={run[0]}", "data=patterns"))


def test_many_classes_are_told_by_the_lowest():
    lines = script("evaluate").recall_lines(
        [{"class": str(n), "images": n, "recall_pct": 100.0 - n if n else None} for n in range(30)], 50.0
    )
    rows = [line for line in lines[-1].splitlines() if line.startswith("|")]
    assert len(rows) == 22 and "20 lowest of 30 classes" in lines[1] and rows[2].split("|")[1].strip() == "29"


def test_recalls_are_counted_over_batches():
    recalls = Recalls(3)
    for labels, guesses in (([0, 0, 1], [0, 1, 1]), ([0, 0], [0, 0])):
        recalls.update(nn.functional.one_hot(torch.tensor(guesses), 3).float(), torch.tensor(labels))
    assert [each["recall_pct"] for each in recalls.rows()] == [75.0, 100.0, None] and recalls.balanced() == 87.5
    assert recalls.uneven and recalls.of_record()["balanced_accuracy_pct"] == 87.5
    even = Recalls(2, ["a", "b"])
    even.update(torch.eye(2), torch.arange(2))
    assert not even.uneven and even.of_record() == {}


@pytest.mark.parametrize(("num_classes", "names"), [(2, {"top1"}), (5, {"top1"}), (6, {"top1", "top5"})])
def test_top5_is_measured_where_it_says_something(num_classes, names):
    assert set(accuracy_metrics(num_classes)) == names


def test_progress_is_told_every_few_seconds(monkeypatch):
    clock = iter(range(0, 100, 6))  # seconds: a batch takes six
    monkeypatch.setattr("repmlp.runs.progress.time.perf_counter", lambda: next(clock))
    lines = []
    batches = [([0] * 10,)] * 5
    assert list(told(batches, 50, lines.append)) == batches
    assert lines == ["20 of 50 images, about 18 s left", "40 of 50 images, about 6 s left"]
    clock = iter([0.0] * 10)
    assert len(list(told(batches, 50, lines.append))) == 5 and len(lines) == 2


def test_folders_with_any_name_are_taken_from_where_the_user_stands(tmp_path, monkeypatch):
    monkeypatch.setenv("REPMLP_CWD", str(tmp_path))
    given = [
        "data.root=a b",
        "data.root=../my pets (1)",
        "weights=x=1.pth",
        "data.root=null",
        "data.root='q'",
        "seed=1",
    ]
    assert place_files(given) == [
        f"data.root={tmp_path}/a b",
        f"data.root='{tmp_path}/../my pets (1)'",
        f"weights='{tmp_path}/x=1.pth'",
        *given[3:],
    ]
    (tmp_path / "a,b.pth").touch()
    assert place_files(["weights=null,x=1.pth,old/y.pth", "weights=a,b.pth", "backbone=$F,b", "weights={1}.pth"]) == [
        f"weights=null,'{tmp_path}/x=1.pth',{tmp_path}/old/y.pth",  # a sweep
        f"weights='{tmp_path}/a,b.pth'",  # a file
        "backbone=$F,b",
        f"weights='{tmp_path}/{{1}}.pth'",
    ]
    parsed = settings("train", *place_files(given[:2]))
    assert parsed.data.root == f"{tmp_path}/../my pets (1)" and parsed.data.label == "my pets (1)"


# ---- predict.py


def predictions(file: Path, where: Path, out: Path, *more: str) -> list[dict[str, str]]:
    config = settings("predict", f"checkpoint={file}", "device=cpu", *more)
    config.images, config.out = str(where), str(out)
    script("predict").predict(config)
    with open(out, newline="") as rows:
        return list(csv.DictReader(rows))


def test_predictions_are_those_of_evaluation(run, images, tmp_path):
    """Nested folders; names with commas; the folder of the table is made; an older table is replaced."""
    out = tmp_path / "new/folder/guesses.csv"
    merged, trained = (predictions(run[0], images / "val", out, f"merged={m}", "batch_size=4") for m in (True, False))
    assert [path.name for path in out.parent.iterdir()] == ["guesses.csv"]
    assert [row["image"] for row in merged][:2] == ["cat/0.png", "cat/1.png"] and len(merged) == 10
    right = {name: [] for name in CLASSES}
    for row, other in zip(merged, trained, strict=True):
        p = {name: float(row[f"p({name})"]) for name in CLASSES}
        assert sum(p.values()) == pytest.approx(1, abs=1e-5) and max(p, key=p.get) == row["class"]
        assert float(other["probability"]) == pytest.approx(float(row["probability"]), abs=1e-4)
        right[row["image"].split("/")[0]].append(row["class"] == row["image"].split("/")[0])
    expected = recalls_by_hand(run[0], images)
    assert {name: 100 * np.mean(hits) for name, hits in right.items()} == pytest.approx(expected)


def test_unreadable_images_are_left_out_and_named(run, images, tmp_path, capsys):
    folder = tmp_path / "some (1), of mine"
    shutil.copytree(images / "val", folder)
    (folder / "cat/broken.png").write_bytes(b"no image")
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "notes.txt").write_text("of mine")
    (folder / ".ipynb_checkpoints").mkdir()
    shutil.copy(folder / "cat/0.png", folder / ".ipynb_checkpoints/0.png")
    rows = predictions(run[0], folder, tmp_path / "p.csv", "batch_size=1")
    assert len(rows) == 10 and not any("broken" in row["image"] or ".ipynb" in row["image"] for row in rows)
    told = capsys.readouterr()
    assert told.err.count("left out: ") == 2 and f"{folder}/cat/broken.png is no readable image" in told.err
    assert f"10 of 12 images -> {tmp_path}/p.csv" in told.out
    (tmp_path / "bad").mkdir()
    shutil.copy(folder / "zero.jpg", tmp_path / "bad/zero.jpg")
    before = (tmp_path / "p.csv").read_bytes()
    with pytest.raises(ValueError, match=r"none of 1 image\(s\) could be read"):
        predictions(run[0], tmp_path / "bad", tmp_path / "p.csv")
    assert (tmp_path / "p.csv").read_bytes() == before, "an older table is not lost"


def test_what_is_computed_is_kept_where_something_breaks(run, images, tmp_path, monkeypatch):
    predict = script("predict")
    config = settings("predict", f"checkpoint={run[0]}", "device=cpu", "batch_size=4")
    config.images, config.out = str(images / "val"), str(tmp_path / "p.csv")
    original = predict.batches

    def stops(*arguments):
        yield next(original(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "batches", stops)
    with pytest.raises(KeyboardInterrupt):
        predict.predict(config)
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 1 + 4


def test_kinds_of_images_are_alike(run, images, tmp_path):
    """The same picture as grey, 16 bits, RGBA and turned by the camera gets the same probabilities."""
    grey = np.asarray(Image.open(images / "val/cat/0.png").convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a").mkdir()
    for name, image, how in (
        ("grey", Image.fromarray(grey), {}),
        ("deep", Image.fromarray(grey.astype(np.uint16) << 8), {}),
        ("rgba", Image.fromarray(np.dstack([grey] * 4)), {}),
        ("turned", Image.fromarray(np.ascontiguousarray(np.rot90(grey))), {"exif": exif}),
    ):
        image.save(tmp_path / f"a/{name}.png", **how)
    Image.fromarray(np.dstack([255 - grey] * 3 + [0 * grey]), "CMYK").save(tmp_path / "a/cmyk.tiff")
    rows = predictions(run[0], tmp_path / "a", tmp_path / "p.csv")
    assert len(rows) == 5 and len({(row["class"], row["probability"]) for row in rows}) == 1
    (one,) = predictions(run[0], tmp_path / "a/cmyk.tiff", tmp_path / "q.csv")
    assert one["image"] == "cmyk.tiff" and one["probability"] == rows[0]["probability"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": "nowhere"}, "images=nowhere: there is no such folder or file"),
        ({"images": "EMPTY"}, r"no images in .* and the folders below it \(\.jpg"),
        ({"images": None}, r"which images\? pass images=FOLDER"),
        ({"checkpoint": None}, r"which checkpoint\? pass checkpoint=FILE"),
        ({"out": "photo.png"}, r"out=photo\.png: name a file that ends in \.csv"),
        ({"out": None}, r"out=None: name a file"),
        ({"out": "EMPTY"}, r"name a file that ends in \.csv"),
        ({"batch_size": 0}, "batch_size=0: use a whole number, at least 1"),
        ({"merged": "yes"}, "merged='yes': use true or false"),
    ],
)
def test_mistakes_are_one_line(run, images, tmp_path, change, words):
    config = settings("predict", f"checkpoint={run[0]}")
    config.images, config.out = str(images), str(tmp_path / "p.csv")
    (tmp_path / "empty").mkdir()
    for name, value in change.items():
        config[name] = str(tmp_path / "empty") if value == "EMPTY" else value
    with pytest.raises(ValueError, match=words) as error:
        script("predict").predict(config)
    assert "\n" not in str(error.value) and not (tmp_path / "p.csv").exists()
