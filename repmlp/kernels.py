"""What there is to see of the kernels of a layer over a map: one output point's row, the cells its branches see.

Papers: RepMLPNet (arXiv 2112.11081) Figure 3 and Appendix A; RepMLP (arXiv 2105.01883) Figure 5, of a pair of channels
of a group-wise FC. `repmlp.locality` has the numbers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from repmlp.branches import parse_all
from repmlp.locality import (
    Layer,
    check_share_set,
    group_kernel_map,
    kernel_map,
    layers_over_maps,
    smallest_magnitude,
)
from repmlp.repmlp_block import PartitionPerceptron

NETWORKS = {
    "repmlpnet": "RepMLPNet",
    "resmlp": "ResMLP",
    "gmlp": "gMLP",
    "repmlp": "RepMLP",
    "upernet": "UperNet",
    "pspnet": "PSPNet",
}
DATA = {
    "cifar100": "CIFAR-100", "imagenet": "ImageNet", "imagenette160": "Imagenette-160", "camvid": "CamVid",
    "cityscapes": "Cityscapes", "patterns": "the embedded patterns",
}  # fmt: skip


@dataclass(frozen=True)
class Taps:
    """Which input cells the branches see from every output point: those of point p are the next counts[p] of cells."""

    counts: np.ndarray  # (h*w,)
    cells: np.ndarray  # (sum of counts,), cell y*w + x

    @classmethod
    def of(cls, layer: Layer) -> Taps:
        """Find them by merging branches of ones into an FC of zeros, which leaves nothing but taps."""
        probe = copy.deepcopy(layer).double().eval()
        with torch.no_grad():
            probe.weight.zero_()
            if probe.local_perceptron is not None:
                for conv, norm in zip(
                    probe.local_perceptron.convs.values(), probe.local_perceptron.norms.values(), strict=True
                ):
                    conv.weight.fill_(1)
                    norm.reset_running_stats()
                    norm.weight.fill_(1)
            # one matrix will do: every share-set, or pair of channels, has the same taps
            positions = layer.size[0] * layer.size[1]
            seen = probe.merged()[0][0, :positions, :positions].numpy() != 0
        return cls(seen.sum(1), np.nonzero(seen)[1])


@dataclass(frozen=True)
class View:
    """One output point of one kernel: the FC's row and the merged one, (h*w,) each, and both as pictures, (h, w).

    words: which kernel of the layer it is. seen: cells that the branches see from the point, bool (h, w).
    """

    words: str
    rows: tuple[Tensor, Tensor]
    pictures: tuple[Tensor, Tensor]
    seen: Tensor


def spatial_layers(model: nn.Module) -> dict[str, Layer]:
    """Return the layers over a map in order, by name; ValueError where there are none."""
    layers = layers_over_maps(model)
    if not layers:
        raise ValueError("the network has no fully-connected layers over a map: nothing to explore")
    return layers


def layer_title(name: str) -> str:
    """Name a layer as people do: "stage 3, block 10" for stages.2.9.mix or layer3.9.mix, "block 4" for blocks.3.mix."""
    place = place_of(name)
    if place is None:
        return name
    return f"stage {place[0]}, block {place[1]}" if len(place) == 2 else f"block {place[0]}"


def place_of(name: str) -> tuple[int, ...] | None:
    """Return the stage and block of a module's name, or its block alone, counted from 1; None where it names none."""
    if found := re.search(r"(?:^|\.)stages\.(\d+)\.(\d+)\.", name):
        return int(found[1]) + 1, int(found[2]) + 1
    if found := re.search(r"(?:^|\.)layer(\d+)\.(\d+)\.", name):  # torchvision's names: stages from 1, blocks from 0
        return int(found[1]), int(found[2]) + 1
    found = re.search(r"(?:^|\.)blocks\.(\d+)\.", name)
    return (int(found[1]) + 1,) if found else None


def network_words(config: Mapping[str, Any]) -> str:
    """Name a network as people do: repmlpnet_small is "RepMLPNet small"."""
    name = str(config.get("name") or config.get("variant") or config.get("arch") or "a network")
    first, _, rest = name.partition("_")
    return f"{NETWORKS.get(first, first)} {rest.replace('_', ' ')}".strip()


