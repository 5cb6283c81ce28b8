"""ImageNet, or any data set laid out like it: train/CLASS/image and val/CLASS/image."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from repmlp.data.decoded import DecodedData, to_tensor
from repmlp.data.rand_augment import check_magnitude, grey
from repmlp.data.resident import DataInfo, split_per_class, spread_over_classes
from repmlp.randomness import derive_seed


class ImageFolderData(DecodedData):
    """Folders of images, decoded by worker processes, transformed as the paper does for ImageNet.

    Paper: RepMLPNet Section 5.1; see train_transform and eval_transform.

    root: folder of train/ and val/. img_size: side of the images in pixels. randaugment: magnitude out of 30, None for
    none. interpolation: of resizing in evaluation, "bilinear" (the released script's) or "bicubic". n_train, n_eval: of
    each class its share. holdout: of each class, instead of val/. The rest: see DecodedData. Hidden folders are no
    classes.
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
        interpolation: str = "bicubic",
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
        self.img_size, self.randaugment, self.interpolation = img_size, randaugment, check_interpolation(interpolation)
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
            self._info = DataInfo(
                len(classes), self.img_size, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, class_names=tuple(classes)
            )

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
        return SeededImages(self.eval_folder, eval_transform(self.img_size, self.interpolation), self.seed)

    def calibration(self, n: int) -> DataLoader:
        """n training images (all where there are fewer), spread over the classes, as evaluation would see them."""
        labels = torch.tensor(self.train_folder.targets)[self.train_indices]
        chosen = self.train_indices[spread_over_classes(labels, n)].tolist()
        images = SeededImages(self.train_folder, eval_transform(self.img_size, self.interpolation), self.seed)
        return DataLoader(images, self.eval_batch_size, sampler=chosen, **self._options())


def train_transform(img_size: int, randaugment: int | None) -> Callable[[Image.Image], Tensor]:
    """Return crop, flip and RandAugment: an image -> (3, img_size, img_size), normalised.

    Paper: RepMLPNet Section 5.1. randaugment: magnitude, 0 to 30 (15 in the paper), two operations an image; None for
    none. torchvision's operations; the released script draws the magnitude anew for each one and has Cutout among them.
    """
    check_magnitude(randaugment)
    steps = [v2.RandomResizedCrop(img_size), v2.RandomHorizontalFlip()]
    if randaugment is not None:
        fill = grey(IMAGENET_DEFAULT_MEAN)
        steps.append(v2.RandAugment(2, randaugment, interpolation=InterpolationMode.BILINEAR, fill=fill))
    return v2.Compose([*steps, *to_tensor()])


def eval_transform(img_size: int, interpolation: str = "bilinear") -> Callable[[Image.Image], Tensor]:
    """Return the released script's evaluation: shorter side to img_size, bilinear, middle cropped, normalised."""
    resize = v2.Resize(img_size, interpolation=InterpolationMode(check_interpolation(interpolation)))
    return v2.Compose([resize, v2.CenterCrop(img_size), *to_tensor()])


def check_interpolation(name: str) -> str:
    """Return the name of a way to resize; ValueError for another one."""
    if name not in ("bilinear", "bicubic"):
        raise ValueError(f"data.interpolation={name!r}: use bilinear (the released script's) or bicubic")
    return name


class VisibleFolder(ImageFolder):
    """torchvision's folder of classes without hidden ones, such as the .ipynb_checkpoints that notebooks leave."""

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = sorted(
            entry.name for entry in os.scandir(directory) if entry.is_dir() and not entry.name.startswith(".")
        )
        if not names:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
        return names, {name: number for number, name in enumerate(names)}


def fingerprint(root: str | Path) -> str:
    """Return a digest of which images a folder of train/ and val/ holds: names of classes and files, sizes of files.

    Sixteen hex digits, the same wherever the folder lies. Hidden files and folders do not count.
    Raises FileNotFoundError where there is no such folder.
    """
    digest = hashlib.sha256()
    for part in ("train", "val"):
        folder = Path(root).expanduser() / part
        if not folder.is_dir():
            continue
        for where, folders, files in os.walk(folder, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(name for name in files if not name.startswith(".")):
                path = Path(where) / name
                digest.update(f"{part}/{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


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
        except Exception as error:  # Pillow has no error type of its own: a damaged file fails in any of a dozen ways
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
        return VisibleFolder(path)
    except FileNotFoundError as error:  # no class, or a class without images
        raise FileNotFoundError(f"{path} does not hold CLASS/image files: {error}") from error
