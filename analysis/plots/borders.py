"""Accuracy by distance from the lines between tiles, of all networks of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from figures import save
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from repmlp.statistics import bootstrap_weights, interval, pooled


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
    axes[1].set_title(
        f"minus that of the same pixels seen {records[0]['far']} or more pixels from all lines", fontsize=10
    )
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
    axes[2].set_title(f"within {records[0]['near']} pixels minus far; hollow: minus the control's too", fontsize=10)
    axes[2].xaxis.set_major_locator(MaxNLocator(6))
    axes[2].grid(alpha=0.3)
    control = "; dashed: the control, a network without tiles" if any(not r["tiled"] for r in records) else ""
    figure.suptitle(f"{title}: one run each; bands and bars: 95 % over blocks of {records[0]['block']} images{control}")
    return save(figure, stem, pdf)
