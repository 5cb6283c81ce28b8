"""The data sets: augmentation against torchvision, order as a function of seed and epoch, errors, the generated set."""

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from torchvision.datasets import CIFAR100

from repmlp.data import build_data
from repmlp.data.base import split_per_class
from repmlp.data.cifar100 import CIFAR100Data
from repmlp.data.patterns import PatternsData, arrangements, generate, moved_round, textures
from repmlp.data.resident import Augmentation, ImageSet, ResidentLoader, augment

REAL = os.environ.get("REPMLP_DATA")


def counted_image() -> torch.Tensor:
    """An image (3, 32, 32) whose pixels are all different and never 0."""
    return (1 + torch.arange(3 * 32 * 32)).float().view(3, 32, 32)


def read_off(out: torch.Tensor) -> tuple[int, int, bool]:
    """Read the crop's (dy, dx) and the flip off an augmented counted image."""
    value, beside = int(out[0, 16, 16]) - 1, int(out[0, 16, 17]) - 1
    flipped = beside < value
    return value // 32 - 16 + 4, value % 32 - (15 if flipped else 16) + 4, flipped


def test_augment_is_a_crop_and_a_flip_for_each_image():
    image = counted_image()
    out = augment(image.repeat(200, 1, 1, 1), Augmentation(4, True), torch.Generator().manual_seed(1))
    seen = set()
    for one in out:
        dy, dx, flipped = read_off(one)
        expected = TF.crop(TF.pad(image, [4]), dy, dx, 32, 32)
        assert torch.equal(one, TF.horizontal_flip(expected) if flipped else expected)
        seen.add((dy, dx, flipped))
    assert len(seen) > 100


def test_augment_draws_every_crop_and_flip_alike():
    """Chi-squared over the 9 x 9 x 2 outcomes of RandomCrop(32, padding=4) and a flip; df 161, p = 0.001 at 222."""
    n = 16200
    out = augment(counted_image()[:1].repeat(n, 1, 1, 1), Augmentation(4, True), torch.Generator().manual_seed(2))
    counts = torch.zeros(9, 9, 2)
    for one in out:
        dy, dx, flipped = read_off(one)
        counts[dy, dx, int(flipped)] += 1
    assert float(((counts - 100) ** 2 / 100).sum()) < 222


def test_augment_can_be_off():
    images = torch.randn(5, 3, 8, 8)
    assert torch.equal(augment(images, Augmentation(), torch.Generator()), images)


def loader(**kwargs) -> ResidentLoader:
    torch.manual_seed(3)
    data = ImageSet(torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8), torch.arange(50))
    options = {"train": True, "augmentation": Augmentation(2, True), "seed": 7, **kwargs}
    return ResidentLoader(data, 8, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), **options)


def test_an_epoch_is_a_function_of_seed_and_epoch():
    first, again, other = loader(), loader(), loader(seed=8)
    for each in (first, again, other):
        each.sampler.set_epoch(3)
    list(other)
    for (x, y), (u, v) in zip(first, again, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)
    assert not torch.equal(next(iter(first))[1], next(iter(other))[1])
    again.sampler.set_epoch(4)
    assert not torch.equal(next(iter(first))[1], next(iter(again))[1])


def test_training_drops_the_last_partial_batch_and_never_repeats():
    labels = torch.cat([y for _, y in loader()])
    assert len(loader()) == 6 and len(labels) == 48 == len(set(labels.tolist()))


def test_ranks_share_an_epoch_without_overlap():
    parts = [torch.cat([y for _, y in loader(rank=r, world_size=2)]).tolist() for r in (0, 1)]
    assert len(parts[0]) == len(parts[1]) == 24 and not set(parts[0]) & set(parts[1])


def test_evaluation_is_in_order_whole_and_normalised():
    plain = loader(train=False)
    images = torch.cat([x for x, _ in plain])
    assert torch.equal(torch.cat([y for _, y in plain]), torch.arange(50))
    expected = TF.normalize(plain.data.images.float() / 255, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)


def test_split_per_class_takes_the_same_of_each():
    labels = torch.arange(5).repeat(20)[torch.randperm(100)]
    first, rest = split_per_class(labels, 5, 0.9)
    assert torch.bincount(labels[first]).tolist() == [18] * 5
    assert sorted([*first.tolist(), *rest.tolist()]) == list(range(100))


# ---- CIFAR-100


