"""Images in folders: which files count, damaged ones are named, every kind of image is read as a viewer shows it."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_camvid
from PIL import Image

from repmlp.data import DATASETS, SEGMENTATION, build_data, build_segmentation_data
from repmlp.data.camvid import CamVidData
from repmlp.data.files import digest, images_below, is_ours, read_image, read_rgb
from repmlp.data.imagenet import ImageFolderData, fingerprint
from repmlp.runs.run import one_line


def png(*chunks: tuple[bytes, bytes], spoil: int | None = None) -> bytes:
    """Write a PNG of 8x8 grey pixels with more chunks after its header; spoil: the byte to change."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)), *chunks]
    parts += [(b"IDAT", zlib.compress(b"\0" * 72)), (b"IEND", b"")]
    content = bytearray(b"\x89PNG\r\n\x1a\n")
    for kind, body in parts:
        content += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    if spoil is not None:
        content[spoil] ^= 0xFF
    return bytes(content)


DAMAGED = {
    "text": b"no picture",
    "broken second chunk": png((b"tEXt", b"a\0b"), spoil=37),
    "large text chunk": png((b"zTXt", b"a\0\0" + zlib.compress(b" " * (1 << 20) + b" "))),
    "cut off": png()[:46],
    "zero bytes": b"",
}


@pytest.mark.parametrize("how", DAMAGED)
@pytest.mark.parametrize("read", [read_image, read_rgb])
def test_a_damaged_image_is_named_once_in_one_line(tmp_path, how, read):
    path = tmp_path / "a.png"
    path.write_bytes(png())
    assert read(path).size == (8, 8)
    path.write_bytes(DAMAGED[how])
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value).startswith(f"{path} is no readable image: replace it or remove it ("), error.value
    assert "\n" not in str(error.value) and str(error.value).count("a.png") == 1


def write_folder(root: Path, n: int = 3, parts: tuple[str, ...] = ("train", "val")) -> Path:
    for part in parts:
        for name in ("cat", "dog, small"):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                Image.new("RGB", (12, 10), (20 * i, 50, 90)).save(root / part / name / f"{i}.png")
    return root


@pytest.mark.parametrize(("how", "workers"), [*((how, 0) for how in DAMAGED), ("large text chunk", 1)])
@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_every_loader_names_a_damaged_image(tmp_path, how, workers, task):
    if task == "classification":
        root = write_folder(tmp_path)
        bad = [root / "train/cat/1.png", root / "val/cat/1.png"]
        data = ImageFolderData(root, 16, 6, workers=workers)
    else:
        root = write_camvid(tmp_path)
        bad = [root / "CamVid/train/a1.png", root / "CamVid/testannot/a1.png"]
        data = CamVidData(root, 6, (32, 32), workers=workers)
    for path in bad:
        path.write_bytes(DAMAGED[how])
    data.prepare_data()
    data.setup()
    loaders = [data.train_dataloader(), data.whole_evaluation()]
    if task == "classification":
        loaders, bad = [*loaders, data.calibration(6)], [*bad, bad[0]]
    for loader, path in zip(loaders, bad, strict=True):
        with pytest.raises(ValueError) as error:
            list(loader)
        line = one_line(error.value)
        assert line.startswith(f"{path} is no readable image: replace it or remove it"), line


GRADIENT = np.add.outer(np.arange(8), np.arange(6)).astype(np.uint8) * 18  # (8, 6), 0 to 216


