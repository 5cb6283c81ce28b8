"""How the size of images and the partitions of RepMLP blocks in a ResNet go together.

Stages are called c2 to c5, as in the paper (RepMLP, arXiv 2105.01883); they are layer1 to layer4 of timm.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from timm.models.resnet import ResNet
from torch import nn

from repmlp.maps import tiles_of
from repmlp.repmlp_block import RepMLP
from repmlp.sizes import height_width

STAGES = {"c2": "layer1", "c3": "layer2", "c4": "layer3", "c5": "layer4"}


class Resized(NamedTuple):
    """What `resize_partitions` returns: the model, and by name the Global Perceptrons that are fresh or gone."""

    model: nn.Module
    fresh: list[str]
    removed: list[str]


def resize_partitions(
    model: ResNet, img_size: int | tuple[int, int], global_reductions: Mapping[str, int] | None = None
) -> Resized:
    """Return a copy of a ResNet with RepMLP blocks for images of another size; the original stays as it is.

    Paper: RepMLP Section 4.4, where weights for 320 pixels go into PSPNet at 713. Partitions keep their size, so that
    FC3 and the branches keep their weights. FC1 and FC2 depend on how many partitions a map has: where that changes
    they are fresh and have to be trained; the batch norm before them, one number a channel, keeps its weights.

    model: a timm ResNet with RepMLP blocks, no wrapper. img_size: pixels.
    global_reductions: of fresh FC1 and FC2, by stage ("c3"); a stage that is not named keeps its own.
    Raises TypeError for another kind of model, ValueError where a partition is larger than a map, for a stage that does
    not exist, and for a merged model that would need fresh layers.
    """
    check_resnet(model)
    if global_reductions:
        check_stages(list(global_reductions))
    model = copy.deepcopy(model)
    maps = map_sizes(model, img_size)
    fresh, removed = [], []
    for stage, layer in STAGES.items():
        for name, module in getattr(model, layer).named_modules():
            if isinstance(module, RepMLP):
                change = module.set_map_size(maps[stage], (global_reductions or {}).get(stage))
                changed = {"fresh": fresh, "removed": removed}.get(change, [])
                changed.append(f"{layer}.{name}.global_perceptron")
    if hasattr(model, "img_size"):  # a network of ours
        model.img_size = height_width(img_size)
    return Resized(model, fresh, removed)


def map_sizes(model: ResNet, img_size: int | tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Return (H, W) of the maps of every stage for images of a size: "c2" to "c5"."""
    height, width = height_width(img_size)
    strides = {info["module"]: info["reduction"] for info in model.feature_info}
    # every convolution with a stride rounds up
    return {stage: (-(-height // strides[name]), -(-width // strides[name])) for stage, name in STAGES.items()}


def check_images(model: ResNet, img_size: int | tuple[int, int]) -> None:
    """Raise ValueError where images of a size have another number of partitions than the RepMLP blocks are built for.

    FC1 and FC2 of a Global Perceptron depend on that number. A ResNet without such blocks takes images of any size.
    """
    maps = map_sizes(model, img_size)
    for stage, module in _of_one_size(model):
        there, here = tiles_of(maps[stage], module.size), module.partitions
        if there != here:
            height, width = height_width(img_size)
            raise ValueError(
                f"images of {height}x{width} pixels have {there[0]}x{there[1]} partitions in {stage}, and the RepMLP "
                f"blocks there are built for {here[0]}x{here[1]}"
            )


def takes_any_size(model: nn.Module) -> bool:
    """Say whether a network has no RepMLP block that is built for one number of partitions."""
    return not isinstance(model, ResNet) or not any(_of_one_size(model))


def _of_one_size(model: ResNet) -> Iterator[tuple[str, RepMLP]]:
    """Give the RepMLPs that are built for one number of partitions, each with its stage."""
    for stage, layer in STAGES.items():
        for module in getattr(model, layer).modules():
            if isinstance(module, RepMLP) and not module.any_map:
                yield stage, module


def check_resnet(model: nn.Module) -> None:
    if not isinstance(model, ResNet):
        raise TypeError(f"takes a timm ResNet itself, no wrapper; got {type(model).__name__}")


def check_stages(stages: str | Sequence[str]) -> list[str]:
    stages = [stages] if isinstance(stages, str) else list(stages)
    for stage in stages:
        if stage not in STAGES:
            raise ValueError(f"stages={stages}: {stage!r} does not exist, use some of {', '.join(STAGES)}")
        if stages.count(stage) > 1:
            raise ValueError(f"stages={stages}: {stage} stands there twice")
    return stages
