"""ImageNet, or any data set laid out like it: train/CLASS/image and val/CLASS/image."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from repmlp.data.resident import (
    DataInfo,
    EpochSampler,
    check_holdout,
    place,
    share_of_batch,
    split_per_class,
    spread_over_classes,
)
from repmlp.randomness import derive_seed


class DecodedData(L.LightningDataModule):
    """Base of the sets whose images worker processes decode, one by one, as they are asked for.

    A subclass sets train_indices and eval_indices in setup(), then calls check_amounts(); it gives items(train), the
    data set that both index, whose training items are asked for by (epoch, index).

    batch_size: images a step, of all processes together; eval_batch_size: the same in evaluation, of one process.
    seed: of order and augmentation. workers: processes that decode. n_train, n_eval: use that many images, None for
    all. holdout: evaluate on this share of the *training* images.
    Raises ValueError for settings that are none, for fewer images than wanted, and where the processes cannot share a
    batch.
    """

    train_indices: Tensor
    eval_indices: Tensor

    def __init__(
        self,
        batch_size: int,
        *,
        seed: int,
        eval_batch_size: int,
        workers: int,
        n_train: int | None,
        n_eval: int | None,
        holdout: float,
    ):
        super().__init__()
        for name, value, least in (("workers", workers, 0), ("eval_batch_size", eval_batch_size, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"data.{name}={value!r}: use a whole number, at least {least}")
        check_holdout(holdout)
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.seed, self.workers = seed, workers
        self.n_train, self.n_eval, self.holdout = n_train, n_eval, holdout

    @property
    def n_images(self) -> tuple[int, int]:
        """Return how many images are used for training and for evaluation, once set up."""
        return len(self.train_indices), len(self.eval_indices)

    def items(self, train: bool) -> Dataset:
        """Return the images of training, augmented, or of evaluation, with their labels."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its images are")

    def limit(self, indices: Tensor, labels: Tensor, name: str) -> Tensor:
        """Keep as many images as the setting `name` says, of each class its share, evenly spaced.

        labels: of all images, not of `indices` alone. Raises ValueError where there are fewer images.
        """
        wanted = getattr(self, name)
        if wanted is None:
            return indices
        if type(wanted) is not int or not 0 < wanted <= len(indices):
            raise ValueError(f"data.{name}={wanted}: there are {len(indices)} images")
        return indices[spread_over_classes(labels[indices], wanted)].sort().values

    def check_amounts(self) -> None:
        """Raise ValueError where there are too few images to train or to evaluate on."""
        if len(self.eval_indices) < place(self.trainer)[1]:
            raise ValueError(
                f"{len(self.eval_indices)} images to evaluate on: raise data.holdout or data.n_eval "
                "(each process needs one)"
            )
        if len(self.train_indices) < self.batch_size:
            raise ValueError(
                f"{len(self.train_indices)} training images are less than one batch of {self.batch_size}: "
                "lower recipe.batch_size"
            )

    def train_dataloader(self) -> DataLoader:
        """Shuffled, augmented batches of this process; the last partial batch is dropped."""
        rank, world = place(self.trainer)
        order = SharedOrder(self.train_indices, self.batch_size, self.seed, rank, world)
        return DataLoader(
            self.items(train=True),
            share_of_batch(self.batch_size, world),
            sampler=order,
            **self._options(drop_last=True),
        )

    def val_dataloader(self) -> DataLoader:
        """All images of evaluation, in order; each process takes its share, in the same number of batches."""
        return self._evaluation(*place(self.trainer))

    def whole_evaluation(self) -> DataLoader:
        """All images of evaluation for one process alone."""
        return self._evaluation(0, 1)

    def _evaluation(self, rank: int, world: int) -> DataLoader:
        most = -(-len(self.eval_indices) // world)
        batches = -(-most // self.eval_batch_size)
        # nearly equal batches: processes with a different number of them would wait for each other for ever
        shares = [share.tolist() for share in self.eval_indices[rank::world].tensor_split(batches) if len(share)]
        return DataLoader(self.items(train=False), batch_sampler=shares, **self._options())

    def _options(self, **more: bool) -> dict:
        return {
            "num_workers": min(self.workers, os.cpu_count() or 1),
            "persistent_workers": self.workers > 0,
            "pin_memory": torch.cuda.is_available(),
            **more,
        }


class ImageFolderData(DecodedData):
    """Folders of images, decoded by worker processes, transformed as the paper does for ImageNet.

    Paper: RepMLPNet Section 5.1; see train_transform and eval_transform.

    root: folder of train/ and val/. img_size: side of the images in pixels. randaugment: magnitude out of 30, None for
    none. n_train, n_eval: of each class its share. holdout: of each class, instead of val/. The rest: see DecodedData.
    Raises FileNotFoundError where a folder is absent or holds no images; ValueError where train/ and val/ differ in
    their classes.
    """

    def __init__(
        self,
        root: str | Path,
        img_size: int,
        batch_size: int,
        *,
        seed: int = 0,
        eval_batch_size: int = 250,
        randaugment: int | None = None,
        workers: int = 8,
        n_train: int | None = None,
        n_eval: int | None = None,
        holdout: float = 0.0,
    ):
        if isinstance(img_size, bool) or not isinstance(img_size, int) or img_size < 1:
            raise ValueError(f"data.img_size={img_size!r}: use a whole number of pixels")
        super().__init__(
            batch_size,
            seed=seed,
            eval_batch_size=eval_batch_size,
            workers=workers,
            n_train=n_train,
            n_eval=n_eval,
            holdout=holdout,
        )
        self.root = Path(root).expanduser()
        self.img_size, self.randaugment = img_size, randaugment
        self._info: DataInfo | None = None

    @property
    def info(self) -> DataInfo:
        """What a model has to know; the folders are read the first time."""
        if self._info is None:
            self.prepare_data()
        return self._info

    def prepare_data(self) -> None:
        if self._info is None:
            self.train_folder = _open(self.root / "train")
            self.eval_folder = self.train_folder if self.holdout else _open(self.root / "val")
            classes, there = self.train_folder.classes, self.eval_folder.classes
            if classes != there:
                name = sorted(set(classes) ^ set(there))[0]
                raise ValueError(
                    f"{self.root}: train/ has {len(classes)} classes and val/ {len(there)}, e.g. {name!r} is in one of "
                    "them alone: both need the same folders"
                )
            if len(classes) < 2:
                raise ValueError(f"{self.root / 'train'} has one class only, {classes[0]!r}: nothing can be learnt")
            self._info = DataInfo(len(classes), self.img_size, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)

    def setup(self, stage: str | None = None) -> None:
        labels, eval_labels = (torch.tensor(folder.targets) for folder in (self.train_folder, self.eval_folder))
        self.train_indices, self.eval_indices = torch.arange(len(labels)), torch.arange(len(eval_labels))
        if self.holdout:
            self.train_indices, self.eval_indices = split_per_class(labels, self.info.num_classes, 1 - self.holdout)
        self.train_indices = self.limit(self.train_indices, labels, "n_train")
        self.eval_indices = self.limit(self.eval_indices, eval_labels, "n_eval")
        self.check_amounts()

    def items(self, train: bool) -> SeededImages:
        if train:
            return SeededImages(self.train_folder, train_transform(self.img_size, self.randaugment), self.seed)
        return SeededImages(self.eval_folder, eval_transform(self.img_size), self.seed)

    def calibration(self, n: int) -> DataLoader:
        """n training images (all where there are fewer), spread over the classes, as evaluation would see them."""
        labels = torch.tensor(self.train_folder.targets)[self.train_indices]
        chosen = self.train_indices[spread_over_classes(labels, n)].tolist()
        images = SeededImages(self.train_folder, eval_transform(self.img_size), self.seed)
        return DataLoader(images, self.eval_batch_size, sampler=chosen, **self._options())


def train_transform(img_size: int, randaugment: int | None) -> Callable[[Image.Image], Tensor]:
    """Return crop, flip and RandAugment: an image -> (3, img_size, img_size), normalised.

    Paper: RepMLPNet Section 5.1. randaugment: magnitude, 0 to 30 (15 in the paper), two operations an image; None for
    none. torchvision's operations; the released script draws the magnitude anew for each one and has Cutout among them.
    """
    steps = [v2.RandomResizedCrop(img_size), v2.RandomHorizontalFlip()]
    if randaugment is not None:
        if isinstance(randaugment, bool) or not isinstance(randaugment, int) or not 0 <= randaugment <= 30:
            raise ValueError(f"data.randaugment={randaugment!r}: use a magnitude from 0 to 30, or null for none")
        grey = [round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN]
        steps.append(v2.RandAugment(2, randaugment, interpolation=InterpolationMode.BILINEAR, fill=grey))
    return v2.Compose([*steps, *to_tensor()])


def eval_transform(img_size: int) -> Callable[[Image.Image], Tensor]:
    """Return the released script's evaluation: shorter side to img_size, middle cropped, normalised."""
    resize = v2.Resize(img_size, interpolation=InterpolationMode.BICUBIC)
    return v2.Compose([resize, v2.CenterCrop(img_size), *to_tensor()])


def to_tensor() -> list[Any]:
    """Return the last steps of every transform: an image -> (3, H, W) float32, normalised."""
    normalise = v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), normalise]


