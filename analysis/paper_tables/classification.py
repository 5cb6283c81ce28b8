"""The paper's tables of classification: Table 1 (the variants), 2 and 3 (ImageNet), 4 and 5 (what was ablated)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from table_parts import mean_std, read_paper

from paper_tables.configurations import DATA_SETS, PRECISIONS, is_full_recipe
from paper_tables.counts import counts, structure, timm_counts, variant_counts
from repmlp.branches import label as branch_label
from repmlp.runs.key import determining

NOTES = {
    "1": (
        "Paper: RepMLPNet Tables 1 and 2. Counts are exact: learnable params, MACs of convolutions and matrix "
        "products. The printed params are the merged net's without batch norms, the printed MACs its own, rounded "
        "(L256's truncated). Merge error: norm of the difference of the logits over their norm, random weights and "
        "statistics (experiments/check_variants.py)."
    ),
    "2": (
        "Paper: RepMLPNet Table 2 (ImageNet; its throughput is that of a 2080 Ti, batch 128). 'released' is what the "
        "released weights report. 'ours' and 'difference' hold records of the full recipe alone, on all of ImageNet; "
        "they are empty until such records exist. Our counts: RepMLPNet merged, its params without norms, the rule "
        "that gives the printed ones; other nets are timm's, as they are (ResMLP-B24: ours; S2-MLP is not in timm)."
    ),
    "3": "Paper: RepMLPNet Table 3; columns as in Table 2.",
    "4": (
        "Paper: RepMLPNet Table 4 (ImageNet, RepMLPNet-T224). Our counts are of the training-time net with both "
        "branches; the paper's MACs are those of the merged net, 9.5M less, and printed truncated. 'ours' is empty "
        "until records of the full recipe exist."
    ),
    "5": (
        "Paper: RepMLPNet Table 5. Extra MACs and params are those of the training-time model. Params count learnable "
        "numbers; the paper's ResMLP rows count a branch's batch norm as four numbers a channel (its running mean and "
        "variance too), its RepMLPNet rows as two: both counts are given. Of what the paper prints for ImageNet, "
        "'+10M' is ours rounded; '+20K', '+60K', '+26M' and D256's 86.94M do not follow from its own network. 'ours' "
        "and 'difference' hold records of the "
        "full recipe alone (100 epochs, 50,000 images, batch 128), last epoch, test set; 'in bf16': trained in "
        "bfloat16, shown where there is no float32 run."
    ),
}


def variants_table(results: Path) -> pd.DataFrame:
    """Make Table 1: the six variants as printed, checked against the nets, with counts and the error of merging."""
    measured = results / "variants/variants.json"
    checks = json.loads(measured.read_text())["models"] if measured.exists() else {}
    rows = []
    for row in pd.read_csv(Path(__file__).with_name("paper_models.csv"), dtype=str).to_dict("records"):
        ours = structure(row["model"])
        if different := [name for name, value in ours.items() if value != row[name]]:
            raise ValueError(f"{row['model']} is not the paper's: {different[0]} is {ours[different[0]]}")
        size, check = int(row["input"]), checks.get(row["model"], {})
        params, params_merged, macs = variant_counts(row["model"], size)
        params_layers, macs_merged = timm_counts(row["model"], size)
        rows.append(
            {
                "model": row["label"],
                "input": size,
                "C": row["channels"],
                "blocks": row["blocks"],
                "h=w": row["maps"],
                "S": row["share_sets"],
                "paper params M": row["params_printed"],
                "train-time params": f"{params:,}",
                "merged params": f"{params_merged:,}",
                "merged, conv and linear": f"{params_layers:,}",
                "paper MACs G": row["macs_printed"],
                "train-time MACs": f"{macs:,}",
                "merged MACs": f"{macs_merged:,}",
                **{
                    f"merge error {dtype}": f"{check[f'merge_error_{dtype}']:.1e}" if check else ""
                    for dtype in ("float32", "float64")
                },
            }
        )
    return pd.DataFrame(rows)


def top1_of(records: list[Mapping[str, Any]]) -> tuple[pd.Series, str]:
    """Return top-1 of the runs of a cell and how the cell shows it.

    Runs of one setting alone are averaged: of several, float32 comes before bfloat16 and fewer processes, whose batch
    norms see more images, before more.
    """
    by_setting: dict[tuple[int, int], dict[int, float]] = {}
    for record in records:
        key = (list(PRECISIONS).index(determining(record["config"])["precision"]), record.get("processes", 1))
        by_setting.setdefault(key, {})[record["seed"]] = record[
            "top1_pct"
        ]  # by seed: two studies may hold the same run
    if not by_setting:
        return pd.Series(dtype=float), ""
    (precision, processes), by_seed = min(by_setting.items())
    ours = pd.Series(by_seed, dtype=float)
    several = f", batch over {processes} processes" if processes > 1 else ""
    return ours, mean_std(ours) + list(PRECISIONS.values())[precision] + several


def imagenet_table(number: str, records: pd.DataFrame, results: Path) -> pd.DataFrame:
    """Make Table 2 or 3: the paper's figures, the released weights' top-1, ours by the full recipe, and our counts."""
    paper = read_paper()
    speeds = load_speeds(results)
    recorded = [r for r in records.to_dict("records") if r["data"] == "imagenet"]
    rows = []
    for row in paper[paper["table"] == number].itertuples():
        size = int(row.input)
        ours_net = row.model.startswith("repmlpnet")
        ours, shown = top1_of(
            [
                r
                for r in recorded
                if r["model"] == row.model
                and r["kernels"] == ([1, 3] if ours_net else [])
                and r["global_perceptron"] in (None, True)
                and " ".join(map(str, r["share_sets"] or []))
                == (structure(row.model)["share_sets"] if ours_net else "")
                and r["config"]["data"]["img_size"] == size
                and is_full_recipe(r, int(row.epochs))
            ]
        )
        params, macs = timm_counts(row.model, size) if row.model else (None, None)
        cells = {
            "model": row.label,
            "input": size,
            "epochs": row.epochs,
            "paper top-1": f"{row.top1_pct:.1f}",
            "released top-1": row.released_pct,
            "ours top-1": shown,
            "difference": f"{ours.mean() - row.top1_pct:+.2f}" if len(ours) else "",
            "paper MACs G": row.macs_printed,
            "our MACs G": f"{macs / 1e9:.3f}" if row.model else "",
            "paper params M": row.params_printed,
            "our params M": f"{params / 1e6:.2f}" if row.model else "",
            "paper images/s": row.throughput,
            **{
                f"our images/s ({setting})": f"{column[net]:,.1f}"
                if column.get(net := (row.model, size), 0) > 0
                else ""
                for setting, column in speeds.items()
            },
        }
        if number == "3":  # has no such columns
            for name in ("released top-1", "paper params M"):
                del cells[name]
        rows.append(cells)
    return pd.DataFrame(rows)


def load_speeds(results: Path) -> pd.DataFrame:
    """Read the benchmark's records: images a second by (model, input size), a column for each device.

    Eager float32 at the largest batch that was measured there; make_benchmark.py shows the rest. The fastest form of a
    net counts, but for the train-time one and the straightforward baseline.
    """
    records = [json.loads(path.read_text()) for path in sorted(results.glob("benchmark/measured/*.json"))]
    records = [r for r in records if r["kind"] == "inference" and (r["dtype"], r["engine"]) == ("float32", "eager")]
    largest: dict[str, int] = {}
    for r in records:
        largest[r["device"]] = max(r["batch_size"], largest.get(r["device"], 0))
    rows = [
        {
            "net": (r["model"], r["img_size"]),
            "setting": f"{r['device']}, {r['threads']} threads, batch {r['batch_size']}",
            "images_per_second": r["images_per_second"],
        }
        for r in records
        if r["form"] not in ("train-time", "plain") and r["batch_size"] == largest[r["device"]]
    ]
    if not rows:
        return pd.DataFrame()
    return pd.DataFrame(rows).pivot_table("images_per_second", "net", "setting", aggfunc="max")


def ablation_table(number: str, records: pd.DataFrame) -> pd.DataFrame:
    """Make Table 4 or 5: the paper's top-1, ours by the full recipe, the difference, and the costs of both."""
    paper = read_paper()
    full = [r for r in records.to_dict("records") if is_full_recipe(r)]
    rows = []
    for row in paper[paper["table"] == number].itertuples():
        ours, shown = top1_of(
            [
                r
                for r in full
                if (r["data"], r["model"], tuple(r["kernels"])) == (row.data, row.model, row.kernels)
                and tuple(r["share_sets"] or ()) == row.share_sets
                and r["global_perceptron"] == row.global_perceptron
            ]
        )
        # what a '+' is counted from: Table 5, the net without branches; Table 4, without Global Perceptron
        reference = (
            ((), row.share_sets, row.global_perceptron) if number == "5" else (row.kernels, row.share_sets, False)
        )
        base = counts(row.model, DATA_SETS[row.data]["classes"], *reference)
        params, params_rule, macs = counts(
            row.model, DATA_SETS[row.data]["classes"], row.kernels, row.share_sets, row.global_perceptron
        )
        cells = {"data": row.data, "model": row.model, "branches": branch_label(row.kernels)}
        if number == "4":
            cells |= {
                "share-sets": ", ".join(map(str, row.share_sets)),
                "Global Perceptron": "yes" if row.global_perceptron else "no",
            }
        extra = number == "5" and row.kernels
        rows.append(
            {
                **cells,
                "paper top-1": f"{row.top1_pct:.2f}",
                "ours top-1": shown,
                "difference": f"{ours.mean() - row.top1_pct:+.2f}" if len(ours) else "",
                "paper MACs": row.macs_printed,
                "our MACs": f"+{macs - base[2]:,}"
                if extra or (number == "4" and row.global_perceptron)
                else f"{macs:,}",
                "paper params": row.params_printed,
                "our params": f"+{params - base[0]:,}" if extra else f"{params:,}",
                **(
                    {"our params, BN as 4": f"+{params_rule - base[1]:,}" if extra else f"{params_rule:,}"}
                    if number == "5"
                    else {}
                ),
            }
        )
    return pd.DataFrame(rows)


def tables(records: pd.DataFrame, results: Path) -> dict[str, tuple[str, str, pd.DataFrame]]:
    """Return what there is to write: name of the file -> (title, note, table).

    records: of classification. results: the folder with what was measured, speeds and errors of merging.
    """
    made = {
        "1": variants_table(results),
        **{number: imagenet_table(number, records, results) for number in ("2", "3")},
        **{number: ablation_table(number, records) for number in ("4", "5")},
    }
    return {f"table{number}": (f"Table {number}", NOTES[number], table) for number, table in made.items()}