def kinds() -> dict[str, tuple[Image.Image, np.ndarray, dict]]:
    """Return name -> (image, its RGB as it should be, arguments of save)."""
    grey = np.repeat(GRADIENT[..., None], 3, axis=2)
    colour = np.stack([GRADIENT, 255 - GRADIENT, GRADIENT // 2], axis=2)
    deep = GRADIENT.astype(np.uint16) << 8 | 0x80
    alpha = np.dstack([colour, GRADIENT])
    palette = Image.fromarray(GRADIENT // 18, "L").convert("P")
    palette.putpalette([value for index in range(256) for value in (index, 2 * index % 256, 7)])
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: a viewer shows it 90 degrees clockwise
    return {
        "grey.png": (Image.fromarray(GRADIENT), grey, {}),
        "16 bit.png": (Image.fromarray(deep), grey, {}),
        "16 bit.tiff": (Image.fromarray(deep), grey, {}),
        "32 bit.tiff": (Image.fromarray(deep.astype(np.int32)), grey, {}),
        "rgba.png": (Image.fromarray(alpha), colour, {}),
        "grey and alpha.png": (Image.fromarray(alpha[..., [0, 3]]), grey, {}),
        "palette.png": (palette, np.stack([GRADIENT // 18, GRADIENT // 9, np.full_like(GRADIENT, 7)], 2),
                        {"transparency": bytes(range(256))}),
        "cmyk.tiff": (Image.fromarray(np.dstack([255 - colour, np.zeros_like(GRADIENT)]), "CMYK"), colour, {}),
        "turned.png": (Image.fromarray(colour), np.rot90(colour, -1), {"exif": exif}),
        "turned.tiff": (Image.fromarray(colour), np.rot90(colour, -1), {"exif": exif}),
        "turned.webp": (Image.fromarray(colour), np.rot90(colour, -1), {"exif": exif, "lossless": True}),
    }  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", kinds())
def test_an_image_is_read_as_a_viewer_shows_it(tmp_path, name):
    image, expected, how = kinds()[name]
    image.save(tmp_path / name, **how)
    found = read_rgb(tmp_path / name)
    assert found.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_numbers_without_a_range_are_refused(tmp_path):
    for mode in (np.float32, np.int32):
        Image.fromarray((GRADIENT * 1e6).astype(mode)).save(tmp_path / "a.tiff")
        with pytest.raises(ValueError, match=r"a\.tiff is no readable image.*\(its numbers"):
            read_rgb(tmp_path / "a.tiff")


def test_hidden_files_and_other_files_do_not_count(tmp_path):
    root = write_folder(tmp_path / "images")
    before = ImageFolderData(root, 16, 2, workers=0)
    before.prepare_data()
    before.setup()
    print_before = fingerprint(root)
    for part in ("train", "val"):
        for folder in (root / part / ".ipynb_checkpoints", root / part / "cat/.ipynb_checkpoints"):
            folder.mkdir()
            (folder / "0-checkpoint.png").write_bytes(png())
        (root / part / "cat/._0.png").write_bytes(b"of another system")
        (root / part / "cat/notes.txt").write_text("seen")
    after = ImageFolderData(root, 16, 2, workers=0)
    after.prepare_data()
    after.setup()
    assert after.info.class_names == ("cat", "dog, small") and after.n_images == before.n_images == (6, 6)
    assert fingerprint(root) == print_before
    assert [path.as_posix() for path in images_below(root / "val")] == sorted(
        f"{name}/{i}.png" for name in ("cat", "dog, small") for i in range(3)
    )
    assert is_ours(Path("a/b.JPG")) and not is_ours(Path(".a/b.jpg")) and not is_ours(Path("a/.b.jpg"))
    camvid = write_camvid(tmp_path / "video")
    for folder in ("train", "trainannot"):
        (camvid / "CamVid" / folder / "._a0.png").write_bytes(b"of another system")
        (camvid / "CamVid" / folder / ".ipynb_checkpoints").mkdir()
    data = CamVidData(camvid, 4, (32, 32), workers=0)
    data.prepare_data()
    data.setup()
    assert data.n_images == (6, 4)


def test_evaluation_needs_no_training_images(tmp_path):
    """But int8's scales do, and the message says so."""
    settings = {"name": "imagenet", "root": write_folder(tmp_path / "a", parts=("val",)), "img_size": 16, "workers": 0}
    data = build_data(settings, 4, 0, evaluation_only=True)
    data.prepare_data()
    data.setup()
    assert data.n_images == (0, 6) and sum(len(labels) for _, labels in data.whole_evaluation()) == 6
    with pytest.raises(FileNotFoundError, match=r"no folder .*train: int8 takes its scales from training images"):
        data.calibration(4)
    for more in ({"holdout": 0.5}, {}):
        data = build_data({**settings, **more}, 4, 0, evaluation_only=bool(more))
        with pytest.raises(FileNotFoundError, match=r"no folder .*train: pass data\.root"):
            data.prepare_data()
    write_folder(tmp_path / "a", parts=("train",))
    data = build_data(settings, 4, 0, evaluation_only=True)
    data.prepare_data()
    data.setup()
    assert data.n_images == (0, 6) and sum(len(labels) for _, labels in data.calibration(4)) == 4


def test_segmentation_is_evaluated_without_training_images(tmp_path):
    root = write_camvid(tmp_path, train=0)
    data = build_segmentation_data(
        {"name": "camvid", "root": root, "crop_size": [32, 32], "workers": 0}, 4, 0, evaluation_only=True
    )
    for folder in ("train", "trainannot"):
        (root / "CamVid" / folder).rmdir()
    data.prepare_data()
    data.setup()
    assert data.n_images == (0, 4) and len(list(data.whole_evaluation())) == 4


def test_copies_of_camvid_are_told_apart(tmp_path, monkeypatch):
    """By the files of the parts in use; the copy that the first records were made of has no fingerprint."""
    root = write_camvid(tmp_path / "one")
    settings = {"name": "camvid", "label": "x", "root": root, "crop_size": [32, 32]}
    ours, held = CamVidData.fingerprint(settings), CamVidData.fingerprint({**settings, "holdout": 0.5})
    assert len({ours, held, None}) == 3
    again = write_camvid(tmp_path / "two")
    for place in (again, again / "CamVid"):
        assert CamVidData.fingerprint({**settings, "root": place}) == ours
    parts = {
        part: digest(
            sorted((f"{p.parent.name}/{p.name}", p) for folder in (part, f"{part}annot")
                   for p in (root / "CamVid" / folder).iterdir())
        )
        for part in ("train", "test")
    }  # fmt: skip
    monkeypatch.setattr(CamVidData, "first_copy", parts)
    assert CamVidData.fingerprint(settings) is None
    Image.new("RGB", (9, 9)).save(again / "CamVid/test/a1.png")
    assert CamVidData.fingerprint({**settings, "root": again}) is not None
    assert CamVidData.fingerprint({**settings, "root": tmp_path / "none"}) is None, "what has a record needs no files"


def amounts(settings: dict, tmp_path: Path) -> dict:
    folders = {"imagenet": write_folder, "camvid": write_camvid}
    known = {
        "patterns": {"n_train": 200, "n_test": 100},
        "imagenet": {"img_size": 16, "workers": 0, "randaugment": None},
        "camvid": {"crop_size": [32, 32], "workers": 0},
    }
    name = settings["name"]
    root = {"root": folders[name](tmp_path)} if name in folders else {}
    return {**settings, **known[name], **root}


@pytest.mark.parametrize("name", ["patterns", "imagenet", "camvid"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("holdout", [0.0, 0.6])
def test_exactly_n_eval_images_are_evaluated(tmp_path, name, n, holdout):
    """CIFAR-100, which shares its base with the patterns, is tested in test_data.py."""
    build = build_data if name in DATASETS else build_segmentation_data
    data = build(amounts({"name": name, "n_eval": n, "holdout": holdout}, tmp_path), 2, 0)
    data.prepare_data()
    data.setup()
    assert data.n_images[1] == n == sum(len(each[1]) for each in data.whole_evaluation())


@pytest.mark.parametrize("wanted", [150, 49, 100])
def test_exactly_as_many_patterns_as_asked(wanted):
    data = build_data({"name": "patterns", "n_train": wanted, "n_test": wanted}, 10, 0)
    data.setup()
    assert data.n_images == (wanted, wanted)
    counts = torch.bincount(data.train_set.labels, minlength=100)
    assert counts.max() - counts.min() <= 1


def test_every_data_set_takes_n_eval_and_has_its_file_of_defaults():
    from conftest import ROOT
    from omegaconf import OmegaConf

    files = {file.stem: OmegaConf.load(file) for file in (ROOT / "experiments/conf/data").glob("*.yaml")}
    assert files.keys() == DATASETS.keys() | SEGMENTATION.keys()
    for name, settings in files.items():
        assert settings.name == name and "n_eval" in settings and "n_train" in settings
