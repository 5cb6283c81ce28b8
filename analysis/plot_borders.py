"""Show a study's accuracy by distance from the tiles' borders, from what experiments/borders.py counted.

    python analysis/plot_borders.py segmentation_small      # -> results/segmentation_small/borders.png, .md, .csv
    python analysis/plot_borders.py STUDY --large FOLDER    # and every picture by itself, larger

Where borders.py left images with their guesses (borders/KEY.npz), a sheet of them is drawn too: borders/KEY.png.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from border_statistics import differences, load, sentence
from options import Parser
from plots.borders import draw
from plots.panels import colour, save_panels
from table_parts import emit

NOTE = (
    "{n_images} images of {data}, tiles of {tile} pixels, every pixel seen under {views} phases of the grid. near: "
    "within {near} pixels of a line; far: the same pixels where they are at least {far} pixels from all lines; a "
    "network without tiles lies under the same grid and is the control. Intervals: 95 %, over blocks of {block} "
    "consecutive images, the same ones for all networks; they do not hold what another seed of the training would "
    "change. changed: pixels that are not guessed the same in all phases. jumps: how often the guesses of "
    "neighbours differ across a line, and of the same neighbours where the line is elsewhere."
)


def table(records: Sequence[Mapping[str, Any]], found: pd.DataFrame) -> pd.DataFrame:
    """Write the differences beside the accuracies."""
    rows = []
    for record, row in zip(records, found.itertuples(), strict=True):
        summary = record["summary"]
        rows.append(
            {
                "network": record["label"],
                "accuracy %": f"{summary['accuracy_pct']:.2f}",
                "near %": f"{summary['near_pct']:.2f}",
                "far %": f"{summary['far_pct']:.2f}",
                "near - far": f"{row.difference:+.2f} ({row.low:+.2f} to {row.high:+.2f})",
                "minus the control's": ""
                if np.isnan(row.over_control)
                else f"{row.over_control:+.2f} ({row.control_low:+.2f} to {row.control_high:+.2f})",
                "changed %": f"{summary['differing_pct']:.2f}",
                "jumps across a line %": f"{summary['seam_pct']:.2f}",
                "elsewhere %": f"{summary['no_seam_pct']:.2f}",
                "difference": "({:+.2f} to {:+.2f})".format(*summary["seam_interval"])
                if summary["seam_interval"]
                else "",
            }
        )
    return pd.DataFrame(rows)


def pictures(path: Path, large: Path | None = None) -> None:
    """Draw what borders.py left of some images: image, truth and prediction, a sheet of all and, in `large`, each."""
    with np.load(path, allow_pickle=False) as found:
        classes = {str(name): found["colours"][i].tolist() for i, name in enumerate(found["classes"])}
        tile = int(found["tile"])
        rows = {
            str(name): [found[f"image{i}"], *colour((found[f"truth{i}"], found[f"guess{i}"]), found["colours"])]
            for i, name in enumerate(found["names"])
        }
    titles = ("image", "truth", "prediction")
    drawn = [(path.with_suffix(".png"), rows, 2.0)]
    if large is not None:
        drawn += [(large / f"{path.stem}_{name}.png", {name: row}, 4.0) for name, row in rows.items()]
    for where, those, width in drawn:
        save_panels(where, those, titles, tile, classes, width)
        print(f"wrote {where}")


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, "one", ("tables", "figures"))
    parser.add_argument("--large", type=Path, metavar="FOLDER", help="where to draw every picture by itself, larger")
    options = parser.parse_args(argv)
    folder = options.results / options.study
    try:
        records = load(folder / "borders")
        found = differences(records)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for record in records:
        print(f"{sentence(record)}\n")
    title = f"Borders of tiles, study {options.study}"
    emit("borders", title, NOTE.format(**records[0]), table(records, found), folder, options.latex)
    for path in draw(records, found, title, folder / "borders", options.pdf):
        print(f"wrote {path}")
    for path in sorted((folder / "borders").glob("*.npz")):
        pictures(path, options.large)


if __name__ == "__main__":
    main()
