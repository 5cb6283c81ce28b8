"""Curves of a study: accuracy or mIoU and loss by epoch, and how local its kernels are, by layer and by epoch."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import wording
from figures import save, style_of
from matplotlib.ticker import MaxNLocator
from records import initial_weights, layers_of

from repmlp import branches
from repmlp.branches import label as branch_label
from repmlp.locality import uniform_profile
from repmlp.runs.key import cell_key

# by task: the field of a curve, what it is, what the loss is, and the columns in which runs of one network may differ,
# each with the setting that it is or the words before it
DRAWN = {
    "classification": (
        *("top1_pct", "top-1", "cross-entropy"),
        {"share_sets": "model.share_sets", "global_perceptron": "model.global_perceptron", "start": "model.weights"},
    ),
    "segmentation": (
        *("miou_pct", "mIoU", "cross-entropy, both heads"),
        {"embedding": "embeddings", "tile": "tiles of", "start": "model.weights"},
    ),
}


def curves_of(runs: pd.DataFrame, field: str) -> list[pd.Series]:
    """Return one field of every run's curve, by epoch counted from 1; what was measured after the last epoch too."""
    found = []
    for run in runs.to_dict("records"):
        curve = {entry["epoch"] + 1: entry[field] for entry in run["curve"] if field in entry}
        last = {run["epochs"]: run[field]} if run.get(field) is not None else {}
        found.append(pd.Series({**last, **curve}, dtype=float).sort_index())
    return found


def mean_of(curves: list[pd.Series]) -> pd.Series:
    """Return the mean at the epochs that all have: runs may have been evaluated at different ones."""
    return pd.concat(curves, axis=1, join="inner").sort_index().mean(axis=1)


def index_curve(runs: pd.DataFrame, which: str) -> pd.Series:
    """Return the mean over runs and spatial layers of the locality index, by epoch from 1; of runs that kept it."""
    curves = [
        pd.Series(
            {
                e["epoch"] + 1: sum(e["locality"][which]) / len(e["locality"][which])
                for e in curve
                if e.get("locality", {}).get(which)
            },
            dtype=float,
        )
        for curve in runs["curve"]
    ]
    kept = [curve for curve in curves if len(curve)]
    return mean_of(kept) if kept else pd.Series(dtype=float)


def near_share(runs: pd.DataFrame, which: str, distance: int = 1) -> pd.Series:
    """Return the mean over runs of the share of |weight| within `distance`, by spatial layer."""
    return pd.concat(
        # a map of one cell has distance 0 alone; the last entry is always 1
        [pd.Series([layer[which][: distance + 1][-1] for layer in locality]) for locality in runs["locality"]],
        axis=1,
    ).mean(axis=1)


def draw(records: pd.DataFrame, title: str, stem: Path, task: str = "classification", pdf: bool = False) -> list[Path]:
    """Draw one row of panels a network: top-1 or mIoU, training loss, locality by layer and by epoch.

    Accuracy and loss of every run, and their mean where all of a cell were evaluated; of locality the mean.

    The last two show merged kernels and bare ones; they are empty for a network without spatial layers, and the last is
    left out where no run kept its locality by epoch.
    """
    measure, word_of_measure, word_of_loss, differing = DRAWN[task]
    records = records.assign(
        label=[branch_label(kernels) for kernels in records["kernels"]],
        cell=[cell_key(c) for c in records["config"]],
        start=[initial_weights(config) for config in records["config"]],
        order=[branches.order(kernels) for kernels in records["kernels"]],
    )
    for field, setting in differing.items():
        if records.groupby("model")[field].agg(lambda column: len(set(map(str, column)))).max() > 1:
            written = wording.values(setting, records[field])
            records["label"] += ["" if each == "-" else f", {wording.phrase(setting, each)}" for each in written]
    records["locality"] = layers_of(records)
    models = sorted(set(records["model"]))
    panels = 4 if any(entry.get("locality", {}).get("trained") for curve in records["curve"] for entry in curve) else 3
    figure, axes = plt.subplots(
        len(models), panels, figsize=(5 * panels, 4.2 * len(models)), layout="constrained", squeeze=False
    )
    for row, model in zip(axes, models, strict=True):
        of_model = records[records["model"] == model]
        for number, ((_, label, _), runs) in enumerate(of_model.groupby(["order", "label", "cell"])):
            colour, marker = style_of(number)
            style = {"color": colour, "marker": marker, "ms": 4}
            label = f"{label} (n={len(runs)})"
            for axis, field in zip(row, (measure, "train_loss"), strict=False):
                each = curves_of(runs, field)
                for curve in each if len(each) > 1 else ():
                    axis.plot(curve, **{**style, "ms": 2.5}, lw=0.6, alpha=0.35)
                axis.plot(mean_of(each), **style, label=label)
            row[2].plot(100 * near_share(runs, "injected"), **style, label=label)
            row[2].plot(100 * near_share(runs, "trained"), color=style["color"], ls=":")
            if panels == 4:
                row[3].plot(index_curve(runs, "injected"), **style, label=label)
                row[3].plot(index_curve(runs, "trained"), color=style["color"], ls=":")
        for axis in row[2:]:
            axis.set_visible(any(of_model["locality"]))
        layers = next((layers for layers in of_model["locality"] if layers), [])
        flat = [uniform_profile(tuple(layer["size"]))[:2][-1] for layer in layers]
        row[2].plot([100 * share for share in flat], color="grey", ls="--", label="flat kernel")
        for axis in row[2:]:
            axis.plot([], [], color="black", ls=":", label="FC alone, before injection")
            low, high = min(0, axis.get_ylim()[0]), axis.get_ylim()[1]
            axis.set_ylim(low, high + 0.5 * (high - low))  # room for the legend
        for axis, name, label in zip(
            row,
            (
                *(f"{word_of_measure} of the net as trained", "training loss", "share of |weight| within distance 1"),
                "locality index, mean over layers",
            ),
            ("%", word_of_loss, "%", "0: flat, 1: all on the point"),
            strict=False,
        ):
            axis.set_title(f"{model}: {name}", fontsize=10)
            axis.set_ylabel(label)
            axis.set_xlabel("epoch" if axis is not row[2] else "spatial layer")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    several = records.groupby("cell").size().max() > 1
    title += ": means over n runs; thin lines are the runs one by one" if several else ""
    note = wording.of_branches(records["label"])
    figure.suptitle(f"{title}\n{note}" if note else title)
    return save(figure, stem, pdf)
