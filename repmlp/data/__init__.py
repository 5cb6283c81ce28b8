"""Data sets as LightningDataModules, built from a plain configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from repmlp.data.cifar100 import CIFAR100Data
from repmlp.data.imagenet import ImageFolderData
from repmlp.data.patterns import PatternsData
from repmlp.data.resident import ResidentData

# Both have: info, n_images, prepare_data, setup, train_dataloader, val_dataloader, whole_evaluation, calibration
ImageData = ResidentData | ImageFolderData
DATASETS: dict[str, type[ImageData]] = {
    "cifar100": CIFAR100Data,
    "imagenet": ImageFolderData,
    "patterns": PatternsData,
}


def build_data(config: Mapping[str, Any], batch_size: int, seed: int) -> ImageData:
    """Build the data set that `config` describes: {"name": one of DATASETS, ...constructor arguments}.

    "label" says what records call it, and is not looked at.

    Raises ValueError for an unknown name or argument.
    """
    arguments = {key: value for key, value in config.items() if key not in ("name", "label")}
    name = config.get("name")
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: use one of {', '.join(DATASETS)}")
    try:
        return DATASETS[name](**arguments, batch_size=batch_size, seed=seed)
    except TypeError as error:
        raise ValueError(f"data {name}: {error}") from error