@pytest.fixture
def release(tmp_path, monkeypatch) -> Path:
    """A small set in the release's own format, whose MD5 sums torchvision is told."""
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    sums = {}
    for name, n in (("train", 300), ("test", 100)):
        pixels = np.random.default_rng(0).integers(0, 256, (n, 3072), dtype=np.uint8)
        content = {"data": pixels, "fine_labels": [i % 100 for i in range(n)]}
        (folder / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [str(i) for i in range(100)]}))
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    md5 = hashlib.md5((folder / "meta").read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": md5})
    return tmp_path


def test_cifar_is_read_whole(release):
    data = CIFAR100Data(release, batch_size=10)
    data.prepare_data()
    data.setup()
    original = CIFAR100(release, train=True)
    assert data.train_set.images.dtype == torch.uint8 and data.train_set.images.shape == (300, 3, 32, 32)
    assert torch.equal(data.train_set.images[7], TF.pil_to_tensor(original[7][0]))
    assert data.eval_set.labels.tolist() == list(range(100))


def test_cifar_subset_and_holdout(release):
    data = build_data({"name": "cifar100", "root": release, "n_train": 100, "holdout": 1 / 3}, 10, 0)
    data.setup()
    assert torch.bincount(data.train_set.labels).tolist() == [1] * 100
    assert torch.bincount(data.eval_set.labels).tolist() == [1] * 100
    test_images = {image.numpy().tobytes() for image in data.load()[1].images}
    assert not any(image.numpy().tobytes() in test_images for image in data.eval_set.images)


@pytest.mark.parametrize("n_eval", [49, 100])
def test_cifar_is_evaluated_on_exactly_n_eval_images_and_names_its_classes(release, n_eval):
    data = build_data({"name": "cifar100", "root": release, "n_eval": n_eval}, 10, 0)
    data.setup()
    assert data.n_images == (300, n_eval) == (300, sum(len(labels) for _, labels in data.whole_evaluation()))
    assert data.info.class_names == tuple(str(i) for i in range(100)) and CIFAR100Data.info.class_names == ()


def test_cifar_absent_names_the_remedy(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"download=false.*data\.root=FOLDER.*REPMLP_DATA.*data=patterns"):
        CIFAR100Data(tmp_path / "none", download=False).prepare_data()
    (tmp_path / "empty" / "cifar-100-python").mkdir(parents=True)
    monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:9/cifar-100-python.tar.gz")
    with pytest.raises(FileNotFoundError, match=r"download failed.*data=patterns"):
        CIFAR100Data(tmp_path / "empty").prepare_data()


def test_cifar_damaged_is_refused_before_it_is_unpickled(release):
    path = release / "cifar-100-python" / "train"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"MD5 differs.*remove that folder.*data=patterns"):
        CIFAR100Data(release).setup()


def test_impossible_sizes_are_refused(release):
    with pytest.raises(ValueError, match=r"data\.n_train=301: there are 300"):
        CIFAR100Data(release, n_train=301).setup()
    with pytest.raises(ValueError, match="300 training images are less than one batch of 400"):
        CIFAR100Data(release, batch_size=400).setup()
    with pytest.raises(ValueError, match=r"data\.holdout=1\.5"):
        CIFAR100Data(release, holdout=1.5)
    with pytest.raises(ValueError, match="unknown data set 'mnist'"):
        build_data({"name": "mnist"}, 1, 0)
    with pytest.raises(ValueError, match=r"data\.colour=1: patterns has no such setting"):
        build_data({"name": "patterns", "colour": 1}, 1, 0)


@pytest.mark.skipif(
    REAL is None or not Path(REAL, "cifar-100-python").is_dir(),
    reason="REPMLP_DATA names no folder with the real CIFAR-100",
)
def test_real_cifar_has_the_stated_statistics():
    data = CIFAR100Data(REAL, download=False)
    data.prepare_data()
    data.setup()
    pixels = data.train_set.images.float() / 255
    assert len(pixels) == 50_000 and len(data.eval_set.labels) == 10_000
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.tensor(data.info.mean), rtol=0, atol=1e-4)
    torch.testing.assert_close(pixels.std((0, 2, 3)), torch.tensor(data.info.std), rtol=0, atol=1e-4)


# ---- patterns


def test_patterns_are_deterministic_and_balanced():
    a, b, c = generate(400, 0, "train"), generate(400, 0, "train"), generate(400, 1, "train")
    assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert not torch.equal(a.images, c.images)
    assert not torch.equal(a.images, generate(400, 0, "test").images)
    assert torch.bincount(a.labels).tolist() == [4] * 100


def test_patterns_have_the_stated_statistics():
    pixels = generate(2000, 0, "train").images.float() / 255
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.tensor(PatternsData.info.mean), rtol=0, atol=0.02)
    torch.testing.assert_close(pixels.std((0, 2, 3)), torch.tensor(PatternsData.info.std), rtol=0, atol=0.015)


def nearest_mean_accuracy(train: torch.Tensor, y: torch.Tensor, test: torch.Tensor, z: torch.Tensor) -> float:
    """Classify by the nearest class mean of the features."""
    means = torch.stack([train[y == label].mean(0) for label in range(10)])
    return float((torch.cdist(test, means).argmin(1) == z).float().mean())


