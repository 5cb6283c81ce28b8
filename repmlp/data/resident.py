"""Image sets that live on the training device as one uint8 tensor, augmented there in batches.

No worker processes: a CIFAR-sized set is 150 MB, and cropping a batch by indexing costs less than decoding one image.
Every random draw is a function of (seed, epoch, step).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repmlp.data.base import (
    DataInfo,
    DataSet,
    EpochSampler,
    first_of_classes,
    place,
    share_of_batch,
    spread_over_classes,
)
from repmlp.data.rand_augment import RandAugment, check_magnitude, grey
from repmlp.randomness import derive_seed


@dataclass
class ImageSet:
    """Images (N, 3, H, W) uint8 and labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def subset(self, indices: Tensor) -> ImageSet:
        return ImageSet(self.images[indices], self.labels[indices])

    def to(self, device: torch.device) -> ImageSet:
        return ImageSet(self.images.to(device), self.labels.to(device))


@dataclass
class Augmentation:
    """Zero-pad by `pad` pixels on every side, crop back at a random place, flip left-right with probability 1/2.

    randaugment: magnitude of RandAugment, done after crop and flip; None for none.
    Raises ValueError for a magnitude out of range.
    """

    pad: int = 0
    flip: bool = False
    randaugment: int | None = None

    def __post_init__(self) -> None:
        check_magnitude(self.randaugment)


def augment(images: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Crop and flip every image of a batch on its own: (B, 3, H, W) -> (B, 3, H, W), any dtype.

    The same distribution as torchvision's RandomCrop(H, padding=pad) and RandomHorizontalFlip().
    """
    batch, _, height, width = images.shape
    device = images.device
    rows = torch.arange(height, device=device).expand(batch, height)
    columns = torch.arange(width, device=device).expand(batch, width)
    if how.flip:
        flipped = torch.rand(batch, 1, generator=generator, device=device) < 0.5
        columns = torch.where(flipped, width - 1 - columns, columns)
    if how.pad:
        images = torch.nn.functional.pad(images, [how.pad] * 4)
        shift = torch.randint(0, 2 * how.pad + 1, (2, batch, 1), generator=generator, device=device)
        rows, columns = rows + shift[0], columns + shift[1]
    if not (how.pad or how.flip):
        return images
    # (B, 1, 1, 1), (1, 3, 1, 1), (B, 1, H, 1), (B, 1, 1, W) index to (B, 3, H, W)
    each = torch.arange(batch, device=device)[:, None, None, None]
    channel = torch.arange(images.shape[1], device=device)[None, :, None, None]
    return images[each, channel, rows[:, None, :, None], columns[:, None, None, :]]


class ResidentLoader:
    """Batches of normalised float images and labels from a set that is already on its device.

    Yields images (B, 3, H, W) float32, labels (B,) int64. In training: shuffled, augmented, the last partial batch
    dropped, every rank taking its share of a batch. In evaluation: in order, nothing dropped.

    Raises ValueError where the ranks cannot share a batch equally.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        train: bool = False,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.data = data
        self.batch_size = share_of_batch(batch_size, world_size)
        self.train = train
        self.augmentation = augmentation or Augmentation()
        self.rank, self.world_size = rank, world_size
        self.rand_augment = None
        if train:  # Lightning takes anything with a sampler for a shuffled loader
            self.sampler = EpochSampler(seed)
            if self.augmentation.randaugment is not None:
                size, device = tuple(data.images.shape[-2:]), data.images.device
                self.rand_augment = RandAugment(self.augmentation.randaugment, size, grey(mean), device)
        # u -> (u/255 - mean)/std, as one multiplication and one addition
        scale = 1 / (255 * torch.tensor(std))
        self.scale = scale.view(1, -1, 1, 1).to(data.images.device)
        self.shift = (-torch.tensor(mean) / torch.tensor(std)).view(1, -1, 1, 1).to(data.images.device)

    def __len__(self) -> int:
        n = len(self.data.labels) // self.world_size
        return n // self.batch_size if self.train else -(-n // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.data.images.device
        n = len(self.data.labels)
        order = self.sampler.order(n) if self.train else torch.arange(n)
        order = order[self.rank :: self.world_size].to(device)
        generator, on_cpu = torch.Generator(device=device), torch.Generator()
        for step in range(len(self)):
            index = order[step * self.batch_size : (step + 1) * self.batch_size]
            images = self.data.images[index]
            if self.train:
                seed, where = self.sampler.seed, (self.sampler.epoch, step, self.rank)
                generator.manual_seed(derive_seed(seed, "augment", *where))
                images = augment(images, self.augmentation, generator)
                if self.rand_augment is not None:
                    on_cpu.manual_seed(derive_seed(seed, "randaugment", *where))
                    images = self.rand_augment(images, on_cpu)
            yield images * self.scale + self.shift, self.data.labels[index]


class ResidentData(DataSet):
    """Base of the image sets: limits and splits the training set, moves it to the device, hands out loaders.

    A subclass sets `info`, and `augmentation` where there is any, and gives `load() -> (train, test)`.

    n_train, n_eval: the first of each class, as many as its share (classes that come first one more where they cannot
    be equal). holdout: the last of each class. The rest: see DataSet.
    """

    info: DataInfo
    augmentation = Augmentation()
    train_set: ImageSet | None = None
    eval_set: ImageSet | None = None

    def load(self) -> tuple[ImageSet, ImageSet]:
        """Return the whole training and test set on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is loaded")

    def pick(self, labels: Tensor, n: int) -> Tensor:
        return first_of_classes(labels, self.info.num_classes, n)

    def setup(self, stage: str | None = None) -> None:
        if self.train_set is not None:
            return
        train, test = self.load()
        self.choose(train.labels, test.labels)
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        self.train_set = train.subset(self.train_indices).to(device)
        self.eval_set = (train if self.holdout else test).subset(self.eval_indices).to(device)

    def train_dataloader(self) -> ResidentLoader:
        rank, world_size = place(self.trainer)
        return ResidentLoader(
            self.train_set,
            self.batch_size,
            self.info.mean,
            self.info.std,
            train=True,
            augmentation=self.augmentation,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )

    def val_dataloader(self) -> ResidentLoader:
        """All images of evaluation; every process takes all of them."""
        return self.whole_evaluation()

    def whole_evaluation(self) -> ResidentLoader:
        """All images of evaluation for one process alone."""
        return ResidentLoader(self.eval_set, self.eval_batch_size, self.info.mean, self.info.std)

    def calibration(self, n: int) -> ResidentLoader:
        """n training images (all where there are fewer), spread over the classes, as evaluation would see them."""
        chosen = self.train_set.subset(spread_over_classes(self.train_set.labels, n))
        return ResidentLoader(chosen, self.eval_batch_size, self.info.mean, self.info.std)
