"""The table of a study of classification: top-1 of every cell as trained and merged, gains, costs."""

from __future__ import annotations

from typing import Any

import pandas as pd
import wording
from paper_tables.configurations import is_full_recipe
from records import initial_weights
from table_parts import listed, mean_std

from repmlp import branches
from repmlp.branches import label as branch_label
from repmlp.runs.key import cell_key

PAPERS = "The paper's recipe."
NOTE = (
    "Not the paper's recipe, so not comparable with its figures. Top-1: mean ± standard deviation over n seeds. Gains "
    "are over the network's first row, differences of means; nothing is claimed of them here."
)


def study_table(records: pd.DataFrame) -> pd.DataFrame:
    """Make the table of one study: every cell's accuracy as trained and merged, and its gain over its first cell.

    The gain is the difference of means to the row of the same network with the fewest branches. What it is worth, the
    table of the study's contrasts says.
    """
    records = records.dropna(axis="columns", how="all").copy()  # no columns of other studies
    for name in ("share_sets", "global_perceptron"):  # ResMLP has neither
        if name not in records:
            records[name] = None
    records["share_sets"] = [tuple(s) if isinstance(s, list) else () for s in records["share_sets"]]
    records["kernels"] = [tuple(k) for k in records["kernels"]]
    records["gate"] = [{True: "yes", False: "no"}.get(gate, "-") for gate in records["global_perceptron"]]
    records["cell"] = [cell_key(config) for config in records["config"]]
    records["order"] = [branches.order(k) for k in records["kernels"]]
    records["weights"] = [initial_weights(config) or "" for config in records["config"]]  # from scratch first
    records["start"] = wording.values("model.weights", [weights or None for weights in records["weights"]])
    started = ["start"] if records["start"].nunique() > 1 else []
    # texture and arrangement: whatever a data set's labels are made of
    parts = [
        name
        for name in records.columns
        if name.endswith("_pct") and not name.endswith("_merged_pct") and name not in ("top1_pct", "top5_pct")
    ]
    rows: list[dict[str, Any]] = []
    cells = sorted(
        records.groupby(["model", "share_sets", "gate", "order", "weights", "cell"]), key=lambda cell: cell[0]
    )
    reference: tuple[str, pd.DataFrame] | None = None
    for (model, share_sets, gate, *_), cell in cells:
        if reference is None or reference[0] != model:
            reference = (model, cell)
            gain = ""
        else:
            gain = f"{cell['top1_pct'].mean() - reference[1]['top1_pct'].mean():+.2f}"
        rows.append(
            {
                "model": model,
                "branches": branch_label(cell["kernels"].iloc[0]),
                "share-sets": ", ".join(map(str, share_sets)) or "1",
                "Global Perceptron": gate,
                **{name: cell[name].iloc[0] for name in started},
                "top-1": mean_std(cell["top1_pct"]),
                "merged top-1": f"{cell['top1_merged_pct'].mean():.2f}",
                "gain": gain,
                **{name.removesuffix("_pct").replace("_", " "): f"{cell[name].mean():.2f}" for name in parts},
                "merge error": f"{cell['merge_error'].max():.1e}",
                "params": f"{cell['params'].iloc[0]:,}",
                "MACs": f"{cell['macs'].iloc[0]:,}",
                "s a run": f"{cell['train_seconds'].mean():.0f}",
            }
        )
    return pd.DataFrame(rows)


def scale_line(records: pd.DataFrame) -> str:
    """Say in one line at which scale a study was run."""
    first = records.iloc[0]
    data = ", ".join(sorted(set(records["data"])))
    # `imagenet` stands for any data set in folders
    classes = f" ({first['num_classes']:.0f} classes)" if first.get("num_classes", 0) > 0 else ""
    precisions = {config["trainer"]["precision"] for config in records["config"]}
    precision = "" if precisions == {"32-true"} else f"precision {' and '.join(sorted(precisions))}, "
    held_out = {bool(config["data"].get("holdout")) for config in records["config"]}
    split = {(True,): " held out of training", (False, True): ", of some runs held out of training,"}
    return (
        f"{data}{classes}, {listed(records['n_train'])} training images, {listed(records['epochs'])} epochs, "
        f"batch {listed(records['batch_size'])}, {precision}evaluated on {listed(records['n_eval'])} images"
        f"{split.get(tuple(sorted(held_out)), '')} after the last epoch."
    )


def study_note(records: pd.DataFrame) -> str:
    """Write the caption of a study's table."""
    full = all(is_full_recipe(r) for r in records.to_dict("records"))
    shuffled = wording.of_branches(map(branch_label, records["kernels"]))
    return " ".join(filter(None, [scale_line(records), PAPERS if full else NOTE, shuffled]))
