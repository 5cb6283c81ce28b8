"""Accuracy over a number for locality: which runs may be compared, how well the one ranks the other, and the figure."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from figures import save
from records import layers_of

from repmlp.locality import locality_index
from repmlp.runs.key import cell_key, config_key, determining
from repmlp.statistics import interval, rank_correlation, rank_correlation_samples

KINDS = {"injected": "merged kernel", "trained": "FC alone"}

LEAST = 4  # points; of fewer a rank correlation says nothing
# points; of fewer a rank correlation says nothing
LEAST_FOR_INTERVAL = 10

NOTE = (
    "Rank correlation (Spearman) of top-1 with the locality index: the mean over the spatial layers of how much nearer "
    "to the output point its |weight| lies than a flat kernel's (0 flat, 1 all on the point). Ranks in one network, "
    "data and recipe alone. 'branch sets': a point is the mean over the seeds of one set of branches, which are local "
    "by construction; 'seeds': runs that differ in their seed alone. Interval: 95 %, points drawn anew within these "
    "groups, from 10 points on; chance: share of random pairings that correlate at least as much."
)


def with_index(records: pd.DataFrame) -> pd.DataFrame:
    """Add what the figure and the table need of each run; runs without spatial layers are left out.

    Columns: injected, trained (locality index, the mean over the layers), cell (runs that differ in their seed alone)
    and group (runs that differ in seed and branches alone). A run that two studies hold counts once.
    """
    records = records.assign(locality=layers_of(records))
    records = records[records["locality"].map(len) > 0].drop_duplicates(subset="key")
    for kind in KINDS:
        index = [
            float(np.mean([locality_index(layer[kind], layer["size"]) for layer in layers]))
            for layers in records["locality"]
        ]
        records = records.assign(**{kind: index})
    groups = []
    for record in records.to_dict("records"):
        config = determining(record["config"])
        alike = {**config, "seed": None, "model": {k: v for k, v in config["model"].items() if k != "kernels"}}
        name = f"{record['model']}, {record['data']}, {record['n_train']:,} images, {record['epochs']} epochs"
        groups.append(f"{name} #{config_key(alike)[:6]}")
    return records.assign(group=groups, cell=[cell_key(config) for config in records["config"]])


def correlations(records: pd.DataFrame) -> pd.DataFrame:
    """Return the table of rank correlations: between sets of branches, of all groups and each; between seeds."""
    measures = [*KINDS, "top1_pct"]
    sets = records.groupby(["group", "cell"], as_index=False)[measures].mean()
    by_group = {name: rows for name, rows in sets.groupby("group") if len(rows) >= LEAST}
    parts = {
        "all, branch sets": list(dict(list(sets.groupby("group"))).values()),
        "all, seeds": list(dict(list(records.groupby("cell"))).values()),
        **{f"{name}, branch sets": [rows] for name, rows in by_group.items()},
    }
    table = []
    for name, groups in parts.items():
        groups = [rows for rows in groups if len(rows) > 1]
        points = sum(map(len, groups))
        row = {"compared": name, "points": points, "groups": len(groups)}
        for kind, words in KINDS.items():
            pairs = [(rows[kind].to_numpy(), rows["top1_pct"].to_numpy()) for rows in groups]
            rho = rank_correlation(pairs) if points >= LEAST else float("nan")
            row[words] = "-"
            if rho == rho:
                samples, chance = rank_correlation_samples(pairs)
                few = points < LEAST_FOR_INTERVAL
                between = "(few points)" if few else "({:+.2f} to {:+.2f})".format(*interval(samples))
                row[words] = f"{rho:+.2f} {between}, chance {f'{chance:.3f}' if chance >= 0.001 else '<0.001'}"
        table.append(row)
    return pd.DataFrame(table)


def draw(records: pd.DataFrame, table: pd.DataFrame, stem: Path, pdf: bool = False) -> list[Path]:
    """Draw top-1 less the mean of its group over the index, merged kernel and FC alone; hollow: without branches."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained", sharey=True)
    for axis, (kind, words) in zip(axes, KINDS.items(), strict=True):
        for number, (group, rows) in enumerate(records.groupby("group")):
            colour, marker = f"C{number % 10}", "os^Dv"[number // 10 % 5]
            for bare, face in ((True, "none"), (False, colour)):
                some = rows[(rows["kernels"].map(len) == 0) == bare]
                label = None if bare else f"{group} (n={len(rows)})"
                above = some["top1_pct"] - rows["top1_pct"].mean()
                axis.scatter(some[kind], above, s=28, facecolors=face, edgecolors=colour, marker=marker, label=label)
        axis.set_title(f"{words}; between branch sets {table[words].iloc[0]}", fontsize=10)
        axis.set_xlabel("locality index, mean over spatial layers")
        axis.axhline(0, color="black", lw=0.8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("top-1 less the mean of its group, points")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=7)
    figure.suptitle("Does locality predict accuracy? One point a run; hollow: no branches")
    return save(figure, stem, pdf)
