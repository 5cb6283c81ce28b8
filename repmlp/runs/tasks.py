"""What a run of classification and one of segmentation do differently; everything else about a run is in run.py."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from repmlp.data import build_data, build_segmentation_data
from repmlp.models.build import build_model
from repmlp.models.upernet import STRIDE, check_window, start_backbone
from repmlp.training.base import RecipeModule
from repmlp.training.classifier import Classifier
from repmlp.training.merge_check import compare_merged
from repmlp.training.segmenter import Segmenter, compare_merged_masks

log = logging.getLogger(__name__)


class Classification:
    """One label an image."""

    name = "classification"

    def build_data(self, config: Mapping[str, Any]) -> Any:
        return build_data(config["data"], config["recipe"]["batch_size"], config["seed"])

    def check(self, config: Mapping[str, Any]) -> None:
        """Raise ValueError for settings that fit no run of this task."""
        if config["model"].get("arch") == "upernet":
            raise ValueError(f"model={config['model']['name']} labels pixels: train it with experiments/segment.py")
        if config.get("backbone"):
            raise ValueError("backbone is a setting of experiments/segment.py: a classifier starts from nothing")

    def build_net(self, config: Mapping[str, Any], data: Any) -> nn.Module:
        return build_model(config["model"], data.info.num_classes)

    def image_size(self, data: Any) -> int | tuple[int, int]:
        """Return the size of the images that multiply-accumulates are counted for, once the data are set up."""
        return data.info.img_size

    def build_module(self, config: Mapping[str, Any], net: nn.Module, data: Any, steps_per_epoch: int) -> RecipeModule:
        return Classifier(
            net,
            config["recipe"],
            steps_per_epoch=steps_per_epoch,
            num_classes=data.info.num_classes,
            parts=data.info.parts,
            seed=config["seed"],
        )

    def evaluate(self, config: Mapping[str, Any], net: nn.Module, data: Any) -> dict[str, Any]:
        """Return what the record says of the trained network, before and after merging."""
        return compare_merged(net, data.whole_evaluation(), data.info.num_classes, data.info.parts)[1]


class Segmentation(Classification):
    """One label a pixel."""

    name = "segmentation"

    def build_data(self, config: Mapping[str, Any]) -> Any:
        return build_segmentation_data(config["data"], config["recipe"]["batch_size"], config["seed"])

    def check(self, config: Mapping[str, Any]) -> None:
        recipe, trainer = config["recipe"], config["trainer"]
        if config["model"].get("arch") != "upernet":
            raise ValueError(f"model={config['model']['name']} labels no pixels: use one of the upernets, model=NAME")
        if missing := {"auxiliary_weight", "window"} - recipe.keys():
            raise ValueError(
                f"the recipe lacks {' and '.join(sorted(missing))}: use recipe=segmentation or another one"
            )
        weight = recipe["auxiliary_weight"]
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight < 0:
            raise ValueError(f"recipe.auxiliary_weight={weight!r}: use a number, not negative")
        check_window(recipe["window"])
        processes = trainer["devices"] * trainer["num_nodes"]
        if recipe["batch_size"] < 2 * processes and not trainer["sync_batchnorm"]:
            raise ValueError(
                f"recipe.batch_size={recipe['batch_size']} on {processes} process(es): a batch norm of UperNet sees "
                "one number an image, so each process needs two images; use fewer devices or "
                "trainer.sync_batchnorm=true"
            )

    def build_net(self, config: Mapping[str, Any], data: Any) -> nn.Module:
        """Build UperNet; its backbone starts from the weights of a classifier where `backbone` names a file."""
        net = super().build_net(config, data)
        if config.get("backbone"):
            fresh = start_backbone(net, Path(config["backbone"]).expanduser())
            log.info("backbone from %s; fresh: %s", config["backbone"], ", ".join(fresh) or "nothing")
        return net

    def image_size(self, data: Any) -> tuple[int, int]:
        """Return the size of the first image of evaluation, padded as `predict` pads it."""
        height, width = data.image_size
        return height + -height % STRIDE, width + -width % STRIDE

    def build_module(self, config: Mapping[str, Any], net: nn.Module, data: Any, steps_per_epoch: int) -> RecipeModule:
        return Segmenter(net, config["recipe"], steps_per_epoch, data.info.classes, seed=config["seed"])

    def evaluate(self, config: Mapping[str, Any], net: nn.Module, data: Any) -> dict[str, Any]:
        return compare_merged_masks(net, data.whole_evaluation(), data.info.classes, config["recipe"]["window"])


TASKS: dict[str, Classification] = {task.name: task for task in (Classification(), Segmentation())}
