"""The paper's kernel heatmap: what one output point sees, of the FC alone and after Locality Injection.

Papers: RepMLPNet Figure 3 and Appendix A; RepMLP Figure 5, of a pair of channels of a group-wise FC. Darker is larger:
the natural logarithm of |w| over the smallest |w| of both matrices, so that both panels have one scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from explorer.collect import Layer, Taps, pair_matrix
from figures import save
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

from repmlp.branches import parse_all
from repmlp.locality import group_kernel_map, kernel_map
from repmlp.repmlp_block import PartitionPerceptron
from repmlp.runs.key import branch_label

MOST_MARKED = 8  # strong points outside the branches' cells; more would cover the picture
# marks that differ in shape and, for any eye, from grey and from each other
SEEN, OUTSIDE, POINT = "#D55E00", "#56B4E9", "white"
NETWORKS = {"repmlpnet": "RepMLPNet", "resmlp": "ResMLP", "gmlp": "gMLP", "repmlp": "RepMLP", "upernet": "UperNet"}
DATA = {
    "cifar100": "CIFAR-100", "imagenet": "ImageNet", "imagenette160": "Imagenette-160", "camvid": "CamVid",
    "cityscapes": "Cityscapes", "patterns": "the embedded patterns",
}  # fmt: skip


@dataclass(frozen=True)
class View:
    """One output point of one kernel: the FC's row and the merged one, (h*w,) each, and both as pictures, (h, w).

    words: which kernel of the layer it is. seen: cells that the branches see from the point, bool (h, w).
    """

    words: str
    rows: tuple[Tensor, Tensor]
    pictures: tuple[Tensor, Tensor]
    seen: Tensor


def network_words(config: Mapping[str, Any]) -> str:
    """Name a network as people do: repmlpnet_small is "RepMLPNet small"."""
    name = str(config.get("name") or config.get("variant") or config.get("arch") or "a network")
    first, _, rest = name.partition("_")
    return f"{NETWORKS.get(first, first)} {rest.replace('_', ' ')}".strip()


def view(layer: Layer, share_set: int, channels: tuple[int, int], point: tuple[int, int]) -> View:
    """Look at one output point (y, x) of a layer.

    share_set: of a set-sharing FC. channels: of a group-wise FC, (output channel, input channel within its group).
    Raises ValueError where the layer has no such share-set, channel or point.
    """
    with torch.no_grad():
        weights = [layer.merged(branches=injected)[0] for injected in (False, True)]
    if isinstance(layer, PartitionPerceptron):
        out, number = channels
        pictures = [group_kernel_map(weight, layer.size, out, point, number) for weight in weights]
        kernels, whole = [pair_matrix(layer, weight, out, number) for weight in weights], weights
        words = f"output channel {out}, input channel {number} of its group"
    else:
        pictures = [kernel_map(weight, layer.size, share_set, point) for weight in weights]
        kernels = whole = [weight[share_set] for weight in weights]
        words = f"share-set {share_set} of {layer.share_sets}"
    # each picture is over the smallest of its own matrix; over the smallest of both they have one scale
    smallest = [_log_of_smallest(matrix) for matrix in whole]
    pictures = [picture + own - min(smallest) for picture, own in zip(pictures, smallest, strict=True)]
    at = point[0] * layer.size[1] + point[1]
    return View(words, tuple(kernel[at] for kernel in kernels), tuple(pictures), seen_from(layer, point))


def _log_of_smallest(matrix: Tensor) -> float:
    magnitude = matrix.detach().double().abs()
    return float(magnitude[magnitude > 0].min().log()) if bool((magnitude > 0).any()) else 0.0


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


def outline(cells: Tensor) -> list[list[tuple[float, float]]]:
    """Return the borders between cells and others, as lines from (x, y) to (x, y); cells: bool (h, w)."""
    h, w = cells.shape
    lines = []
    for y, x in torch.nonzero(cells).tolist():
        for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            if not (0 <= y + dy < h and 0 <= x + dx < w and cells[y + dy, x + dx]):
                middle, along = (x + dx / 2, y + dy / 2), (abs(dy) / 2, abs(dx) / 2)
                ends = ((middle[0] + sign * along[0], middle[1] + sign * along[1]) for sign in (-1, 1))
                lines.append(list(ends))
    return lines


def outside_stronger(values: Tensor, inside: Tensor) -> list[tuple[int, int]]:
    """List the points outside some cells that exceed some point inside them, strongest first.

    values, inside: (h, w). No cells (no branches) give none.
    """
    if not inside.any():
        return []
    stronger = torch.nonzero(~inside & (values > values[inside].min()))
    return sorted(map(tuple, stronger.tolist()), key=lambda p: -float(values[p]))


def draw(
    layer: Layer, shown: View, point: tuple[int, int], network: str, place: str, stem: Path, pdf: bool = False
) -> list[Path]:
    """Draw the two panels of one view to STEM.png. network, place: in words, e.g. of which data and which block."""
    reach, (h, w) = reach_of(layer), layer.size
    low, top = min(float(p.min()) for p in shown.pictures), max(float(p.max()) for p in shown.pictures)
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 5.9), layout="constrained")
    names = ("FC alone, as trained", f"after Locality Injection ({branch_label(layer.kernels)} merged in)")
    for axis, picture, row, name in zip(axes, shown.pictures, shown.rows, names, strict=True):
        image = axis.imshow(picture, cmap="Greys", vmin=low, vmax=top)
        axis.plot(point[1], point[0], marker="P", ms=11, mfc=POINT, mec="black", ls="")
        near = near_share(row, layer.size, point, reach)
        cells = f"{2 * reach + 1}x{2 * reach + 1} cells around it"
        axis.set_title(f"{name}\n{100 * near:.1f} % of this point's |weight| in the {cells}", fontsize=10)
        axis.set_xlabel("input column")
        axis.set_ylabel("input row")
        axis.set_xticks(range(0, w, max(1, w // 8)))
        axis.set_yticks(range(0, h, max(1, h // 8)))
    # marks of what the branches do stand where they have done it
    handles = [Line2D([], [], marker="P", ms=10, mfc=POINT, mec="black", ls="", label="output point")]
    if shown.seen.any():
        stronger = outside_stronger(shown.pictures[1], shown.seen)
        for y, x in stronger[:MOST_MARKED]:
            axes[1].add_patch(Rectangle((x - 0.4, y - 0.4), 0.8, 0.8, fill=False, ec=OUTSIDE, ls="--", lw=2))
        axes[1].add_collection(LineCollection(outline(shown.seen), colors=SEEN, linewidths=2.8), autolim=False)
        handles.append(Line2D([], [], color=SEEN, lw=2.8, label="cells that the branches see"))
        if stronger:
            marked = f"the {MOST_MARKED} strongest of " if len(stronger) > MOST_MARKED else ""
            words = f"{marked}{len(stronger)} points outside them that exceed some inside"
            handles.append(Line2D([], [], color=OUTSIDE, lw=2, ls="--", label=words))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9, facecolor="#dddddd")
    figure.colorbar(image, ax=axes, shrink=0.8, label="ln(|w| / smallest |w| of both matrices); darker is larger")
    where = f"{place}, {shown.words}, output point: row {point[0]}, column {point[1]} (from 0)"
    figure.suptitle(f"{network}\n{where}", fontsize=11)
    return save(figure, stem, pdf)
