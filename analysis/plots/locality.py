"""Accuracy over a number for locality: which runs may be compared, how well the one ranks the other, and the figure."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import wording
from correlation import PAIRINGS, permutation_p, rank_correlation
from figures import save, style_of
from matplotlib.ticker import MaxNLocator
from records import differing_settings, layers_of, telling_apart

from repmlp import branches
from repmlp.branches import label as branch_label
from repmlp.locality import locality_index
from repmlp.runs.key import cell_key, config_key, determining

KINDS = {"injected": "merged kernel", "trained": "FC alone"}
LEAST = 4  # points; of fewer a rank correlation says nothing
COLUMNS = 6  # of panels
NOTE = (
    "Rank correlation (Spearman) of top-1 with the locality index: the mean over the spatial layers of how much nearer "
    "to the output point its |weight| lies than a flat kernel's (0 flat, 1 all on the point). Ranks in one network, "
    "data and recipe alone. 'branch sets': a point is the mean over the seeds of one set of branches, which are local "
    "by construction; 'seeds': runs that differ in their seed alone, a group for each set of branches. p: share of all "
    f"pairings within the groups that correlate at least as much, of {PAIRINGS:,} drawn ones where there are more; of "
    "four points it cannot be below 0.083. Not corrected for their number; a description of the runs that there are, "
    "no claim that was named before them. Runs whose branches were merged while training are left out."
)


def with_index(records: pd.DataFrame) -> pd.DataFrame:
    """Add what the figure and the table need of each run.

    Left out are runs without spatial layers, and those whose branches were merged while training: their FC holds them.
    Columns: injected, trained (locality index, the mean over the layers), cell (runs that differ in their seed alone)
    and group (runs that differ in seed and branches alone). A run that two studies hold counts once.
    """
    records = records.assign(locality=layers_of(records))
    merged_early = [config["recipe"].get("merge_after") is not None for config in records["config"]]
    records = records[(records["locality"].map(len) > 0) & ~np.array(merged_early, bool)].drop_duplicates(subset="key")
    for kind in KINDS:
        index = [
            float(np.mean([locality_index(layer[kind], layer["size"]) for layer in layers]))
            for layers in records["locality"]
        ]
        records = records.assign(**{kind: index})
    names, alike = [], []
    for record in records.to_dict("records"):
        config = determining(record["config"])
        model = {k: v for k, v in config["model"].items() if k != "kernels"}
        alike.append(config_key({**config, "seed": None, "model": model}))
        name = f"{record['model']}, {record['data']}, {record['n_train']:,} images, {record['epochs']} epochs"
        names.append(
            name + {"32-true": "", "bf16-mixed": ", bf16"}.get(config["precision"], f", {config['precision']}")
        )
    records = records.assign(group=names, alike=alike, cell=[cell_key(config) for config in records["config"]])
    for _, runs in records.groupby("group"):
        if runs["alike"].nunique() > 1:
            records.loc[runs.index, "group"] += _apart(runs)
    return records.drop(columns="alike")


def _apart(runs: pd.DataFrame) -> pd.Series:
    """Write behind the name of runs how they differ, branches and seed aside, from the largest group of that name."""
    differing = differing_settings(runs).drop(columns="model.kernels", errors="ignore")
    usual = runs.index[runs["alike"] == runs["alike"].mode()[0]][0]
    behind = pd.Series("", runs.index)
    for name in telling_apart(differing):
        written = pd.Series(wording.values(name, differing[name]), runs.index)
        behind += [f"; {wording.phrase(name, each)}" if each != written[usual] else "" for each in written]
    return behind


def correlations(records: pd.DataFrame) -> pd.DataFrame:
    """Return rank correlations between sets of branches, of all groups and each, and between seeds: one a row.

    Columns: compared, points, groups, and of each kind of kernel its name and "p, " and its name; NaN where there are
    fewer than LEAST points, or all are alike.
    """
    measures = [*KINDS, "top1_pct"]
    sets = records.groupby(["group", "cell"], as_index=False)[measures].mean()
    by_group = {name: points for name, points in sets.groupby("group") if len(points) >= LEAST}
    parts = {
        "all, branch sets": list(dict(list(sets.groupby("group"))).values()),
        "all, seeds": list(dict(list(records.groupby("cell"))).values()),
        **{f"{name}, branch sets": [points] for name, points in by_group.items()},
    }
    table = []
    for name, groups in parts.items():
        groups = [points for points in groups if len(points) > 1]
        row = {"compared": name, "points": sum(map(len, groups)), "groups": len(groups)}
        for kind, words in KINDS.items():
            pairs = [(points[kind].to_numpy(), points["top1_pct"].to_numpy()) for points in groups]
            rho = rank_correlation(pairs) if row["points"] >= LEAST else float("nan")
            row |= {words: rho, f"p, {words}": permutation_p(pairs) if rho == rho else float("nan")}
        table.append(row)
    return pd.DataFrame(table)


def as_shown(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table as it is shown."""
    shown = table.astype({"points": str, "groups": str})
    for words in KINDS.values():
        shown[words] = ["-" if rho != rho else f"{rho:+.2f}" for rho in table[words]]
        shown[f"p, {words}"] = ["-" if p != p else f"{p:.4f}" if p >= 1e-4 else "<0.0001" for p in table[f"p, {words}"]]
    return shown


