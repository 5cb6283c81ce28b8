"""Images, label maps and predictions side by side, with the lines between tiles."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image


def colour(masks: Iterable[np.ndarray], colours: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Draw masks in the classes' colours, black where nothing is labelled (255): (h, w) -> (h, w, 3), uint8."""
    table = np.zeros((256, 3), dtype=np.uint8)
    table[: len(colours)] = colours
    return [table[mask] for mask in masks]


def save_panels(
    path: Path,
    rows: Mapping[str, Sequence[np.ndarray]],
    titles: Sequence[str],
    tile: int,
    classes: Mapping[str, Sequence[int]],
    width: float,
) -> None:
    """Draw rows of panels, the lines between tiles on all predictions, and the classes' colours below.

    rows: by name, each image, truth and predictions, (h, w, 3). titles: of the columns. classes: colour of each, 0 to
    255, by its name. width: inches of a panel.
    """
    first = next(iter(rows.values()))
    height = width * first[0].shape[0] / first[0].shape[1]
    figure = Figure((width * len(first) + 0.2, (height + 0.08) * len(rows) + 0.7), layout="constrained")
    axes = figure.subplots(len(rows), len(first), squeeze=False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, fontsize=6)
        for number, (axis, picture) in enumerate(zip(line, pictures, strict=True)):
            axis.imshow(picture)
            axis.set_xticks([])
            axis.set_yticks([])
            if number > 1:
                for y in range(tile, picture.shape[0], tile):
                    axis.axhline(y - 0.5, color="white", linewidth=0.5)
                for x in range(tile, picture.shape[1], tile):
                    axis.axvline(x - 0.5, color="white", linewidth=0.5)
    patches = [Patch(color=np.array(colour) / 255, label=name) for name, colour in classes.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize=6, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    Image.open(drawn).convert("RGB").quantize(256).save(path, optimize=True)  # a third of the size
