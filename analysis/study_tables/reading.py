"""What the runs of a study with a control show, and what they do not, in a sentence a network; from the numbers alone.

A control is a branch on a shuffled grid ("3s") beside the same branch on the image's own ("3").
"""

from __future__ import annotations

import dataclasses

import pandas as pd
from records import error_of_difference

from repmlp.branches import BranchSpec, parse_all
from repmlp.runs.key import cell_key

UNFITTED = 0.5  # nats by which the training loss has to be higher for a network to have fitted its images less


def reading(records: pd.DataFrame) -> str:
    """Say for every network of a study what a branch brings, what its control brings, and how sure that is.

    records: of one study and one setting; columns as `load_records` gives them.
    Returns "" where no network has runs without branches, with one branch, and with the same branch shuffled.
    """
    sentences = [sentence for _, runs in records.groupby("model") if (sentence := _of_network(runs))]
    if not sentences:
        return ""
    seeds = records["seed"].nunique()
    doubt = (
        "One seed: the errors are those of the test images alone; another seed can differ by more."
        if seeds == 1
        else f"Means of {seeds} seeds, errors of the differences over them; what is clear, the table of contrasts says."
    )
    return " ".join([*sentences, doubt])


def _of_network(records: pd.DataFrame) -> str:
    """Write the sentence of one network; "" where it has no control, or several settings besides its branches."""
    cells: dict[tuple[BranchSpec, ...], pd.DataFrame] = {}
    for _, runs in records.groupby([cell_key(config) for config in records["config"]]):
        branches = parse_all(runs["kernels"].iloc[0])
        if branches in cells:
            return ""
        cells[branches] = runs
    for branches, shuffled in cells.items():
        if len(branches) != 1 or not branches[0].shuffled:
            continue
        branch = dataclasses.replace(branches[0], shuffled=False)
        if () in cells and (branch,) in cells:
            return _sentence(branch.label, cells[()], cells[branch,], shuffled)
    return ""


def _sentence(branch: str, bare: pd.DataFrame, local: pd.DataFrame, shuffled: pd.DataFrame) -> str:
    """Write what a branch brings to a network, and what it brings on a shuffled grid; each: the runs of a cell."""
    parts = [
        f"{part} {_difference(local, bare, f'{part}_pct'):+.1f}"
        for part in ("texture", "arrangement")
        if f"{part}_pct" in local and local[f"{part}_pct"].notna().all()
    ]
    words = (
        f"{bare['model'].iloc[0]}: a {branch} branch brings {_points(local, bare)}"
        f"{' (' + ', '.join(parts) + ')' if parts else ''}, the same branch on a shuffled grid "
        f"{_points(shuffled, bare)}."
    )
    losses = [sum(curve[-1]["train_loss"] for curve in runs["curve"]) / len(runs) for runs in (bare, local)]
    if losses[0] - losses[1] > UNFITTED:
        words += (
            f" Without branches it has fitted its training images less (loss {losses[0]:.2f} against {losses[1]:.2f}), "
            "so a part of that may be a matter of time."
        )
    return words


def _points(runs: pd.DataFrame, others: pd.DataFrame) -> str:
    return f"{_difference(runs, others):+.1f} ± {error_of_difference(runs, others):.1f} points"


def _difference(runs: pd.DataFrame, others: pd.DataFrame, column: str = "top1_pct") -> float:
    """Return a difference of means in points."""
    return runs[column].mean() - others[column].mean()