def data_words(name: str) -> str:
    """Name data as people do: cifar100 is "CIFAR-100"; another name stays."""
    return DATA.get(name, name)


def papers_point(size: tuple[int, int]) -> tuple[int, int]:
    """Return the paper's output point, (6, 6) of a 16x16 map, counted from 0; the same share of another map."""
    return 3 * size[0] // 8, 3 * size[1] // 8


def view(layer: Layer, share_set: int, channels: tuple[int, int], point: tuple[int, int]) -> View:
    """Look at one output point (y, x) of a layer.

    share_set: of a set-sharing FC. channels: of a group-wise FC, (output channel, input channel within its group).
    Raises ValueError where the layer has no such share-set, channel or point.
    """
    with torch.no_grad():
        weights = [layer.merged(branches=injected)[0] for injected in (False, True)]
    if isinstance(layer, PartitionPerceptron):
        out, number = channels
        smallest = min(map(smallest_magnitude, weights))
        pictures = [group_kernel_map(weight, layer.size, out, point, number, smallest) for weight in weights]
        kernels = [pair_matrix(layer, weight, out, number) for weight in weights]
        words = f"output channel {out}, input channel {number} of its group"
    else:
        check_share_set(weights[0], share_set)
        kernels = [weight[share_set] for weight in weights]
        smallest = min(map(smallest_magnitude, kernels))
        pictures = [kernel_map(weight, layer.size, share_set, point, smallest) for weight in weights]
        words = f"share-set {share_set} of {layer.share_sets}"
    at = point[0] * layer.size[1] + point[1]
    return View(words, tuple(kernel[at] for kernel in kernels), tuple(pictures), seen_from(layer, point))


def pair_matrix(layer: PartitionPerceptron, weight: Tensor, out: int, number: int) -> Tensor:
    """Return the matrix from map to map of a pair of channels of a group-wise FC, (h*w, h*w).

    weight: (g, O/g*h*w, C/g*h*w). out: of all output channels. number: of the input channels of its group.
    """
    outputs, positions = layer.out_channels // layer.groups, layer.size[0] * layer.size[1]
    group, channel = divmod(out, outputs)
    # (g, O/g*h*w, C/g*h*w) -> (g, O/g, h*w, C/g, h*w)
    return weight.view(layer.groups, outputs, positions, -1, positions)[group, channel, :, number]


def seen_from(layer: Layer, point: tuple[int, int]) -> Tensor:
    """Say which cells the branches see from a point: bool (h, w), none without branches."""
    seen = torch.zeros(layer.size[0] * layer.size[1], dtype=torch.bool)
    if layer.local_perceptron is not None:
        taps, at = Taps.of(layer), point[0] * layer.size[1] + point[1]
        first = int(taps.counts[:at].sum())
        seen[torch.from_numpy(taps.cells[first : first + int(taps.counts[at])])] = True
    # (h*w,) -> (h, w)
    return seen.view(layer.size)


def reach_of(layer: Layer) -> int:
    """Return how far from the point the branches on the map itself reach, in cells and within the map; at least 1."""
    reach = max((max(spec.padding) for spec in parse_all(layer.kernels) if not spec.shuffled), default=1)
    return min(max(reach, 1), max(layer.size) - 1)


def near_share(row: Tensor, size: tuple[int, int], point: tuple[int, int], reach: int) -> float:
    """Return the share of a row's |weight| within a distance of its point, 0 to 1; row: (h*w,), of that output point.

    Distance is the larger of |dy| and |dx|.
    """
    h, w = size
    magnitude = row.detach().double().abs().view(h, w)
    y, x = point
    near = magnitude[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
    return float(near.sum() / magnitude.sum()) if bool(magnitude.any()) else 0.0


def outside_stronger(values: Tensor, inside: Tensor) -> list[tuple[int, int]]:
    """List the points outside some cells that exceed some point inside them, strongest first.

    values, inside: (h, w). No cells (no branches) give none.
    """
    if not inside.any():
        return []
    stronger = torch.nonzero(~inside & (values > values[inside].min()))
    return sorted(map(tuple, stronger.tolist()), key=lambda p: -float(values[p]))
