"""RandAugment of whole batches against torchvision's on each image alone; its draws; loaders with and without it."""

import pytest
import torch
from conftest import compose_config
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from repmlp.data import build_data
from repmlp.data.patterns import PatternsData, generate
from repmlp.data.rand_augment import GROUPS, OPERATIONS, RandAugment, grey
from repmlp.data.resident import Augmentation, ImageSet, ResidentLoader, augment
from repmlp.randomness import derive_seed
from repmlp.runs.key import run_key

FILL = [129, 124, 112]
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


class OneOperation(v2.RandAugment):
    """torchvision's own transform, left with a single operation to draw from; its sign is still drawn."""

    def __init__(self, name: str, magnitude: int, fill: list[int]):
        super().__init__(1, magnitude, interpolation=InterpolationMode.BILINEAR, fill=fill)
        self._AUGMENTATION_SPACE = {name: v2.RandAugment._AUGMENTATION_SPACE[name]}


@pytest.fixture
def torchvision_on(monkeypatch):
    """Return a function that has torchvision do the operation of a code on one image (3, H, W)."""

    def one(image: Tensor, code: int, magnitude: int, fill: list[int] = FILL) -> Tensor:
        with monkeypatch.context() as patched:  # a draw up to 0.5 makes the magnitude negative
            patched.setattr(torch, "rand", lambda *args, **kwargs: torch.tensor((0.75, 0.25)[code % 2]))
            return OneOperation(OPERATIONS[code // 2], magnitude, fill)(image)

    return one


def pictures(height: int = 32, width: int = 32) -> Tensor:
    """Six images: noise, a generated pattern, smooth, low in contrast, of one colour, of two values."""
    noise = torch.randint(0, 256, (3, 3, height, width), dtype=torch.uint8)
    pattern = v2.functional.resize(generate(100, 0, "train").images[0], [height, width])
    smooth = torch.linspace(0, 255, height * width).view(height, width).expand(3, -1, -1).to(torch.uint8)
    one_colour = torch.tensor([7, 77, 177], dtype=torch.uint8)[:, None, None].expand_as(smooth)
    return torch.stack(
        [noise[0], pattern, smooth, noise[1] // 8 + 100, one_colour, (noise[2] > 128) * noise.new_tensor(255)]
    )


def chi_squared(codes: Tensor, outcomes: int) -> float:
    expected = codes.numel() / outcomes
    return float(((codes.flatten().bincount(minlength=outcomes) - expected) ** 2 / expected).sum())


# ---- the operations


def test_the_operations_are_torchvisions():
    assert tuple(v2.RandAugment._AUGMENTATION_SPACE) == OPERATIONS and len(GROUPS) == 2 * len(OPERATIONS) == 28


@pytest.mark.parametrize("code", range(28), ids=lambda code: f"{OPERATIONS[code // 2]}{'+-'[code % 2]}")
@pytest.mark.parametrize("size", [(32, 32), (24, 37)], ids=["square", "oblong"])
def test_an_operation_on_a_batch_is_torchvisions_on_each_image(torchvision_on, code, size):
    images = pictures(*size)
    before = images.clone()
    for magnitude in (0, 1, 9, 15, 27, 30):
        ours = RandAugment(magnitude, size, FILL).apply(images, torch.full((len(images),), code))
        assert ours.dtype == torch.uint8
        for image, out in zip(images, ours, strict=True):
            assert torch.equal(out, torchvision_on(image, code, magnitude)), magnitude
    assert torch.equal(images, before), "the images of the data set were written to"


def test_each_image_of_a_batch_goes_through_its_own_two(torchvision_on):
    images = pictures().repeat(20, 1, 1, 1)
    ours = RandAugment(9, (32, 32), FILL)
    drawn = ours.draw(len(images), torch.Generator().manual_seed(1))
    out = ours(images, torch.Generator().manual_seed(1))
    assert len(drawn.unique()) == 28
    for image, first, second, augmented in zip(images, *drawn.tolist(), out, strict=True):
        assert torch.equal(augmented, torchvision_on(torchvision_on(image, first, 9), second, 9))


def test_batches_of_one_and_of_one_kind_go_through():
    """Groups without an image are no trouble, nor is a batch that is all one group."""
    ours, generator = RandAugment(9, (32, 32), FILL), torch.Generator().manual_seed(0)
    assert all(ours(pictures()[:1], generator).shape == (1, 3, 32, 32) for _ in range(50))


def test_the_fill_is_the_mean_colour():
    assert grey((0.485, 0.456, 0.406)) == [124, 116, 104]
    ours = RandAugment(30, (32, 32), [1, 2, 3])
    right = 2 * OPERATIONS.index("TranslateX")
    out = ours.apply(pictures()[:1], torch.tensor([right]))  # by 14 pixels
    assert torch.equal(out[0, :, :, :14], torch.tensor([1, 2, 3])[:, None, None].expand(3, 32, 14))


def test_every_operation_and_pair_is_drawn_alike():
    """Chi-squared, p = 0.001: 28 codes, df 27, at 55.5; 784 pairs of codes, df 783, at 910."""
    drawn = RandAugment.draw(50_000, torch.Generator().manual_seed(3))
    assert drawn.shape == (2, 50_000)
    assert chi_squared(drawn, 28) < 55.5 and chi_squared(28 * drawn[0] + drawn[1], 784) < 910


def test_no_value_of_an_image_is_read_back():
    """Tensors of the meta device have no values: reading one back, to the host, raises."""
    ours = RandAugment(9, (32, 32), FILL, "meta")
    assert ours(torch.empty(128, 3, 32, 32, dtype=torch.uint8, device="meta"), torch.Generator()).shape[0] == 128


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
def test_the_gpu_is_never_waited_for_and_agrees():
    images = generate(200, 0, "train").images
    there, ours = images.cuda(), RandAugment(9, (32, 32), FILL, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = ours(there, torch.Generator().manual_seed(0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = RandAugment(9, (32, 32), FILL)(images, torch.Generator().manual_seed(0))
    assert float((out.cpu() != expected).float().mean()) < 0.02  # a sum may be rounded otherwise


@pytest.mark.parametrize("magnitude", [-1, 31, 9.0, True, "9"])
def test_a_bad_magnitude_is_refused_in_one_line(tmp_path, magnitude):
    with pytest.raises(ValueError, match=r"^data\.randaugment=.*: use a magnitude from 0 to 30, or null for none$"):
        build_data({"name": "cifar100", "root": tmp_path, "randaugment": magnitude}, 10, 0)


# ---- in the loaders


def loader(images: Tensor | None = None, **kwargs) -> ResidentLoader:
    if images is None:
        images = generate(100, 0, "train").images[:48]
    options = {"train": True, "augmentation": Augmentation(4, True, 9), "seed": 7, **kwargs}
    return ResidentLoader(ImageSet(images, torch.arange(len(images))), 16, MEAN, STD, **options)


def batches(**kwargs) -> list[Tensor]:
    ours = loader(**kwargs)
    ours.sampler.set_epoch(2)
    return [images for images, _ in ours]


@pytest.mark.parametrize("rank", [0, 1])
def test_without_it_a_loader_yields_what_it_always_did(rank):
    """The seeds are spelt out here: other ones would make runs of before irreproducible."""
    ours = loader(augmentation=Augmentation(4, True), rank=rank, world_size=2)
    order = ours.sampler.order(48)[rank::2]
    expected = []
    for step in range(3):
        generator = torch.Generator().manual_seed(derive_seed(7, "augment", 0, step, rank))
        images = augment(ours.data.images[order[8 * step :][:8]], Augmentation(4, True), generator)
        expected.append(images * ours.scale + ours.shift)
    for (images, _), wanted in zip(ours, expected, strict=True):
        assert torch.equal(images, wanted)


def test_it_comes_after_the_same_crop_and_flip(torchvision_on):
    ours = loader()
    order = ours.sampler.order(48)
    for step, (images, labels) in enumerate(ours):
        generator = torch.Generator().manual_seed(derive_seed(7, "augment", 0, step, 0))
        cropped = augment(ours.data.images[order[16 * step :][:16]], Augmentation(4, True), generator)
        drawn = RandAugment.draw(16, torch.Generator().manual_seed(derive_seed(7, "randaugment", 0, step, 0)))
        grey = [128, 102, 76]  # of MEAN
        for k, (first, second) in enumerate(drawn.T.tolist()):
            wanted = torchvision_on(torchvision_on(cropped[k], first, 9, grey), second, 9, grey)
            assert torch.equal(images[k], (wanted * ours.scale + ours.shift)[0])
        assert torch.equal(labels, order[16 * step :][:16])


def test_draws_are_a_function_of_seed_epoch_step_and_rank():
    """All images are the same one, uncropped: only what RandAugment draws can tell batches apart."""
    same = {"images": pictures()[1:2].repeat(48, 1, 1, 1), "augmentation": Augmentation(randaugment=9)}
    first = batches(**same)
    assert len(first) == 3 and all(torch.equal(a, b) for a, b in zip(first, batches(**same), strict=True))
    next_epoch = loader(**same)
    next_epoch.sampler.set_epoch(3)
    others = [images for images, _ in next_epoch] + batches(**same, seed=8)
    shares = [batches(**same, rank=rank, world_size=2) for rank in (0, 1)]
    for found in ([*first, *others], [*shares[0], *shares[1]]):
        assert not any(torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    assert len(first[0].unique(dim=0)) > 8, "images of a batch share their draws"


def test_evaluation_is_never_augmented():
    how = {"n_train": 200, "n_test": 100, "batch_size": 50}
    plain, ours = PatternsData(**how), PatternsData(**how)
    ours.augmentation = Augmentation(randaugment=9)
    for data in (plain, ours):
        data.setup()
    for name in ("val_dataloader", "whole_evaluation"):
        for (a, _), (b, _) in zip(getattr(plain, name)(), getattr(ours, name)(), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(next(iter(plain.calibration(80)))[0], next(iter(ours.calibration(80)))[0])
    assert not torch.equal(next(iter(plain.train_dataloader()))[0], next(iter(ours.train_dataloader()))[0])


def test_null_leaves_a_runs_key_alone():
    config = compose_config("data=cifar100")
    key = run_key(config)
    assert config["data"].pop("randaugment") is None and run_key(config) == key
    config["data"]["randaugment"] = 9
    assert run_key(config) != key
    assert build_data(config["data"], 128, 0).augmentation == Augmentation(4, True, 9)
