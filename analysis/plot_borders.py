"""Draw a study's accuracy by distance from the tiles' borders, from what experiments/borders.py counted.

python analysis/plot_borders.py segmentation_small      # -> results/segmentation_small/borders.png, .pdf, .md, ...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from figures import save
from matplotlib.axes import Axes
from options import Parser
from table_parts import emit

from repmlp.statistics import bootstrap_weights, interval, pooled

SETTING = ("data", "tile", "step", "margin", "bin", "block", "near", "far", "n_images")
NOTE = (
    "{n_images} images of {data}, tiles of {tile} pixels, every pixel seen under {views} phases of the grid. near: "
    "within {near} pixels of a line; far: the same pixels where they are at least {far} pixels from all lines; a "
    "network without tiles lies under the same grid and is the control. Intervals: 95 %, over blocks of {block} "
    "consecutive images, the same ones for all networks; they do not hold what another seed of the training would "
    "change. changed: pixels that are not guessed the same in all phases. jumps: how often the guesses of "
    "neighbours differ across a line, and of the same neighbours where the line is elsewhere."
)


def load(folder: Path) -> list[dict[str, Any]]:
    """Read what was counted for every network, those with tiles first; counts as arrays (images, bins).

    Raises ValueError where there is nothing, a file is damaged, or two were not counted over the same pixels.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text())
            counts = {name: np.array(record[name]) for name in ("correct", "labelled", "correct_far")}
            for name in ("model", "key", "tiled", "summary", "distances", "views", *SETTING):
                record[name]  # or KeyError
            found.append({**record, **counts, "path": path})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is none of borders.py's files ({error}): run it again") from error
    if not found:
        raise ValueError(f"nothing was counted in {folder}: run experiments/borders.py checkpoint=FILE first")
    first = found[0]
    for other in found[1:]:
        for name in SETTING:
            if other[name] != first[name]:
                raise ValueError(
                    f"{first['path']} has {name}={first[name]} and {other['path']} {name}={other[name]}: "
                    "run experiments/borders.py with the same settings for all networks"
                )
        if not np.array_equal(other["labelled"], first["labelled"]):
            raise ValueError(f"{first['path']} and {other['path']} are of different images: run one of them again")
    names = [record["model"] for record in found]
    for record in found:
        again = names.count(record["model"]) > 1
        record["label"] = f"{record['model']} {record['key']}" if again else record["model"]
    return sorted(found, key=lambda record: (not record["tiled"], record["label"]))


def differences(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return near - far of every network and that less the control's, in points; one row a network.

    Columns: difference, low, high; over_control, control_low, control_high, NaN for controls and where there is none.
    The control is the mean of the networks without tiles, over the same images and the same resamples.
    """
    weights = bootstrap_weights(records[0]["n_images"], records[0]["block"])
    near = np.array(records[0]["distances"]) < records[0]["near"]
    found, samples = [], []
    for record in records:
        # (images, bins) -> (images,)
        part = (record["correct"] - record["correct_far"])[:, near].sum(axis=1)
        whole = record["labelled"][:, near].sum(axis=1)
        found.append(100 * pooled(part, whole))
        samples.append(100 * pooled(part, whole, weights))
    controls = [i for i, record in enumerate(records) if not record["tiled"]]
    rows = []
    for i, record in enumerate(records):
        low, high = interval(samples[i])
        over, over_low, over_high = (float("nan"),) * 3
        if controls and record["tiled"]:
            over = found[i] - np.mean([found[c] for c in controls])
            over_low, over_high = interval(samples[i] - np.mean([samples[c] for c in controls], axis=0))
        rows.append([float(each) for each in (found[i], low, high, over, over_low, over_high)])
    columns = ["difference", "low", "high", "over_control", "control_low", "control_high"]
    return pd.DataFrame(rows, columns=columns, index=[record["label"] for record in records])


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


def draw_curves(axes: Sequence[Axes], records: Sequence[Mapping[str, Any]]) -> None:
    """Draw accuracy by distance less that of the same pixels seen far from all lines, and on the left both added up.

    Accuracy as it was counted would show what lies at the pixels that have a distance more often than others.
    """
    weights = bootstrap_weights(records[0]["n_images"], records[0]["block"])
    at = np.array(records[0]["distances"])
    far = at >= records[0]["far"]
    for number, record in enumerate(records):
        part, whole = record["correct"] - record["correct_far"], record["labelled"]
        seen_far = [record[name][:, far].sum(axis=1) for name in ("correct", "labelled")]
        for axis, base in ((axes[0], True), (axes[1], False)):
            # (1 or resamples, bins)
            curve, samples = (
                100 * (pooled(part, whole, w) + (pooled(*seen_far, w)[:, None] if base else 0))
                for w in (np.ones((1, len(part))), weights)
            )
            style = {"color": f"C{number}", "ls": "-" if record["tiled"] else "--"}
            axis.plot(at + record["bin"] / 2, curve[0], marker="o", ms=3, label=record["label"], **style)
            axis.fill_between(at + record["bin"] / 2, *interval(samples), color=f"C{number}", alpha=0.15, lw=0)
    for axis in axes:
        axis.set_xlabel("pixels to the nearest line between tiles")
        axis.grid(alpha=0.3)


def draw(
    records: Sequence[Mapping[str, Any]], found: pd.DataFrame, title: str, stem: Path, pdf: bool = False
) -> list[Path]:
    """Draw accuracy by distance, its difference to the same pixels seen far from all lines, and near - far."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    draw_curves(axes[:2], records)
    axes[0].set_title("accuracy, position in the image taken out", fontsize=10)
    axes[0].set_ylabel("%")
    axes[0].legend(fontsize=7)
    axes[1].set_title(f"less that of the same pixels seen {records[0]['far']} pixels from all lines", fontsize=10)
    axes[1].set_ylabel("points")
    axes[1].axhline(0, color="black", lw=0.8)
    for number, row in enumerate(found.itertuples()):
        for middle, low, high, shift, fill in (
            (row.difference, row.low, row.high, -0.12, "full"),
            (row.over_control, row.control_low, row.control_high, 0.12, "none"),
        ):
            if not np.isnan(middle):
                axes[2].plot([low, high], [number + shift] * 2, color=f"C{number}")
                axes[2].plot(middle, number + shift, marker="o", color=f"C{number}", fillstyle=fill)
    axes[2].axvline(0, color="black", lw=0.8)
    axes[2].set_yticks(range(len(records)), found.index, fontsize=8)
    axes[2].set_ylim(len(records) - 0.5, -0.5)
    axes[2].set_xlabel("points")
    axes[2].set_title(f"within {records[0]['near']} pixels less far; hollow: minus the control's", fontsize=10)
    axes[2].grid(alpha=0.3)
    figure.suptitle(title)
    return save(figure, stem, pdf)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, "one", ("tables", "figures"))
    options = parser.parse_args(argv)
    folder = options.results / options.study
    try:
        records = load(folder / "borders")
        found = differences(records)
    except ValueError as error:
        sys.exit(f"error: {error}")
    title = f"Borders of tiles, study {options.study}"
    emit("borders", title, NOTE.format(**records[0]), table(records, found), folder, options.latex)
    for path in draw(records, found, title, folder / "borders", options.pdf):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
