"""ImageNet, or any data set laid out like it: train/CLASS/image and val/CLASS/image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from repmlp.data.base import DataInfo, check_whole, register, spread_over_classes
from repmlp.data.decoded import DecodedData, to_tensor
from repmlp.data.files import digest, images_below, is_ours, is_visible, read_rgb
from repmlp.data.rand_augment import check_magnitude, grey
from repmlp.randomness import derive_seed
from repmlp.sizes import height_width


@register("imagenet")
class ImageFolderData(DecodedData):
    """Folders of images, decoded by worker processes, transformed as the paper does for ImageNet.

    Paper: RepMLPNet Section 5.1; see train_transform and eval_transform.

    root: folder of train/ and val/; hidden files and folders in them do not count. img_size: side of the images in
    pixels. randaugment: magnitude out of 30, None for none. interpolation: of resizing in evaluation, "bilinear" (the
    released script's) or "bicubic". holdout: of each class, instead of val/. The rest: see DecodedData. With
    `evaluation_only`, train/ is needed for a held-out share and for calibration alone.
    Raises FileNotFoundError where a folder is absent or holds no images; ValueError where train/ and val/ differ in
    their classes.
    """

    def __init__(
        self,
        root: str | Path,
        img_size: int,
        batch_size: int,
        *,
        eval_batch_size: int = 250,
        randaugment: int | None = None,
        interpolation: str = "bicubic",
        **kwargs: Any,
    ):
        check_whole("img_size", img_size, 1)
        super().__init__(batch_size, eval_batch_size=eval_batch_size, **kwargs)
        self.root = Path(root).expanduser()
        self.img_size, self.randaugment, self.interpolation = img_size, randaugment, check_interpolation(interpolation)
        self._info: DataInfo | None = None
        self._train_folder: ImageFolder | None = None

    @classmethod
    def fingerprint(cls, settings: Mapping[str, Any]) -> str | None:
        return fingerprint(settings["root"]) if settings.get("root") else None

    @property
    def info(self) -> DataInfo:
        """What a model has to know; the folders are read the first time."""
        if self._info is None:
            self.prepare_data()
        return self._info

    @property
    def train_folder(self) -> ImageFolder:
        """The images of training; the folder is read the first time."""
        if self._train_folder is None:
            self._train_folder = _open(self.root / "train")
        return self._train_folder

    def prepare_data(self) -> None:
        if self._info is not None:
            return
        if self.needs_training_images:  # before val/: a wrong root is told by the folder that comes first
            _ = self.train_folder
        self.eval_folder = self.train_folder if self.holdout else _open(self.root / "val")
        classes = self.eval_folder.classes
        self._check_classes()
        if len(classes) < 2:
            raise ValueError(f"{self.eval_folder.root} has one class only, {classes[0]!r}: nothing can be learnt")
        mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        self._info = DataInfo(len(classes), self.img_size, mean, std, class_names=tuple(classes))

    def _check_classes(self) -> None:
        """Raise ValueError where train/, if it has been read, and val/ have other classes."""
        if self._train_folder is None or self._train_folder.classes == self.eval_folder.classes:
            return
        train, val = self._train_folder.classes, self.eval_folder.classes
        raise ValueError(
            f"{self.root}: train/ has {len(train)} classes and val/ {len(val)}, e.g. "
            f"{sorted(set(train) ^ set(val))[0]!r} is in one of them alone: both need the same folders"
        )

    def setup(self, stage: str | None = None) -> None:
        self.prepare_data()
        train = self.train_folder.targets if self.needs_training_images else []
        self.choose(torch.tensor(train, dtype=torch.long), torch.tensor(self.eval_folder.targets))

    def items(self, train: bool) -> SeededImages:
        if train:
            return SeededImages(self.train_folder, train_transform(self.img_size, self.randaugment), self.seed)
        return SeededImages(self.eval_folder, eval_transform(self.img_size, self.interpolation), self.seed)

    def calibration(self, n: int) -> DataLoader:
        """n training images (all where there are fewer), spread over the classes, as evaluation would see them."""
        if not (self.root / "train").is_dir():
            raise FileNotFoundError(f"no folder {self.root / 'train'}: int8 is calibrated on training images")
        labels = torch.tensor(self.train_folder.targets)
        self._check_classes()
        # evaluation needed none of them, so none were chosen
        indices = self.train_indices if len(self.train_indices) else torch.arange(len(labels))
        chosen = indices[spread_over_classes(labels[indices], n)].tolist()
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


def eval_transform(
    img_size: int | Sequence[int],
    interpolation: str = "bilinear",
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
) -> Callable[[Image.Image], Tensor]:
    """Return the released script's evaluation: shorter side to img_size, bilinear, middle cropped, normalised.

    img_size: side, or (height, width), of the result in pixels; the shorter of the two is what is resized to. mean,
    std: of the three channels; ImageNet's where they are empty.
    """
    size = height_width(img_size)
    resize = v2.Resize(min(size), interpolation=InterpolationMode(check_interpolation(interpolation)))
    return v2.Compose([resize, v2.CenterCrop(size), *to_tensor(mean, std)])


def check_interpolation(name: str) -> str:
    """Return the name of a way to resize; ValueError for another one."""
    if name not in ("bilinear", "bicubic"):
        raise ValueError(f"data.interpolation={name!r}: use bilinear (the released script's) or bicubic")
    return name


class VisibleFolder(ImageFolder):
    """torchvision's folder of classes, without hidden files and folders, read by read_rgb()."""

    def __init__(self, root: Path):
        super().__init__(root, loader=read_rgb, is_valid_file=lambda path: is_ours(Path(path).relative_to(root)))

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        names = sorted(each.name for each in Path(directory).iterdir() if each.is_dir() and is_visible(Path(each.name)))
        if not names:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
        return names, {name: number for number, name in enumerate(names)}


def fingerprint(root: str | Path) -> str:
    """Return a digest of which images a folder of train/ and val/ holds: names of classes and files, sizes of files.

    Sixteen hex digits, the same wherever the folder lies; what is no image, or hidden, does not count.
    """
    folders = {part: Path(root).expanduser() / part for part in ("train", "val")}
    return digest(
        (f"{part}/{path.as_posix()}", folder / path)
        for part, folder in folders.items()
        if folder.is_dir()
        for path in images_below(folder)
    )


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
        image, label = self.folder[index]
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
