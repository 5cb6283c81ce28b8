"""What the explorer shows of a network: per layer over a map, its kernels without, of and with the branches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from explorer import codes
from repmlp.branches import parse_all
from repmlp.kernels import Taps, layer_title, pair_matrix, place_of
from repmlp.locality import Layer, network_profiles, uniform_profile
from repmlp.repmlp_block import PartitionPerceptron

MAX_BYTES = 20_000_000  # of a page; beyond that browsers take long to open it
PAGE_BYTES = 2_000_000  # of the page without weights: Bokeh, in the main
PAIRS = 4  # of a group-wise FC: so many output channels, and of each so many input channels


class KernelSet(NamedTuple):
    """A matrix from map to map, three times: label, and fc, branches, merged, (h*w, h*w) each, float64."""

    label: str
    fc: Tensor
    branches: Tensor
    merged: Tensor


def default_layer(names: list[str]) -> str:
    """Return which layer a page opens with: block 10 of stage 3, the paper's, where there is one, else the middle
    one; of two middle ones the first, whose map is the larger."""
    return next((name for name in names if place_of(name) == (3, 10)), names[(len(names) - 1) // 2])


def choose_layers(layers: dict[str, Layer], wanted: str | None) -> list[str]:
    """Return the names of the layers that go into the page.

    wanted: a name, or a number counted from 0; None for all, or the default layer alone where all are too much for one
    page.
    Raises ValueError for a layer that is not there, or too large for a page.
    """
    names = list(layers)
    if wanted is not None and wanted.isdecimal() and int(wanted) < len(names):
        wanted = names[int(wanted)]
    if wanted is not None and wanted not in names:
        raise ValueError(
            f"layer {wanted!r} does not exist: give a number from 0 to {len(names) - 1}, or a name such as {names[0]}"
        )
    if wanted is None:
        if PAGE_BYTES + sum(map(_size_limit, layers.values())) <= MAX_BYTES:
            return names
        wanted = default_layer(names)
    if (size := PAGE_BYTES + _size_limit(layers[wanted])) > MAX_BYTES:
        (h, w), sets = layers[wanted].size, _set_count(layers[wanted])
        raise ValueError(
            f"layer {wanted} has {sets} kernels of {h * w} x {h * w} weights: up to {size / 1e6:.0f} MB, a page may "
            f"have {MAX_BYTES / 1e6:.0f} MB: choose another of the {len(names)} layers"
        )
    return [wanted]


def kernel_sets(layer: Layer) -> Iterator[KernelSet]:
    """Yield the kernels of a layer: one a share-set; of a group-wise FC one a pair of channels, the first few.

    "fc" is the FC alone on the scale of the merged kernel, that is with the batch norm behind it; "branches" what the
    branches add. Float64.
    """
    wide = copy.deepcopy(layer).double().eval()
    with torch.no_grad():
        fc, merged = wide.merged(branches=False)[0], wide.merged()[0]
    if not isinstance(layer, PartitionPerceptron):
        for number, (before, after) in enumerate(zip(fc, merged, strict=True)):
            yield KernelSet(f"share-set {number}", before, after - before, after)
        return
    for out in range(min(PAIRS, layer.out_channels)):
        for number in range(min(PAIRS, layer.in_channels // layer.groups)):
            before, after = (pair_matrix(layer, weight, out, number) for weight in (fc, merged))
            yield KernelSet(f"output channel {out}, input channel {number} of its group", before, after - before, after)


def describe_layer(name: str, layer: Layer, profile: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return what the page knows of a layer, as plain values, and its packed numbers: the taps, then a text a set.

    profile: the layer's entry of `network_profiles`.
    A set's numbers are the codes of the FC's matrix, row by row, then of the branches' values at the taps, then of the
    merged kernel's there; everywhere else the branches are 0 and the merged kernel is the FC.
    """
    taps = Taps.of(layer)
    rows = np.repeat(np.arange(len(taps.counts)), taps.counts)
    sets, texts = [], [codes.pack(np.concatenate([taps.counts, taps.cells]))]
    for kernel in kernel_sets(layer):
        matrices = [matrix.numpy() for matrix in kernel[1:]]
        fc, branches, merged = matrices[0].ravel(), *(matrix[rows, taps.cells] for matrix in matrices[1:])
        written, base = codes.quantise(np.concatenate([fc, branches, merged]))
        texts.append(codes.pack(written))
        magnitudes = np.abs(codes.restore(written, base))
        sets.append({"label": kernel.label, "base": base, "top": float(magnitudes.max())})
    specs = parse_all(layer.kernels)
    reach = max((max(spec.padding) for spec in specs if not spec.shuffled), default=1)
    about = {
        "name": name,
        "title": layer_title(name),
        "size": list(layer.size),
        "grouped": isinstance(layer, PartitionPerceptron),
        "all_sets": layer.out_channels * layer.in_channels // layer.groups
        if isinstance(layer, PartitionPerceptron)
        else len(sets),
        "branches": " + ".join(spec.label for spec in specs),
        "reach": min(max(reach, 1), max(max(layer.size) - 1, 0)),
        "profile": {
            "fc": profile["trained"],
            "merged": profile["injected"],
            "flat": uniform_profile(layer.size),
        },
        "sets": sets,
    }
    return about, texts


def net_profile(profiles: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the mean over a network's layers of the share of |weight| within distance 0, 1, 2, ...

    profiles: from `network_profiles`. A layer counts as 1 beyond its map.
    """
    longest = max(len(profile["injected"]) for profile in profiles)

    def mean(rows: list[list[float]]) -> list[float]:
        return [float(np.mean([row[min(r, len(row) - 1)] for row in rows])) for r in range(longest)]

    return {
        "fc": mean([profile["trained"] for profile in profiles]),
        "merged": mean([profile["injected"] for profile in profiles]),
        "flat": mean([uniform_profile(profile["size"]) for profile in profiles]),
    }


def profiles_by_name(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return `network_profiles` by the layer's name."""
    return {profile["layer"]: profile for profile in network_profiles(model)}


def _set_count(layer: Layer) -> int:
    if isinstance(layer, PartitionPerceptron):
        return min(PAIRS, layer.out_channels) * min(PAIRS, layer.in_channels // layer.groups)
    return layer.share_sets


def _size_limit(layer: Layer) -> int:
    """Return how many characters the numbers of a layer take at most."""
    positions = layer.size[0] * layer.size[1]
    seen = sum(min(spec.shape[0] * spec.shape[1], positions) for spec in parse_all(layer.kernels))
    taps = positions * min(seen, positions)
    return codes.packed_limit(positions + taps) + _set_count(layer) * codes.packed_limit(positions**2 + 2 * taps)
