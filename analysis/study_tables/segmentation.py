"""The table of a study of segmentation: mIoU of every cell as trained and merged, costs, the IoU of each class."""

from __future__ import annotations

import pandas as pd
from paper_tables.configurations import is_full_recipe
from records import with_setup
from table_parts import listed, mean_std

from repmlp import branches
from repmlp.branches import label as branch_label
from repmlp.runs.key import cell_key

PAPERS = "The paper's recipe."
NOTE = "Not the paper's recipe, so not comparable with its figures."

COLUMNS_NOTE = (
    "mIoU: mean over the classes that occur, ± standard deviation over seeds; other figures are means over seeds. "
    "'changed pixels' (first guesses that merging changes) and 'merge error' (norm of the difference of the logits "
    "over their norm) are the largest of the seeds. Params and MACs are those of the training-time net, the auxiliary "
    "head counted in the params alone; MACs of one {seen}."
)


def study_table(records: pd.DataFrame) -> pd.DataFrame:
    """Make the table of one study of segmentation: mIoU as trained and merged, costs, and the IoU of each class.

    Columns for tile and start are there where rows differ in them.
    """
    records = with_setup(records)
    records["order"] = [branches.order(k) for k in records["kernels"]]
    records["cell"] = [cell_key(config) for config in records["config"]]
    classes = list(dict.fromkeys(name for by_class in records["class_iou_pct"] for name in by_class))
    differing = [name for name in ("tile", "start") if len(set(records[name]) - {"-"}) > 1]
    rows = []
    for (model, _, embedding, _), cell in sorted(
        records.groupby(["model", "order", "embedding", "cell"]), key=lambda group: group[0]
    ):
        rows.append(
            {
                "model": model,
                "branches": branch_label(cell["kernels"].iloc[0]),
                "embedding": embedding,
                **{name: cell[name].iloc[0] for name in differing},
                "mIoU": mean_std(cell["miou_pct"]),
                "merged mIoU": f"{cell['miou_merged_pct'].mean():.2f}",
                "pixel accuracy": f"{cell['pixel_accuracy_pct'].mean():.2f}",
                "params": f"{cell['params'].iloc[0]:,}",
                "MACs": f"{cell['macs'].iloc[0]:,}",
                "changed pixels": f"{cell['merge_disagreements'].max():,}",
                "merge error": f"{cell['merge_error'].max():.1e}",
                **{f"IoU {name}": _mean_iou(cell, name) for name in classes},
            }
        )
    return pd.DataFrame(rows)


def _mean_iou(cell: pd.DataFrame, name: str) -> str:
    """Write the mean IoU of a class over the seeds that have one, "" where none has."""
    values = pd.Series([by_class.get(name) for by_class in cell["class_iou_pct"]], dtype=float).dropna()
    return f"{values.mean():.2f}" if len(values) else ""


def scale_line(records: pd.DataFrame) -> str:
    """Say in one line at which scale a study of segmentation was run."""
    records = with_setup(records)
    first = records.iloc[0]
    data, window = first["config"]["data"], first["config"]["recipe"]["window"]
    precision = first["config"]["trainer"]["precision"]
    steps = records["epochs"] * (records["n_train"] // records["batch_size"])  # the last, smaller batch is left out
    tiles = listed({int(tile) for tile in records["tile"] if tile != "-"})
    starts = " or ".join(f"a backbone's {s}" if s != "scratch" else s for s in sorted(set(records["start"])))
    split = "held out of training" if data["holdout"] else f"of '{data['eval_split']}'"
    parts = [
        f"{first['data']} ({len(first['class_iou_pct'])} classes)",
        f"{listed(records['n_train'])} training images",
        f"{listed(records['epochs'])} epochs",
        f"{listed(steps)} steps of {listed(records['batch_size'])} crops of {_size(data['crop_size'])} pixels",
        f"tiles of {tiles} pixels" if tiles else "",
        "" if precision == "32-true" else f"precision {precision}",
        f"from {starts}",
        f"evaluated after the last epoch on {listed(records['n_eval'])} images {split}",
        f"in windows of {_size(window)}" if window else "whole",
        f"{listed(records['eval_pixels'])} pixels",
    ]
    return ", ".join(part for part in parts if part) + "."


def _size(sides: list[int]) -> str:
    return "x".join(map(str, sides))


def study_note(records: pd.DataFrame) -> str:
    """Write the caption of a study's table."""
    full = all(is_full_recipe(r) for r in records.to_dict("records"))
    window = records.iloc[0]["config"]["recipe"]["window"]
    columns = COLUMNS_NOTE.format(seen="window" if window else "image, taken as a whole")
    return " ".join((scale_line(records), PAPERS if full else NOTE, columns))
