"""Set the records of segmentation beside the paper's Table 6, and make one table for every study of segmentation.

`make_tables.py` writes them. Figures of another data set or recipe than the paper's never stand in its table.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pandas as pd
import timm
import torch
from table_parts import listed, mean_std, read_paper

from repmlp import branches, build_model
from repmlp.cost import count_macs, count_params
from repmlp.runs.key import branch_label, cell_key, determining

CLASSES = 19  # of Cityscapes
IMAGES = (2_975, 500)
BASE: dict[str, Any] = {"arch": "upernet", "decoder_channels": 512, "auxiliary_channels": 256}
D256 = {**BASE, "encoder": "repmlpnet_d256", "img_size": 256, "kernels": [1, 3]}
MODELS: dict[str, dict[str, Any]] = {
    "upernet_resnet101": {**BASE, "encoder": "resnet101c", "kernels": []},
    "upernet_d256": {**D256, "embed_kernel": 3},
    "upernet_d256_conv5": {**D256, "embed_kernel": 5},
}
# 80,000 steps: 216 epochs of 371. The paper says no more; the rest is mmsegmentation's UperNet with AdamW.
RECIPE: dict[str, Any] = {
    "epochs": 216, "batch_size": 8, "lr_per_256": 0.00192, "weight_decay": 0.01, "betas": [0.9, 0.999],
    "warmup_epochs": 4, "schedule": "poly", "clip_norm": 5.0, "label_smoothing": 0.0, "auxiliary_weight": 0.4,
    "window": None,
}  # fmt: skip
DATA: dict[str, Any] = {
    "name": "cityscapes", "label": "cityscapes", "train_split": "train", "eval_split": "val", "crop_size": [512, 1024],
    "scale": [0.5, 2.0], "n_train": None, "holdout": 0.0,
}  # fmt: skip


def is_full_recipe(record: Mapping[str, Any]) -> bool:
    """Say whether a record is one of Table 6: its network and recipe, all of Cityscapes, a backbone trained before."""
    config = determining(record["config"])
    model = {k: v for k, v in config["model"].items() if k != "backbone"}
    return (
        config["model"].get("backbone") is not None
        and model == MODELS.get(record["model"])
        and config["recipe"] == RECIPE
        and config["data"] == DATA
        and (record["n_train"], record["n_eval"]) == IMAGES
    )


@cache
def counts(name: str, size: tuple[int, int]) -> tuple[int, int]:
    """Count (params, MACs of one image of `size` pixels) of a row's net, merged and without the auxiliary head.

    Raises ModuleNotFoundError without segmentation_models.pytorch.
    """
    with torch.device("meta"):
        model = build_model({**MODELS[name], "auxiliary_channels": 0}, CLASSES, inference_mode=True)
    return count_params(model), count_macs(model, size)


def paper_table(records: pd.DataFrame) -> pd.DataFrame:
    """Make Table 6: the paper's costs and ours, the paper's mIoU, and ours by the full recipe on Cityscapes.

    A configuration has a row of its own: runs that start from other weights, or in another precision, are not averaged.
    Raises ModuleNotFoundError without segmentation_models.pytorch.
    """
    paper = read_paper()
    full = [r for r in records.to_dict("records") if is_full_recipe(r)]
    rows = []
    for row in paper[paper["table"] == "6"].itertuples():
        height, width = map(int, row.input.split())
        params, macs = counts(row.model, (height, width))
        printed = float(row.macs_printed)
        cells: dict[str, dict[int, Mapping[str, Any]]] = {}
        for record in full:
            if record["model"] == row.model:
                # by seed: two studies may hold the same run
                cells.setdefault(cell_key(record["config"]), {})[record["seed"]] = record
        for by_seed in [cells[key] for key in sorted(cells)] or [{}]:
            ours = pd.Series([r["miou_pct"] for r in by_seed.values()], dtype=float)
            first = next(iter(by_seed.values()), None)
            rows.append(
                {
                    "backbone": row.label,
                    "paper MACs G": row.macs_printed,
                    "our MACs G": f"{macs / 1e9:.2f}",
                    "MACs difference %": f"{100 * (macs / 1e9 / printed - 1):+.2f}",
                    "our params": f"{params:,}",
                    "paper mIoU": f"{row.miou_pct:.2f}",
                    "ours on Cityscapes": mean_std(ours),
                    "difference": f"{ours.mean() - row.miou_pct:+.2f}" if len(ours) else "",
                    "our runs": f"{start(first['config'])}, {first['config']['trainer']['precision']}" if first else "",
                }
            )
    return pd.DataFrame(rows)


def paper_note(records: pd.DataFrame) -> str:
    """Write Table 6's caption, which says where the figures are that do not stand in it."""
    others = sorted({r["study"] for r in records.to_dict("records") if not is_full_recipe(r)})
    where = f": see study {', '.join(others)}" if others else ""
    return (
        "Paper: RepMLPNet Table 6 (UperNet, Cityscapes val, single scale). Our counts: 19 classes, a decoder of 512 "
        "channels, no auxiliary head, RepMLPNet merged; MACs of one image of 1024x2048. 'ours on Cityscapes' and "
        "'difference' hold records of the full recipe alone (all 2,975 images, 216 epochs of 371 steps, a backbone "
        "trained before; last epoch), n = number of seeds; they are empty until such records exist. Runs on CamVid, "
        "from scratch or of another recipe are not comparable with the paper's and have tables of their own"
        f"{where}."
    )


def start(config: Mapping[str, Any]) -> str:
    """Say what the weights of a run were at its start: "scratch", or the first digits of a backbone's hash."""
    backbone = config["model"].get("backbone")
    return f"weights {backbone[:8]}" if backbone else "scratch"


def with_setup(records: pd.DataFrame) -> pd.DataFrame:
    """Add the columns that tell apart what has one name: embedding, tile (side in pixels) and start."""
    setup = []
    for config in records["config"]:
        model = config["model"]
        embedding, tile = "-", "-"
        if model["encoder"].startswith("repmlpnet"):
            side = model.get("embed_kernel") or 2
            embedding = f"{side}x{side}"
            tile = str(model.get("img_size") or timm.get_pretrained_cfg(model["encoder"]).input_size[-1])
        setup.append({"embedding": embedding, "tile": tile, "start": start(config)})
    return records.join(pd.DataFrame(setup, index=records.index))


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


PAPER_RECIPE_NOTE = "The paper's recipe."
STUDY_NOTE = "Not the paper's recipe, so not comparable with its figures."
COLUMNS_NOTE = (
    "mIoU: mean over the classes that occur, ± standard deviation over seeds; other figures are means over seeds. "
    "'changed pixels' (first guesses that merging changes) and 'merge error' (norm of the difference of the logits "
    "over their norm) are the largest of the seeds. Params and MACs are those of the training-time net, the auxiliary "
    "head counted in the params alone; MACs of one image, taken as a whole."
)


def study_note(records: pd.DataFrame) -> str:
    """Write the caption of a study's table."""
    full = all(is_full_recipe(r) for r in records.to_dict("records"))
    return " ".join((scale_line(records), PAPER_RECIPE_NOTE if full else STUDY_NOTE, COLUMNS_NOTE))
