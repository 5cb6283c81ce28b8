"""What a study gains: its cells beside each other, each over its reference, as a table and as a figure."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from figures import save, style_of
from records import differing_settings, error_of_difference, ordered, plain, standard_error
from table_parts import listed

from repmlp import branches
from repmlp.branches import label as branch_label
from repmlp.runs.key import cell_key

RUNS = {"%": "the runs", "points": "the seeds"}  # what the hollow points of a panel are
NOTE = (
    "Mean top-1 of the last epoch in %, n runs. gain: over {}, in points. Its standard error over seeds, paired where "
    "both have the same ones; where a cell has one run, that of the number of images evaluated alone, which leaves out "
    "the variation between seeds. Nothing is claimed here: see the contrasts of the study, if its sweep names some."
)


def cells(records: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return a study's cells, one a row, in the order of the figure, and what its x axis is.

    Columns: place (where it stands on the x axis, for sorting), at (the words there), line, n, top1 (%), error (its
    standard error, points), gain and gain_error (NaN for the reference itself), params, macs. Runs that differ in more
    than their seed are never one cell.
    """
    differing = differing_settings(records).drop(columns="model.kernels", errors="ignore")
    networks = records["model"].nunique() > 1
    if networks:  # a network's name stands for what all runs of it have
        within = differing.map(text_of).groupby(records["model"]).nunique().max()
        differing = differing[[name for name in differing if not (name.startswith("model.") and within[name] == 1)]]
    axis = telling_apart(differing)
    raw = differing[axis].map(text_of).apply(tuple, axis=1) if axis else pd.Series([()] * len(records))
    if "data.n_train" in differing:
        differing["data.n_train"] = [int(n) for n in records["n_train"]]  # null stands for all of them
    placed = records.assign(
        cell=[cell_key(config) for config in records["config"]],
        setting=[(tuple(map(ordered, row)), text) for row, text in zip(differing[axis].to_numpy(), raw, strict=True)],
        words=["\n".join(map(plain, row)) for row in differing[axis].to_numpy()],
        order=[branches.order(kernels) for kernels in records["kernels"]],
    )
    rows = []
    for (model, setting), place in placed.groupby(["model", "setting"], sort=True):
        at_place = [(order, cell) for (order, _), cell in place.groupby(["order", "cell"], sort=True)]
        for order, cell in at_place:
            label = branch_label(cell["kernels"].iloc[0])
            where, at = (setting, cell["words"].iloc[0]) if axis else (order, label)
            line = (f"{model}, {label}" if networks else label) if axis else model
            rows.append({"place": where, **measured(at, line, cell, at_place[0][1])})
    title = ", ".join(axis) or "branches"
    return pd.DataFrame(rows), title + (" (others change with it)" if len(axis) < differing.shape[1] else "")


def steps(records: pd.DataFrame) -> pd.DataFrame:
    """Return the cells of a study of single changes, as `cells` does; the reference is what is most like all others.

    `at` names what a cell changes of it, a line a setting. Fewest changes first.
    """
    shown = differing_settings(records).map(plain)
    configurations = shown.drop_duplicates()
    # of each configuration, in how many settings the others differ from it, all together
    distances = [int((configurations != row).sum().sum()) for _, row in configurations.iterrows()]
    reference = configurations.iloc[distances.index(min(distances))]
    changed = [
        tuple(sorted(f"{name}={value}" for name, value in row.items() if value != reference[name]))
        for row in shown.to_dict("records")
    ]
    placed = records.assign(changed=changed, changes=[len(each) for each in changed])
    by_change = list(placed.groupby(["changes", "changed"], sort=True))
    return pd.DataFrame(
        [
            {"place": place, **measured("\n".join(place[1]) or "reference", "top-1", cell, by_change[0][1])}
            for place, cell in by_change
        ]
    )


def measured(at: str, line: str, cell: pd.DataFrame, reference: pd.DataFrame) -> dict[str, Any]:
    """Return a row of `cells`; reference: the runs that this cell is compared with, perhaps itself."""
    top1, error, itself = cell["top1_pct"].mean(), standard_error(cell), cell is reference
    return {
        "at": at,
        "line": line,
        "n": len(cell),
        "top1": top1,
        "error": error,
        "gain": None if itself else top1 - reference["top1_pct"].mean(),
        "gain_error": None if itself else error_of_difference(cell, reference),
        "of_images": min(len(cell), len(reference)) == 1,
        "values": by_seed(cell).tolist(),
        "gains": [] if itself else (by_seed(cell) - by_seed(reference)).dropna().tolist(),
        "params": cell["params"].iloc[0],
        "macs": cell["macs"].iloc[0],
    }


def by_seed(cell: pd.DataFrame) -> pd.Series:
    """Return top-1 of the runs of a cell, by their seed."""
    return cell.drop_duplicates("seed").set_index("seed")["top1_pct"]


