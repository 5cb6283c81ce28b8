"""The paper's kernel heatmap as a figure, for TensorBoard and for the papers' pictures.

Papers: RepMLPNet Figure 3 and Appendix A; RepMLP Figure 5, of a pair of channels of a group-wise FC. Darker is larger:
the natural logarithm of |w| over the smallest |w| of both matrices, so that both panels have one scale.

Needs matplotlib.
"""

from __future__ import annotations

import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from torch import Tensor

from repmlp.branches import label
from repmlp.kernels import Layer, View, near_share, outside_stronger, reach_of

MOST_MARKED = 8  # strong points outside the branches' cells; more would cover the picture
# marks that differ in shape and, for any eye, from grey and from each other
SEEN, OUTSIDE, POINT = "#D55E00", "#56B4E9", "white"


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


def heatmap(layer: Layer, shown: View, point: tuple[int, int], network: str, place: str) -> Figure:
    """Draw the two panels of one view of a layer. network, place: in words, e.g. of which data and which block."""
    reach, (h, w) = reach_of(layer), layer.size
    low, top = min(float(p.min()) for p in shown.pictures), max(float(p.max()) for p in shown.pictures)
    figure = Figure(figsize=(10.5, 5.9), layout="constrained")
    axes = figure.subplots(1, 2)
    names = ("FC alone, as trained", f"after Locality Injection ({label(layer.kernels)} merged in)")
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
