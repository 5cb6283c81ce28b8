"""The paper's kernel heatmap: what one output point sees, as trained and after Locality Injection.

Paper: RepMLPNet Figure 3 and Appendix A.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from figures import save
from matplotlib.collections import LineCollection
from matplotlib.patches import Rectangle
from torch import Tensor

from repmlp import InjectedLinear, SetSharingFC
from repmlp.branches import parse_all
from repmlp.locality import kernel_map, locality_profile
from repmlp.models.build import SPATIAL_LAYERS

Layer = SetSharingFC | InjectedLinear
MOST_MARKED = 8  # red squares a panel; more would cover the picture
# red squares a panel; more would cover the picture


def spatial_layers(model: torch.nn.Module) -> list[tuple[str, Layer]]:
    """List the spatial layers of a network in order, with their names; ValueError where there are none."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, SPATIAL_LAYERS)]
    if not layers:
        raise ValueError("the network has no layers that convolutions can be injected into, or they were merged")
    return layers


def seen_from(layer: Layer, point: tuple[int, int]) -> Tensor:
    """Say which cells the branches see from a point: bool (h, w), none without branches."""
    if layer.local_perceptron is None:
        return torch.zeros(layer.size, dtype=torch.bool)
    return layer.local_perceptron.taps(point)


def reach_of(layer: Layer) -> int:
    """Return how far from the point the branches on the map itself reach, in cells and within the map; at least 1."""
    reach = max((max(spec.padding) for spec in parse_all(layer.kernels) if not spec.shuffled), default=1)
    return min(max(reach, 1), max(layer.size) - 1)


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


def draw(layer: Layer, title: str, share_set: int, point: tuple[int, int], stem: Path) -> list[Path]:
    """Draw the two panels of one layer to STEM.png and STEM.pdf."""
    seen, reach = seen_from(layer, point), reach_of(layer)
    with torch.no_grad():
        weights = [layer.merged(branches=injected)[0] for injected in (False, True)]
    panels = [kernel_map(weight, layer.size, share_set, point) for weight in weights]
    low, top = min(float(panel.min()) for panel in panels), max(float(panel.max()) for panel in panels)
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 5.8), layout="constrained")
    for axis, panel, weight, name in zip(
        axes, panels, weights, ("trained FC kernel", "after Locality Injection"), strict=True
    ):
        image = axis.imshow(panel, cmap="viridis", vmin=low, vmax=top)
        stronger = outside_stronger(panel, seen)
        for y, x in stronger[:MOST_MARKED]:
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, ec="red", ls="--", lw=1.5))
        axis.add_collection(LineCollection(outline(seen), colors="deepskyblue", linewidths=2.5), autolim=False)
        axis.add_patch(Rectangle((point[1] - 0.5, point[0] - 0.5), 1, 1, fill=False, ec="magenta", lw=2.5))
        near = locality_profile(weight, layer.size)[reach]
        outside = f"\n{len(stronger)} points outside the blue cells exceed some inside" if seen.any() else ""
        axis.set_title(f"{name}\n{100 * near:.1f} % of |weight| within distance {reach}{outside}", fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(image, ax=axes, shrink=0.8, label="log(|w| / min |W|)")
    figure.suptitle(f"{title}, share-set {share_set}, output point {point} (from 0)", fontsize=11)
    return save(figure, stem, pdf=True)
