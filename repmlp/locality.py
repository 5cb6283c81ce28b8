"""How local a fully-connected layer over a map is: the kernel picture of the paper, and numbers for what the eye sees.

Papers: RepMLPNet (arXiv 2112.11081) Figure 3 and Appendix A; RepMLP (arXiv 2105.01883) Figure 5 for the older block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repmlp.injection import InjectedLinear
from repmlp.layers import SetSharingFC
from repmlp.models.build import SPATIAL_LAYERS
from repmlp.repmlp_block import PartitionPerceptron

Layer = SetSharingFC | InjectedLinear | PartitionPerceptron


def layers_over_maps(net: nn.Module) -> dict[str, Layer]:
    """Return the fully-connected layers over a map in order, by name."""
    kinds = (*SPATIAL_LAYERS, PartitionPerceptron)
    return {name: layer for name, layer in net.named_modules() if isinstance(layer, kinds)}


def kernel_map(
    weight: Tensor, size: tuple[int, int], share_set: int, point: tuple[int, int], smallest: float | None = None
) -> Tensor:
    """Return the weights that one output point gives to the input map: log magnitude over the matrix's smallest.

    Paper: Appendix A. weight: (S, h*w, h*w). point: (y, x) of the output, counted from 0. smallest: what the magnitudes
    are over instead, so that maps of several matrices have one scale.
    Returns (h, w), log(|w| / min |W|) with W the share-set's matrix; exact zeros count as the smallest non-zero.
    Raises ValueError where the share-set or the point does not exist.
    """
    h, w = size
    check_share_set(weight, share_set)
    _check_point(point, size)
    matrix = weight[share_set]
    # (h*w, h*w) -> (out_h, out_w, in_h, in_w)
    return _log_over(matrix.view(h, w, h, w)[point[0], point[1]], smallest or smallest_magnitude(matrix))


def group_kernel_map(
    weight: Tensor,
    size: tuple[int, int],
    out_channel: int,
    point: tuple[int, int],
    in_channel: int,
    smallest: float | None = None,
) -> Tensor:
    """Return the weights that one output number of a group-wise FC gives to one input channel, as `kernel_map` does.

    Paper: RepMLP (arXiv 2105.01883) Figure 5, there of output channel 0, input channel 0 and the point (6, 6) of the
    first RepMLP of c3. The logarithm is over the smallest magnitude of the whole weight, all groups.

    weight: (g, O/g*h*w, C/g*h*w), of PartitionPerceptron; rows and columns in the order (channel within the group, y,
    x). out_channel: of all O. point: (y, x) of the output. in_channel: within the group. All counted from 0. smallest:
    see kernel_map.
    Returns (h, w).
    Raises ValueError where a channel or the point does not exist, or the weight is none over h x w maps.
    """
    h, w = size
    groups, rows, columns = weight.shape
    if rows % (h * w) or columns % (h * w):
        raise ValueError(f"a weight of shape {tuple(weight.shape)} is no layer over maps of {h}x{w}")
    outputs, inputs = rows // (h * w), columns // (h * w)
    if not (0 <= out_channel < groups * outputs and 0 <= in_channel < inputs):
        raise ValueError(
            f"output channel {out_channel}, input channel {in_channel}: there are {groups * outputs} output channels "
            f"and {inputs} input channels a group, counted from 0"
        )
    _check_point(point, size)
    group, channel = divmod(out_channel, outputs)
    # (g, O/g*h*w, C/g*h*w) -> (g, O/g, out_h, out_w, C/g, in_h, in_w)
    kernels = weight.view(groups, outputs, h, w, inputs, h, w)
    return _log_over(kernels[group, channel, point[0], point[1], in_channel], smallest or smallest_magnitude(weight))


def smallest_magnitude(matrix: Tensor) -> float:
    """Return the smallest magnitude that is not zero; 1 where all are."""
    magnitude = matrix.detach().double().abs()
    return float(magnitude[magnitude > 0].min()) if bool((magnitude > 0).any()) else 1.0


def check_share_set(weight: Tensor, share_set: int) -> None:
    """Raise ValueError where a weight (S, h*w, h*w) has no such share-set."""
    if not 0 <= share_set < weight.shape[0]:
        raise ValueError(f"share-set {share_set} does not exist: there are {weight.shape[0]}, counted from 0")


def _check_point(point: tuple[int, int], size: tuple[int, int]) -> None:
    if not all(0 <= at < length for at, length in zip(point, size, strict=True)):
        raise ValueError(f"point {tuple(point)} lies outside the {size[0]}x{size[1]} map (counted from 0)")


def _log_over(picture: Tensor, smallest: float) -> Tensor:
    """Return log(|w| / smallest); exact zeros count as the smallest."""
    return torch.log(picture.detach().double().abs().clamp_min(smallest) / smallest)


def locality_profile(weight: Tensor, size: tuple[int, int]) -> list[float]:
    """Return the share of |weight| within distance 0, 1, 2, ... of the output point.

    weight: (S, h*w, h*w). Distance is the larger of |dy| and |dx|, so that distance r is what a (2r+1)^2 kernel
    covers. Averaged over all output points and share-sets, each output point's weights summing to 1. The last entry is
    1. For weights without locality, entry r is the mean share of the map's cells that lie so near: `uniform_profile`.
    """
    return _profile(weight, size).tolist()


def _profile(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute a locality profile where the weight is, without waiting for it: (max(h, w),), float64."""
    h, w = size
    magnitude = weight.detach().double().abs()
    share = magnitude / magnitude.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    # one pass over the matrix, whose 4096 x 4096 numbers in a large net took half a minute distance by distance
    at_distance = share.new_zeros(max(h, w))
    at_distance.index_add_(0, _distances(size, weight.device).flatten(), share.mean(dim=0).flatten())
    return at_distance.cumsum(0) / (h * w)