class SharedOrder(EpochSampler):
    """The order of the images in an epoch for one process: (epoch, index) pairs, whole global batches only.

    Step t of all processes together holds images t*B to (t+1)*B of one permutation, however many processes there are.
    indices: of the images in use. batch_size: B, of all processes. rank, world: this process and how many there are.
    """

    def __init__(self, indices: Tensor, batch_size: int, seed: int, rank: int = 0, world: int = 1):
        super().__init__(seed)
        self.indices, self.batch_size, self.rank, self.world = indices, batch_size, rank, world

    def __len__(self) -> int:
        return len(self.indices) // self.batch_size * (self.batch_size // self.world)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        used = len(self.indices) // self.batch_size * self.batch_size
        order = self.indices[self.order(len(self.indices))[:used]]
        return ((self.epoch, index) for index in order[self.rank :: self.world].tolist())


class SeededImages(Dataset):
    """Images of a folder; what a transform draws is a function of (seed, epoch, index), not of workers or processes.

    Items are asked for by (epoch, index), or by index where nothing is drawn. Returns image (3, H, W), label.
    """

    def __init__(self, folder: ImageFolder, transform: Callable[[Image.Image], Tensor], seed: int):
        self.folder, self.transform, self.seed = folder, transform, seed

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, key: tuple[int, int] | int) -> tuple[Tensor, int]:
        if isinstance(key, tuple):
            epoch, index = key
            torch.manual_seed(derive_seed(self.seed, "image", epoch, index))  # torchvision draws from torch alone
        else:
            index = key
        try:
            image, label = self.folder[index]
        except OSError as error:
            raise ValueError(
                f"{self.folder.samples[index][0]} is no readable image: replace it or remove it"
            ) from error
        return self.transform(image), label


def _open(path: Path) -> ImageFolder:
    if not path.is_dir():
        raise FileNotFoundError(
            f"no folder {path}: pass data.root=FOLDER (the folder that holds train/CLASS/ and val/CLASS/)"
        )
    try:
        return ImageFolder(path)
    except FileNotFoundError as error:  # no class, or a class without images
        raise FileNotFoundError(f"{path} does not hold CLASS/image files: {error}") from error
