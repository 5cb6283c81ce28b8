"""The paper's configurations, which stand in configurations.yaml, and which records are runs of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from repmlp.runs.key import determining

_PAPER = yaml.safe_load(Path(__file__).with_name("configurations.yaml").read_text())
MODELS: dict[str, dict[str, Any]] = _PAPER["models"]
DATA_SETS: dict[str, dict[str, Any]] = _PAPER["data_sets"]
PRECISIONS = {"32-true": "", "bf16-mixed": " in bf16"}  # the paper names none; never averaged with each other


def is_full_recipe(record: Mapping[str, Any], epochs: int | None = None) -> bool:
    """Say whether a record was made by the paper's recipe, on the whole data set, with a network of the paper's tables.

    Classification and segmentation alike. A network that configurations.yaml does not list is one of timm's, as it is.
    epochs: of a row that was trained for another time than the paper's own networks.
    """
    if record["data"] not in DATA_SETS:
        return False
    paper, config = DATA_SETS[record["data"]], determining(record["config"])
    data = {k: v for k, v in config["data"].items() if k != "img_size"}
    model = {k: v for k, v in config["model"].items() if k not in paper["varied"]}
    img_size = config["data"].get("img_size", model.get("img_size"))
    return (
        config["recipe"] == {**paper["recipe"], "epochs": epochs or paper["recipe"]["epochs"]}
        and data == paper["data"]
        and [record["n_train"], record["n_eval"]] == paper["images"]  # not another data set in its folder
        and model == MODELS.get(record["model"], {"arch": "timm", "variant": record["model"], "img_size": img_size})
        and model.get("img_size") == img_size
        and (config["model"].get("backbone") is not None or not paper["pretrained"])
        and config["precision"] in PRECISIONS
    )