def telling_apart(differing: pd.DataFrame) -> list[str]:
    """Return as few of the settings, first ones first, as tell all their combinations apart."""
    texts = differing.map(text_of)
    chosen: list[str] = []
    for name in texts:
        if len(texts[[*chosen, name]].drop_duplicates()) > (len(texts[chosen].drop_duplicates()) if chosen else 1):
            chosen.append(name)
    return chosen


def text_of(value: Any) -> str:
    return json.dumps(value, default=str)


def folded(tick: str) -> str:
    """Break the name of a set of branches into lines, so that it does not run into its neighbours: two sizes a line."""
    return re.sub(r"(\d+x\d+\+\d+x\d+)\+", r"\1+\n", tick)


def draw(
    table: pd.DataFrame, axis_title: str, title: str, over: str, stem: Path, joined: bool = True, pdf: bool = False
) -> list[Path]:
    """Draw accuracy and gains (over what, in words) side by side: every run, bars of two standard errors each way."""
    ticks = list(dict.fromkeys(at for _, at in sorted(zip(table["place"], table["at"], strict=True))))
    lines = list(dict.fromkeys(table["line"]))
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    for number, line in enumerate(lines):
        colour, marker = style_of(number)
        of_line = table[table["line"] == line].sort_values("place")
        # beside each other, so that no interval hides another
        x = pd.Series([ticks.index(at) for at in of_line["at"]]) + 0.06 * (number - (len(lines) - 1) / 2)
        for axis, value, error in ((axes[0], "top1", "error"), (axes[1], "gain", "gain_error")):
            axis.errorbar(
                x, of_line[value].astype(float), 2 * of_line[error].astype(float), color=colour,
                marker=marker, ms=5, capsize=2, lw=1.2, ls="-" if joined else "",
                label=f"{line} (n={listed(of_line['n'])})",
            )  # fmt: skip
        for axis, each in ((axes[0], "values"), (axes[1], "gains")):
            runs = [(at + 0.02, value) for at, found in zip(x, of_line[each], strict=True) for value in found]
            axis.scatter(*(zip(*runs, strict=True) if runs else ((), ())), s=10, fc="none", ec=colour, lw=0.7)
    axes[1].axhline(0, color="black", lw=0.8)
    names = ("top-1 after the last epoch", f"gain over {over}")
    bars = (bars_words(table["n"] == 1, ""), bars_words(table["of_images"], "of the difference "))
    for axis, name, words, unit in zip(axes, names, bars, ("%", "points"), strict=True):
        hollow = f"; hollow: {RUNS[unit]}" if (table["n"] > 1).any() else ""
        axis.set_title(f"{name}\nbars: ±2 standard errors {words}{hollow}", fontsize=9)
        axis.set_ylabel(unit)
        axis.set_xlabel(axis_title)
        words = [folded(re.sub(r"^(model|data|recipe)\.", "", tick, flags=re.MULTILINE)) for tick in ticks]
        longest = max(len(line) for word in words for line in word.split("\n"))
        slant = {"rotation": 45, "ha": "right", "fontsize": 7} if longest > 16 else {}
        axis.set_xticks(range(len(ticks)), words, **slant)
        axis.grid(alpha=0.3)
    axes[1].set_xlim(axes[0].get_xlim())  # the reference has no gain
    axes[0].legend(fontsize=8)
    figure.suptitle(title)
    return save(figure, stem, pdf)


def bars_words(single: pd.Series, of: str) -> str:
    """Say where the standard errors of the bars come from; single: of each cell, whether one run stands on one side."""
    words = {False: "over seeds", True: "of the test images (n=1)"}
    return of + "; ".join(words[kind] for kind in sorted(set(single)))


def as_shown(table: pd.DataFrame, axis_title: str) -> pd.DataFrame:
    """Return the table as it is shown."""
    return pd.DataFrame(
        {
            axis_title: table["at"].str.replace("\n", ", "),
            "line": table["line"],
            "n": table["n"],
            "top-1": table["top1"].map("{:.2f}".format),
            "gain": ["reference" if pd.isna(gain) else f"{gain:+.2f}" for gain in table["gain"]],
            **{
                title: [
                    f"{error:.2f}" if images is of_images and not pd.isna(error) else ""
                    for error, images in zip(table["gain_error"], table["of_images"], strict=True)
                ]
                for title, of_images in (("SE over seeds", False), ("SE of images, n=1", True))
            },
            "params": table["params"].map("{:,}".format),
            "MACs": table["macs"].map("{:,}".format),
        }
    )


def as_numbers(table: pd.DataFrame, axis_title: str) -> pd.DataFrame:
    """Return the table as its CSV has it; the reference has no gain."""
    over_seeds = ~table["of_images"].astype(bool)
    return pd.DataFrame(
        {
            axis_title: table["at"].str.replace("\n", ", "),
            "line": table["line"],
            "n": table["n"],
            "top-1": table["top1"].round(4),
            "gain": table["gain"].astype(float).round(4),
            "SE over seeds": table["gain_error"].astype(float).where(over_seeds).round(4),
            "SE of images, n=1": table["gain_error"].astype(float).where(~over_seeds).round(4),
            "params": table["params"],
            "MACs": table["macs"],
        }
    )
