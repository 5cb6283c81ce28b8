"""Data sets as LightningDataModules, built from a plain configuration; base.py says what each promises."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Mapping
from typing import Any

from repmlp.data.base import DATASETS, SEGMENTATION, DataInfo, DataSet

for _module in pkgutil.iter_modules(__path__):  # each file lists the data sets that it holds
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["DATASETS", "SEGMENTATION", "DataInfo", "DataSet", "build_data", "build_segmentation_data"]


def build_data(config: Mapping[str, Any], batch_size: int, seed: int, evaluation_only: bool = False) -> DataSet:
    """Build the data set that `config` describes: {"name": one of DATASETS, ...constructor arguments}.

    "label" says what records call it and "fingerprint" which images a folder holds; neither is looked at.
    evaluation_only: no training image is needed.

    Raises ValueError for an unknown name or argument.
    """
    return _build(DATASETS, config, batch_size, seed, evaluation_only)


def build_segmentation_data(
    config: Mapping[str, Any], batch_size: int, seed: int, evaluation_only: bool = False
) -> DataSet:
    """Build the data set that `config` describes: as build_data does, from SEGMENTATION."""
    return _build(SEGMENTATION, config, batch_size, seed, evaluation_only)


def _build(
    registry: Mapping[str, type[DataSet]], config: Mapping[str, Any], batch_size: int, seed: int, evaluation_only: bool
) -> DataSet:
    arguments = {key: value for key, value in config.items() if key not in ("name", "label", "fingerprint")}
    name = config.get("name")
    if name not in registry:
        raise ValueError(f"unknown data set {name!r}: use one of {', '.join(registry)}")
    try:
        data = registry[name](**arguments, batch_size=batch_size, seed=seed)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None:
            raise ValueError(f"data {name}: {error}") from error
        setting = unknown.group(1)
        raise ValueError(f"data.{setting}={arguments.get(setting)}: {name} has no such setting") from error
    data.evaluation_only = evaluation_only
    return data
