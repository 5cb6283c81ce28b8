"""Image sets that live on the training device as one uint8 tensor, augmented there in batches.

No worker processes: a CIFAR-sized set is 150 MB, and cropping a batch by indexing costs less than decoding one image.
Every random draw is a function of (seed, epoch, step).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import lightning as L
import torch
from torch import Tensor

from repmlp.data.rand_augment import RandAugment, check_magnitude, grey
from repmlp.randomness import derive_seed


@dataclass
class ImageSet:
    """Images (N, 3, H, W) uint8 and labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def subset(self, indices: Tensor) -> ImageSet:
        return ImageSet(self.images[indices], self.labels[indices])


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


class EpochSampler:
    """The order of the images in an epoch: a permutation drawn from (seed, epoch). Lightning calls set_epoch()."""

    def __init__(self, seed: int):
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        return torch.randperm(n, generator=generator)


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


@dataclass
class DataInfo:
    """What a model and a table have to know of a data set.

    parts: for labels that are made of several answers, the answer that each class stands for, name -> (num_classes,).
    class_names: in the order of the labels, where they are known.
    """

    num_classes: int
    img_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    parts: dict[str, Tensor] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()


class ResidentData(L.LightningDataModule):
    """Base of the image sets: limits and splits the training set, moves it to the device, hands out loaders.

    A subclass sets `info` and gives `load() -> (train, test)`.

    batch_size: images a step, of all processes together. eval_batch_size: the same in evaluation, of one process.
    seed: of order and augmentation.
    n_train, n_eval: use exactly that many images, the first of each class (as many of each as its share, classes that
    come first one more where they cannot be equal), None for all.
    holdout: evaluate on this share of the *training* images (the last of each class) instead of the test set.
    Raises ValueError in setup() where there are fewer training images than wanted or than a batch, or none held out.
    """

    info: DataInfo

    def __init__(
        self,
        batch_size: int = 128,
        *,
        eval_batch_size: int = 500,
        seed: int = 0,
        n_train: int | None = None,
        n_eval: int | None = None,
        holdout: float = 0.0,
        augmentation: Augmentation | None = None,
    ):
        super().__init__()
        check_holdout(holdout)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.seed, self.n_train, self.n_eval, self.holdout = seed, n_train, n_eval, holdout
        self.augmentation = augmentation or Augmentation()
        self.train_set: ImageSet | None = None
        self.eval_set: ImageSet | None = None

    @property
    def n_images(self) -> tuple[int, int]:
        """Return how many images are used for training and for evaluation, once set up."""
        return len(self.train_set.labels), len(self.eval_set.labels)

    def load(self) -> tuple[ImageSet, ImageSet]:
        """Return the whole training and test set on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is loaded")

    def setup(self, stage: str | None = None) -> None:
        if self.train_set is not None:
            return
        train, test = self.load()
        if self.holdout:
            kept, held = split_per_class(train.labels, self.info.num_classes, 1 - self.holdout)
            train, test = train.subset(kept), train.subset(held)
        for name in ("n_train", "n_eval"):
            images, wanted = {"n_train": train, "n_eval": test}[name], getattr(self, name)
            if wanted is None:
                continue
            if not 0 < wanted <= len(images.labels):
                words = {"n_train": "training images", "n_eval": "images to evaluate on"}[name]
                raise ValueError(f"data.{name}={wanted}: there are {len(images.labels)} {words}")
            chosen = images.subset(first_of_classes(images.labels, self.info.num_classes, wanted))
            train, test = (chosen, test) if name == "n_train" else (train, chosen)
        if len(train.labels) < self.batch_size:
            raise ValueError(f"batch_size={self.batch_size} is more than the {len(train.labels)} training images")
        if not len(test.labels):
            raise ValueError(f"data.holdout={self.holdout} holds out no image: there are too few of each class")
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        self.train_set = ImageSet(train.images.to(device), train.labels.to(device))
        self.eval_set = ImageSet(test.images.to(device), test.labels.to(device))

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


def check_holdout(holdout: float) -> None:
    """Raise ValueError for a held-out share of the training set that is none."""
    if not 0 <= holdout < 1:
        raise ValueError(f"data.holdout={holdout} is no share of the training set: use 0 up to, not including, 1")


def place(trainer: L.Trainer | None) -> tuple[int, int]:
    """Return the number of this process and how many there are."""
    return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


def share_of_batch(batch_size: int, processes: int) -> int:
    """Return how many images of a batch each process takes; ValueError where they cannot share it equally."""
    if batch_size % processes:
        raise ValueError(
            f"recipe.batch_size={batch_size} is the batch of all processes together and cannot be shared by "
            f"{processes}: use a multiple"
        )
    return batch_size // processes


def split_per_class(labels: Tensor, num_classes: int, share: float) -> tuple[Tensor, Tensor]:
    """Split indices into the first `share` of every class and the rest, both in ascending order."""
    first, rest = [], []
    for label in range(num_classes):
        members = torch.nonzero(labels == label).flatten()
        cut = round(share * len(members))
        first.append(members[:cut])
        rest.append(members[cut:])
    return torch.cat(first).sort().values, torch.cat(rest).sort().values


def first_of_classes(labels: Tensor, num_classes: int, n: int) -> Tensor:
    """Return the indices of exactly n images in ascending order: the first of each class, as many as its share.

    Where the shares are no whole numbers, the largest remainders are rounded up, those of earlier classes first.
    """
    exact = torch.bincount(labels, minlength=num_classes).double() * n / len(labels)
    counts = exact.floor().long()
    more = (exact - counts).sort(descending=True, stable=True).indices[: n - int(counts.sum())]
    counts[more] += 1
    first = [torch.nonzero(labels == label).flatten()[: counts[label]] for label in range(num_classes)]
    return torch.cat(first).sort().values


def spread_over_classes(labels: Tensor, n: int) -> Tensor:
    """Return the indices of n images (all where there are fewer), as many of each class as its share of the labels."""
    by_class = labels.argsort(stable=True)
    n = min(n, len(labels))
    return by_class[torch.arange(n, device=labels.device) * len(labels) // n]
