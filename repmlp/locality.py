"""How local a fully-connected layer over a map is: the kernel picture of the paper, and numbers for what the eye sees.

Paper: RepMLPNet Figure 3 and Appendix A.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from repmlp.models.build import SPATIAL_LAYERS


def kernel_map(weight: Tensor, size: tuple[int, int], share_set: int, point: tuple[int, int]) -> Tensor:
    """Return the weights that one output point gives to the input map: log magnitude over the matrix's smallest.

    Paper: Appendix A. weight: (S, h*w, h*w). point: (y, x) of the output, counted from 0.
    Returns (h, w), log(|w| / min |W|) with W the share-set's matrix; exact zeros count as the smallest non-zero.
    Raises ValueError where the share-set or the point does not exist.
    """
    h, w = size
    if not 0 <= share_set < weight.shape[0]:
        raise ValueError(f"share-set {share_set} does not exist: there are {weight.shape[0]}, counted from 0")
    if not (0 <= point[0] < h and 0 <= point[1] < w):
        raise ValueError(f"point {tuple(point)} lies outside the {h}x{w} map (counted from 0)")
    magnitude = weight[share_set].detach().double().abs()
    smallest = magnitude[magnitude > 0].min() if bool((magnitude > 0).any()) else magnitude.new_ones(())
    # (h*w, h*w) -> (out_h, out_w, in_h, in_w)
    row = magnitude.view(h, w, h, w)[point[0], point[1]]
    return torch.log(row.clamp_min(smallest) / smallest)


def locality_profile(weight: Tensor, size: tuple[int, int]) -> list[float]:
    """Return the share of |weight| within distance 0, 1, 2, ... of the output point.

    weight: (S, h*w, h*w). Distance is the larger of |dy| and |dx|, so that distance r is what a (2r+1)^2 kernel
    covers. Averaged over all output points and share-sets, each output point's weights summing to 1. The last entry is
    1. For weights without locality, entry r is the mean share of the map's cells that lie so near: `uniform_profile`.
    """
    h, w = size
    distance = _distances(size).to(weight.device)
    magnitude = weight.detach().double().abs()
    share = magnitude / magnitude.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    mean_share = share.mean(dim=0)
    return [float(mean_share[distance <= r].sum() / (h * w)) for r in range(max(h, w))]


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
    the merged kernel) and as `injected` (with its branches). [] for a network without such layers.
    """
    profiles = []
    with torch.no_grad():
        for name, layer in net.named_modules():
            if isinstance(layer, SPATIAL_LAYERS):
                before, after = (
                    [round(share, 6) for share in locality_profile(layer.merged(branches=b)[0], layer.size)]
                    for b in (False, True)
                )
                profiles.append({"layer": name, "size": list(layer.size), "trained": before, "injected": after})
    return profiles


def _distances(size: tuple[int, int]) -> Tensor:
    """Return the Chebyshev distance of every output point to every input point, (h*w, h*w)."""
    h, w = size
    y = torch.arange(h).repeat_interleave(w)
    x = torch.arange(w).repeat(h)
    return torch.maximum((y[:, None] - y[None]).abs(), (x[:, None] - x[None]).abs())
