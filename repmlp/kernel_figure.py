"""The paper's kernel heatmap: what one output point sees, of the FC alone and after Locality Injection.

Papers: RepMLPNet Figure 3 and Appendix A; RepMLP Figure 5, of a pair of channels of a group-wise FC. Darker is larger:
the natural logarithm of |w| over the smallest |w| of both matrices, so that both panels have one scale. The commands
that make figures and the training that shows them while it goes on draw the same one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from repmlp.branches import label as branch_label
from repmlp.branches import parse_all
from repmlp.injection import InjectedLinear
from repmlp.layers import SetSharingFC
from repmlp.locality import channel_pair, group_kernel_maps, kernel_maps, seen_cells
from repmlp.repmlp_block import PartitionPerceptron

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Layer = SetSharingFC | InjectedLinear | PartitionPerceptron
MOST_MARKED = 8  # strong points outside the branches' cells; more would cover the picture
# marks that differ in shape and, for any eye, from grey and from each other
SEEN, OUTSIDE, POINT = "#D55E00", "#56B4E9", "white"
DPI = 110  # pixels an inch, as of all figures that are committed


@dataclass(frozen=True)
class View:
    """One output point of one kernel: the FC's row and the merged one, (h*w,) each, and both as pictures, (h, w).

    words: which kernel of the layer it is. seen: cells that the branches see from the point, bool (h, w).
    """

    words: str
    rows: tuple[Tensor, Tensor]
    pictures: tuple[Tensor, Tensor]
    seen: Tensor


def view(layer: Layer, share_set: int, channels: tuple[int, int], point: tuple[int, int]) -> View:
    """Look at one output point (y, x) of a layer.

    share_set: of a set-sharing FC. channels: of a group-wise FC, (output channel, input channel within its group).
    Raises ValueError where the layer has no such share-set, channel or point.
    """
    with torch.no_grad():
        weights = [layer.merged(branches=injected)[0].cpu() for injected in (False, True)]
    if isinstance(layer, PartitionPerceptron):
        out, number = channels
        pictures = group_kernel_maps(weights, layer.size, out, point, number)
        kernels = [channel_pair(weight, layer.size, out, number) for weight in weights]
        words = f"output channel {out}, input channel {number} of its group"
    else:
        pictures = kernel_maps(weights, layer.size, share_set, point)
        kernels = [weight[share_set] for weight in weights]
        words = f"share-set {share_set} of {layer.share_sets}"
    at = point[0] * layer.size[1] + point[1]
    # (h*w,) -> (h, w)
    seen = seen_cells(layer)[at].view(layer.size)
    return View(words, tuple(kernel[at] for kernel in kernels), tuple(pictures), seen)


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


def draw(layer: Layer, shown: View, point: tuple[int, int], network: str, place: str) -> Figure:
    """Draw the two panels of one view, in matplotlib, without its pyplot: nothing has to be closed.

    shown: of `view`, for the same layer and point. network, place: in words, e.g. of which data and which block.
    """
    # here, because the library works without them
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    reach, (h, w) = reach_of(layer), layer.size
    low, top = min(float(p.min()) for p in shown.pictures), max(float(p.max()) for p in shown.pictures)
    figure = Figure(figsize=(10.5, 5.9), dpi=DPI, layout="constrained")
    axes = figure.subplots(1, 2)
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
    return figure


def pixels(figure: Figure) -> Tensor:
    """Return a figure of `draw` as a picture, (height, width, 3), uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    # (height*width*4,) -> (height, width, 4), of which the last is opacity
    return torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8).view(height, width, 4)[..., :3]


def layer_title(name: str) -> str:
    """Name a layer as people do: "stage 3, block 10" for stages.2.9.mix or layer3.9.mix, "block 4" for blocks.3.mix."""
    place = layer_place(name)
    if place is None:
        return name
    return f"stage {place[0]}, block {place[1]}" if len(place) == 2 else f"block {place[0]}"


def layer_place(name: str) -> tuple[int, ...] | None:
    """Return the stage and block of a module's name, or its block alone, counted from 1; None where it names none."""
    if found := re.search(r"(?:^|\.)stages\.(\d+)\.(\d+)\.", name):
        return int(found[1]) + 1, int(found[2]) + 1
    if found := re.search(r"(?:^|\.)layer(\d+)\.(\d+)\.", name):  # torchvision's names: stages from 1, blocks from 0
        return int(found[1]), int(found[2]) + 1
    found = re.search(r"(?:^|\.)blocks\.(\d+)\.", name)
    return (int(found[1]) + 1,) if found else None