def local_statistics(images: torch.Tensor) -> torch.Tensor:
    """Products of neighbouring pixels, averaged over the map: all that local filters see of order 2."""
    grey = images.float()
    grey = grey - grey.mean((2, 3), keepdim=True)
    shifts = [(0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (2, 0), (2, 1), (2, -1), (1, 2), (1, -2), (2, 2), (2, -2)]
    products = [(grey * grey.roll(shift, (2, 3))).mean((1, 2, 3)) for shift in shifts]
    return torch.stack(products, 1) / grey.square().mean((1, 2, 3)).unsqueeze(1)


def cell_energy(images: torch.Tensor) -> torch.Tensor:
    """Energy in each of the 4 x 4 cells, as a share: where something is, not what."""
    grey = images.float()
    grey = grey - grey.mean((2, 3), keepdim=True)
    energy = torch.nn.functional.avg_pool2d(grey.square().sum(1, keepdim=True), 8).flatten(1)
    return energy / energy.sum(1, keepdim=True)


def test_each_half_of_a_pattern_needs_its_own_kind_of_layer():
    train, test = generate(3000, 0, "train"), generate(1000, 0, "test")

    def accuracy(features, part):
        return nearest_mean_accuracy(
            features(train.images), part(train.labels), features(test.images), part(test.labels)
        )

    def texture(labels):
        return labels // 10

    def arrangement(labels):
        return labels % 10

    def pixels(images):
        return images.float().flatten(1)

    assert accuracy(local_statistics, texture) > 0.6, "local statistics tell textures apart"
    assert accuracy(pixels, texture) < 0.2, "no position-wise template does"
    assert accuracy(local_statistics, arrangement) < 0.2, "local statistics do not tell arrangements apart"
    assert accuracy(cell_energy, arrangement) > 0.9, "a global view does"
    assert accuracy(cell_energy, texture) < 0.2


def test_shifted_patterns_are_the_same_but_for_where_the_arrangement_is():
    aligned, shifted = (generate(1000, 0, "train", shift) for shift in (0, 16))
    assert torch.equal(aligned.labels, shifted.labels) and not torch.equal(aligned.images, shifted.images)
    assert torch.equal(arrangements(0), arrangements(0, shifted=True))
    assert nearest_mean_accuracy(
        cell_energy(aligned.images), aligned.labels % 10, cell_energy(aligned.images), aligned.labels % 10
    ) > 0.9  # fmt: skip
    test = generate(500, 0, "test", 16)
    found = nearest_mean_accuracy(
        cell_energy(shifted.images), shifted.labels % 10, cell_energy(test.images), test.labels % 10
    )
    assert found < 0.2, "position tells nothing"


def test_maps_are_moved_round_their_edges():
    maps, offsets = torch.arange(24.0).view(2, 3, 4), torch.tensor([[1, -1], [0, 6]])
    expected = torch.stack([m.roll(tuple(o.tolist()), (0, 1)) for m, o in zip(maps, offsets, strict=True)])
    assert torch.equal(moved_round(maps, offsets), expected)


def test_no_arrangement_is_another_one_moved():
    for seed in (0, 37, 63):
        masks = arrangements(seed, shifted=True)
        for i, mask in enumerate(masks):
            moved = [mask.roll((8 * y, 8 * x), (0, 1)) for y in range(4) for x in range(4)]
            assert not any(torch.equal(m, other) for m in moved for other in masks[i + 1 :])
        same = torch.equal(arrangements(seed), masks)
        assert same == (seed == 0), "in 37 and 63 the rule has been at work"


@pytest.mark.parametrize(("answer", "whole"), [("texture", lambda y: y // 10), ("arrangement", lambda y: y % 10)])
def test_a_half_of_the_label_can_be_asked_for(answer, whole):
    both, half = (PatternsData(n_train=200, n_test=100, answer=a) for a in ("both", answer))
    both.setup()
    half.setup()
    assert half.info.num_classes == 10 and not half.info.parts and both.info.num_classes == 100
    assert torch.bincount(half.train_set.labels).tolist() == [20] * 10
    at = {
        image.numpy().tobytes(): int(y) for image, y in zip(both.train_set.images, both.train_set.labels, strict=True)
    }
    assert all(
        int(whole(at[image.numpy().tobytes()])) == int(y)
        for image, y in zip(half.train_set.images, half.train_set.labels, strict=True)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shift": 17}, r"data\.shift=17: use at most 16 pixels"),
        ({"shift": -1}, r"data\.shift=-1"),
        ({"shift": 1.5}, r"data\.shift=1\.5"),
        ({"answer": "colour"}, r"data\.answer='colour': use both, texture or arrangement"),
    ],
)
def test_shifts_and_answers_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        build_data({"name": "patterns", **settings}, 1, 0)


def test_textures_and_masks_are_as_described():
    kernels, masks = textures(0), arrangements(0)
    torch.testing.assert_close(kernels.sum((1, 2, 3)), torch.zeros(10), atol=1e-6, rtol=0)
    torch.testing.assert_close(kernels.square().sum((1, 2, 3)), torch.ones(10))
    assert (masks == 1).sum((1, 2)).tolist() == [512] * 10 and len({m.numpy().tobytes() for m in masks}) == 10
    with pytest.raises(ValueError, match=r"data\.n_train=0"):
        PatternsData(n_train=0)