def uniform_profile(size: tuple[int, int]) -> list[float]:
    """Return the locality profile of a matrix whose entries are all of the same magnitude."""
    h, w = size
    # a square around a point has rows times columns, so that the mean over all points is a product of two means
    near = [
        [sum(min(n - 1, i + r) - max(0, i - r) + 1 for i in range(n)) / n**2 for n in (h, w)] for r in range(max(h, w))
    ]
    return [rows * columns for rows, columns in near]


def locality_index(profile: Sequence[float], size: tuple[int, int]) -> float:
    """Return how much nearer to the output point |weight| lies than in a flat kernel, whatever the size of the map.

    1 - (mean distance of |weight|) / (mean distance of a flat kernel's): 0 for a kernel without locality, 1 where all
    weight is on the point itself, below 0 where it shuns the point; 0 on a map of one cell.
    profile: from `locality_profile`, for the same size.
    """
    # the mean of a distance d is the sum over r >= 0 of the share that lies further away than r
    mean, flat = (sum(1 - share for share in each) for each in (profile, uniform_profile(size)))
    return 1 - mean / flat if flat else 0.0


def network_profiles(net: nn.Module) -> list[dict[str, Any]]:
    """Return the locality profile of every spatial layer of a network, in the order of its modules.

    One entry a layer: layer (its name), size, and its `locality_profile` as `trained` (the FC alone, on the scale of
    the merged kernel) and as `injected` (with its branches). Of a group-wise FC the magnitudes of a group's channels
    are summed. [] for a network without such layers.
    """
    layers = layers_over_maps(net)
    if not layers:
        return []
    with torch.no_grad():
        both = [_profile(_over_maps(layer, b), layer.size) for layer in layers.values() for b in (False, True)]
        numbers = iter(torch.cat(both).tolist())  # one transfer, the only wait for the device
    profiles = []
    for name, layer in layers.items():
        before, after = ([round(next(numbers), 6) for _ in range(max(layer.size))] for _ in ("trained", "injected"))
        profiles.append({"layer": name, "size": list(layer.size), "trained": before, "injected": after})
    return profiles


def _over_maps(layer: nn.Module, branches: bool) -> Tensor:
    """Return the matrices of a layer from map to map, (S, h*w, h*w); of a group-wise FC (g, h*w, h*w), not negative."""
    weight = layer.merged(branches=branches)[0]
    if not isinstance(layer, PartitionPerceptron):
        return weight
    positions = layer.size[0] * layer.size[1]
    # (g, O/g*h*w, C/g*h*w) -> (g, O/g, h*w, C/g, h*w) -> (g, h*w, h*w)
    return weight.view(len(weight), -1, positions, weight.shape[2] // positions, positions).abs().sum(dim=(1, 3))


def _distances(size: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Return the Chebyshev distance of every output point to every input point, (h*w, h*w)."""
    h, w = size
    y = torch.arange(h, device=device)[:, None].expand(h, w).flatten()
    x = torch.arange(w, device=device).repeat(h)
    return torch.maximum((y[:, None] - y[None]).abs(), (x[:, None] - x[None]).abs())
