"""Cityscapes: street scenes of 50 cities, fine annotations, read by torchvision's class."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from torchvision.datasets import Cityscapes

from repmlp.data.base import SEGMENTATION, register
from repmlp.data.scaled_crop import IGNORED
from repmlp.data.segmentation import Pair, SegmentationData, SegmentationInfo, pair_up

COUNTED = sorted((c for c in Cityscapes.classes if 0 <= c.train_id < IGNORED), key=lambda c: c.train_id)


@register("cityscapes", among=SEGMENTATION)
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
