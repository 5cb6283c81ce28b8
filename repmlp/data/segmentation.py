"""Semantic segmentation: what data sets share whose images have one label a pixel."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import Dataset

from repmlp.data.decoded import DecodedData
from repmlp.data.files import digest, is_ours, read_image, to_rgb
from repmlp.data.scaled_crop import IGNORED, Transform, eval_transform, train_transform
from repmlp.randomness import derive_seed

STRIDE = 32  # of a network's last map: a crop that is no multiple would be padded
PARTNER = ", with its partner"

Pair = tuple[Path, Path]  # an image and its label map


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

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.classes


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
    # Part -> digest of the copy that no key names, because the first records of it were made before there were digests
    first_copy: ClassVar[dict[str, str]] = {}

    def __init__(
        self,
        root: str | Path,
        batch_size: int,
        crop_size: Sequence[int],
        *,
        scale: Sequence[float] = (0.5, 2.0),
        train_split: str = "train",
        eval_split: str = "val",
        eval_batch_size: int = 1,
        **kwargs: Any,
    ):
        super().__init__(batch_size, eval_batch_size=eval_batch_size, **kwargs)
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
        if not self.holdout and eval_split in self.train_splits[train_split]:
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
        width, height = read_image(self.eval_files[int(self.eval_indices[0])][0]).size
        return height, width

    def pairs(self, split: str) -> list[Pair]:
        """Return the images of a part of the data set with their label maps."""
        raise NotImplementedError(f"{type(self).__name__} does not say where its images are")

    @classmethod
    def fingerprint(cls, settings: Mapping[str, Any]) -> str | None:
        """Return a digest of names and sizes of the files of the parts in use; None for those of `first_copy`."""
        data = cls(
            **{name: value for name, value in settings.items() if name not in ("name", "label", "fingerprint")},
            batch_size=1,
        )
        parts = [*cls.train_splits[data.train_split], *([] if data.holdout else [data.eval_split])]
        digests = {}
        for part in parts:
            try:
                pairs = data.pairs(part)
            except FileNotFoundError:
                if cls.first_copy:  # what has a record already needs no files
                    return None
                raise
            names = sorted((f"{path.parent.name}/{path.name}", path) for pair in pairs for path in pair)
            digests[part] = digest(names)
        if all(cls.first_copy.get(part) == each for part, each in digests.items()):
            return None
        return hashlib.sha256(" ".join(digests.values()).encode()).hexdigest()[:16]

    def prepare_data(self) -> None:
        """List the files; each process does."""
        if self.eval_files:
            return
        train: list[Pair] = []
        if self.needs_training_images:
            splits = self.train_splits[self.train_split]
            # by name, so that parts of one video lie beside each other
            train = sorted((pair for split in splits for pair in self.pairs(split)), key=lambda pair: pair[0].name)
        self.eval_files = train if self.holdout else self.pairs(self.eval_split)
        self.train_files = train

    def setup(self, stage: str | None = None) -> None:
        self.prepare_data()
        # whole images have no class: all of one, and so evenly spaced
        self.choose(*(torch.zeros(len(files), dtype=torch.long) for files in (self.train_files, self.eval_files)))

    def hold_out(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Split into the first and the last share of the list: of every video a share would test on what was seen."""
        indices, cut = torch.arange(len(labels)), round((1 - self.holdout) * len(labels))
        return indices[:cut], indices[cut:]

    def items(self, train: bool) -> SeededPairs:
        if train:
            transform = train_transform(self.crop_size, self.scale)
            return SeededPairs(self.train_files, self.labels, self.known, transform, self.seed)
        return SeededPairs(self.eval_files, self.labels, self.known, eval_transform(), self.seed)


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
        image, mask = to_rgb(read_image(image_path, PARTNER)), read_image(mask_path, PARTNER)
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


def named(folder: Path, suffixes: Iterable[str]) -> dict[str, Path]:
    """Return the files of a folder that have one of the suffixes, by name without it."""
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and is_ours(Path(path.name)):
            if path.stem in found:
                raise ValueError(f"{found[path.stem]} and {path} have one name: remove one of them")
            found[path.stem] = path
    return found


def _is_pair(value: Any, kind: type | tuple[type, ...]) -> bool:
    """Say whether a setting is two numbers of a kind."""
    return (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(isinstance(x, kind) and not isinstance(x, bool) for x in value)
    )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