def draw(records: pd.DataFrame, table: pd.DataFrame, stem: Path, pdf: bool = False) -> list[Path]:
    """Draw top-1 over the index, one point a run: a panel a group, above of the merged kernel, below of the FC alone.

    Groups of fewer than two sets of branches have nothing to compare and no panel.
    """
    several = records.groupby("group")["cell"].nunique() > 1
    groups = list(several[several].index) or sorted(set(records["group"]))
    drawn = records[records["group"].isin(groups)]
    sets = sorted({tuple(kernels) for kernels in drawn["kernels"]}, key=branches.order)
    style = {kernels: style_of(i) for i, kernels in enumerate(sets)}
    columns, deep = min(COLUMNS, len(groups)), -(-len(groups) // COLUMNS)
    figure = plt.figure(figsize=(max(6, 3 * columns), 2 * (2.5 * deep + 0.4) + 0.6), layout="constrained")
    of_group = table.set_index("compared")
    for part, (kind, words) in zip(figure.subfigures(2, 1), KINDS.items(), strict=True):
        between = of_group.loc["all, branch sets"]
        part.suptitle(f"{words}; between branch sets, all groups: {_found(between, words)}", fontsize=11)
        axes = part.subplots(deep, columns, squeeze=False).ravel()
        for axis, group in zip(axes, groups, strict=False):
            runs = records[records["group"] == group]
            for kernels in sets:
                some = runs[[tuple(k) == kernels for k in runs["kernels"]]]
                colour, marker = style[kernels]
                axis.scatter(some[kind], some["top1_pct"], s=26, color=colour, marker=marker, alpha=0.8, lw=0)
            name = f"{group}, branch sets"
            title = re.sub(r", (?=[\d,]+ images)|; ", "\n", group)
            found = _found(of_group.loc[name], words) if name in of_group.index else ""
            axis.set_title(f"{title}\n{found}", fontsize=7)
            axis.xaxis.set_major_locator(MaxNLocator(4))
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
        for axis in axes[len(groups) :]:
            axis.set_visible(False)
        part.supxlabel("locality index, mean over spatial layers", fontsize=9)
        part.supylabel("top-1, %", fontsize=9)
    handles = [
        plt.Line2D([], [], color=colour, marker=marker, ls="", label=branch_label(kernels))
        for kernels, (colour, marker) in style.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=8, fontsize=8)
    return save(figure, stem, pdf)


def _found(row: pd.Series, words: str) -> str:
    rho, p = row[words], row[f"p, {words}"]
    chance = "p < 0.0001" if p < 1e-4 else f"p {p:.2g}"
    return "no rank correlation" if rho != rho else f"rank correlation {rho:+.2f}, {chance}"
