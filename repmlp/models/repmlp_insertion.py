"""Put RepMLP blocks into a ResNet of timm's.

Paper: RepMLP (arXiv 2105.01883), Sections 3.5 and 4.2. The first block of a stage, which has a stride or other
channels, stays what it was.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from timm.models.resnet import Bottleneck, ResNet
from torch import nn

from repmlp.branches import BranchSpec
from repmlp.models.repmlp_bottleneck import RepMLPBottleneck, RepMLPLight
from repmlp.models.repmlp_partitions import STAGES, check_resnet, check_stages, map_sizes

# r of the paper's networks, by stage: the RepMLP of a Bottleneck has mid/r channels
BOTTLENECK_REDUCTIONS = {"c2": 2, "c3": 2, "c4": 4, "c5": 4}
LIGHT_REDUCTION = 8  # the RepMLP of a Light block has out/8 channels  # the RepMLP of a Light block has out/8 channels


def insert(
    model: ResNet,
    img_size: int | tuple[int, int],
    stages: str | Sequence[str] = ("c3", "c4"),
    *,
    block: str = "bottleneck",
    reductions: int | Sequence[int] | None = None,
    groups: int | Sequence[int] = 8,
    partition: int | tuple[int, int] = 7,
    kernels: Iterable[BranchSpec | int | str] = (1, 3, 5),
    blocks: Sequence[int] | None = None,
    global_perceptron: bool = True,
    global_reductions: int | Sequence[int] = 1,
    zero_init_last: bool = True,
    inference_mode: bool = False,
    inplace: bool = False,
) -> ResNet:
    """Replace the stride-1 bottlenecks of chosen stages of a timm ResNet by RepMLP blocks with fresh weights.

    Paper: RepMLP Sections 3.5 and 4.2. All other layers keep their weights. In a dilated network (output_stride=8) the
    new blocks have no dilation, as in the paper's PSPNet (Section 4.4).

    model: a timm ResNet of Bottlenecks, no wrapper. img_size: pixels, of the images that it will see.
    stages: some of "c2", "c3", "c4", "c5". block: "bottleneck" or "light".
    reductions: r of each stage; None for the paper's, 2, 2, 4, 4 from c2 to c5 (Light blocks: 8).
    groups: g of each stage. partition: side of a partition in cells, or (h, w). kernels: branches of the Local
    Perceptron, see repmlp.branches. blocks: which blocks of each stage, counted from 0; None for all but the first.
    global_perceptron: False for none. global_reductions: of FC1 and FC2, for each stage.
    zero_init_last: start the blocks as identities. inference_mode: build the merged form.
    inplace: change the model itself, otherwise a deep copy.
    One number stands for every stage where a sequence is allowed.
    Returns the model.
    Raises TypeError for another kind of model; ValueError, before anything is changed, for a stage or block that does
    not exist, is there twice, or has a stride or other channels, and as the blocks do.
    """
    check_resnet(model)
    stages = check_stages(stages)
    if block not in ("bottleneck", "light"):
        raise ValueError(f"block={block!r}: use 'bottleneck' or 'light'")
    if reductions is None:
        reductions = [BOTTLENECK_REDUCTIONS[s] if block == "bottleneck" else LIGHT_REDUCTION for s in stages]
    reductions, groups, global_reductions = (
        _for_each(stages, name, given)
        for name, given in (("reductions", reductions), ("groups", groups), ("global_reductions", global_reductions))
    )
    size = (partition, partition) if isinstance(partition, int) else tuple(partition)
    maps = map_sizes(model, img_size)
    model = model if inplace else copy.deepcopy(model)
    new: list[tuple[nn.Sequential, int, nn.Module]] = []
    for stage, r, g, global_reduction in zip(stages, reductions, groups, global_reductions, strict=True):
        layer = getattr(model, STAGES[stage])
        chosen = range(1, len(layer)) if blocks is None else blocks
        for index in chosen:
            if not 0 <= index < len(layer):
                raise ValueError(f"block {index} of {stage} does not exist: it has {len(layer)}, counted from 0")
            settings = {
                "map_size": maps[stage],
                "size": size,
                "groups": g,
                "kernels": kernels,
                "global_perceptron": global_perceptron,
                "global_reduction": global_reduction,
                "inference_mode": inference_mode,
            }
            try:
                new.append((layer, index, _replacement(layer[index], block, r, **settings)))
            except ValueError as error:
                raise ValueError(f"{stage}, block {index}: {error}") from None
    for layer, index, replacement in new:
        if zero_init_last:
            replacement.zero_init_last()
        layer[index] = replacement
    return model


def _replacement(old: nn.Module, block: str, reduction: int, **repmlp: Any) -> nn.Module:
    """Return a fresh RepMLP block in the place of a Bottleneck of timm's, on its device, in its dtype and mode."""
    if not isinstance(old, Bottleneck):
        raise ValueError(f"it is a {type(old).__name__}, and only timm's Bottlenecks are replaced")
    if old.stride != 1 or old.downsample is not None:
        raise ValueError(f"it has stride {old.stride} and changes the map's size or channels, so that it has to stay")
    if old.se is not None:
        raise ValueError("it has an attention layer, which a RepMLP block has not")
    weight = old.conv1.weight
    with weight.device:
        if block == "light":
            new = RepMLPLight(weight.shape[1], reduction, drop_path=old.drop_path, **repmlp)
        else:
            new = RepMLPBottleneck(
                weight.shape[1], old.conv2.out_channels, reduction, drop_path=old.drop_path, **repmlp
            )
    return new.to(weight.dtype).train(old.training)


def _for_each(stages: Sequence[str], name: str, given: int | Sequence[int]) -> list[int]:
    """Return one number a stage; ValueError where there are more or fewer."""
    numbers = [given] * len(stages) if isinstance(given, int) else list(given)
    if len(numbers) != len(stages):
        raise ValueError(f"{name}={numbers}: use one number, or one for each of the stages {', '.join(stages)}")
    return numbers
