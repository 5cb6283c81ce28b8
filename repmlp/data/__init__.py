"""Data sets as LightningDataModules, built from a plain configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from repmlp.data.cifar100 import CIFAR100Data
from repmlp.data.imagenet import ImageFolderData
from repmlp.data.patterns import PatternsData
from repmlp.data.resident import ResidentData
from repmlp.data.segmentation import CamVidData, CityscapesData, SegmentationData

# Both have: info, n_images, prepare_data, setup, train_dataloader, val_dataloader, whole_evaluation, calibration
ImageData = ResidentData | ImageFolderData
DATASETS: dict[str, type[ImageData]] = {
    "cifar100": CIFAR100Data,
    "imagenet": ImageFolderData,
    "patterns": PatternsData,
}
# Masks instead of labels; no calibration
SEGMENTATION: dict[str, type[SegmentationData]] = {"camvid": CamVidData, "cityscapes": CityscapesData}


def build_data(config: Mapping[str, Any], batch_size: int, seed: int) -> ImageData:
    """Build the data set that `config` describes: {"name": one of DATASETS, ...constructor arguments}.

    "label" says what records call it and "fingerprint" which images a folder holds; neither is looked at.

    Raises ValueError for an unknown name or argument.
    """
    return _build(DATASETS, config, batch_size, seed)


def build_segmentation_data(config: Mapping[str, Any], batch_size: int, seed: int) -> SegmentationData:
    """Build the data set that `config` describes: as build_data does, from SEGMENTATION."""
    return _build(SEGMENTATION, config, batch_size, seed)


def _build(registry: Mapping[str, type], config: Mapping[str, Any], batch_size: int, seed: int) -> Any:
    arguments = {key: value for key, value in config.items() if key not in ("name", "label", "fingerprint")}
    name = config.get("name")
    if name not in registry:
        raise ValueError(f"unknown data set {name!r}: use one of {', '.join(registry)}")
    try:
        return registry[name](**arguments, batch_size=batch_size, seed=seed)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise ValueError(f"data {name}: {error}") from error
        setting = unknown.group(1)
        raise ValueError(f"data.{setting}={arguments.get(setting)}: {name} has no such setting") from error
