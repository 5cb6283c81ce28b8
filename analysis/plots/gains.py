"""What a study gains: its cells beside each other, each over its reference, as a table and as a figure."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
import wording
from figures import save, style_of
from matplotlib.axes import Axes
from records import differing_settings, error_of_difference, ordered, standard_error, telling_apart, text_of
from table_parts import listed

from plots.differences import CAPTION, Difference, panel
from repmlp import branches
from repmlp.branches import label as branch_label
from repmlp.runs.key import cell_key

MEANS = "Mean top-1 of the last epoch in %, n runs."
GAINS = (
    "gain: over {}, in points. Its standard error over seeds, paired where both have the same ones; where a cell has "
    "one run, that of the number of images evaluated alone, which leaves out the variation between seeds."
)
NO_CLAIM = "Nothing is claimed here: see the contrasts of the study, if its sweep names some."


class Axis(NamedTuple):
    """The x axis of a study: what stands on it, and whether its places are steps along one way, joined by a line."""

    title: str
    joined: bool


def cells(records: pd.DataFrame) -> tuple[pd.DataFrame, Axis]:
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
    if "recipe.merge_after" in differing:
        differing["recipe.merge_after"] = [1.0 if share is None else share for share in differing["recipe.merge_after"]]
    written = [wording.values(name, differing[name]) for name in axis]
    if len(axis) > 1:
        written = [[wording.phrase(name, each) for each in of] for name, of in zip(axis, written, strict=True)]
    keys = [cell_key(config) for config in records["config"]]
    by_network = not axis and networks and len(set(keys)) == records["model"].nunique()
    placed = records.assign(
        cell=keys,
        setting=[(tuple(map(ordered, row)), text) for row, text in zip(differing[axis].to_numpy(), raw, strict=True)],
        words=["\n".join(of_run) for of_run in zip(*written, strict=True)] if axis else "",
        order=[branches.order(kernels) for kernels in records["kernels"]],
    )
    rows = []
    for (model, setting), place in placed.groupby(["model", "setting"], sort=True):
        at_place = [(order, cell) for (order, _), cell in place.groupby(["order", "cell"], sort=True)]
        for order, cell in at_place:
            label = branch_label(cell["kernels"].iloc[0])
            if by_network:
                where, at, line = model, model, "top-1"
            elif axis:
                where, at, line = setting, cell["words"].iloc[0], f"{model}, {label}" if networks else label
            else:
                where, at, line = order, label, model
            rows.append({"place": where, **measured(at, line, cell, at_place[0][1])})
    title = ", ".join(map(wording.name, axis)) or ("network" if by_network else "branches")
    title += " (others change with it)" if len(axis) < differing.shape[1] else ""
    along = not by_network if not axis else len(axis) == 1 and all(map(is_quantity, differing[axis[0]]))
    return pd.DataFrame(rows), Axis(title, along)


def steps(records: pd.DataFrame) -> pd.DataFrame:
    """Return the cells of a study of single changes, as `cells` does; the reference is what is most like all others.

    `at` names what a cell changes of it, a line a setting. Fewest changes first.
    """
    differing = differing_settings(records)
    shown = pd.DataFrame({name: wording.values(name, differing[name]) for name in differing}, records.index)
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


def is_quantity(value: Any) -> bool:
    """Say whether a setting's value is a number or a list of them, which has an order that a line may follow."""
    return isinstance(value, list) or (isinstance(value, Real) and not isinstance(value, bool))


def folded(tick: str, width: int) -> str:
    """Break what stands at a place of the axis into lines, so that it does not run into its neighbours.

    Between words, to lines of `width` characters where words are that short; a set of branches after two sizes.
    """
    lines = [textwrap.fill(line, max(width, 12), break_long_words=False) for line in tick.split("\n")]
    return re.sub(r"(\d+x\d+\+\d+x\d+)\+", r"\1+\n", "\n".join(lines))


def draw(
    table: pd.DataFrame,
    axis: Axis,
    title: str,
    over: str,
    stem: Path,
    named: Sequence[Difference] = (),
    pdf: bool = False,
) -> list[Path]:
    """Draw accuracy and, beside it, what the sweep named before its runs, else gains (over what, in words) if any.

    Every run is shown; bars of accuracies and gains are of two standard errors each way.
    """
    ticks = list(dict.fromkeys(at for _, at in sorted(zip(table["place"], table["at"], strict=True))))
    gains = not named and table["gain"].notna().any()
    wide, high = (12, max(4.4, 1.6 + 0.6 * len(named))) if named or gains else (6.5, 4.4)
    figure, axes = plt.subplots(
        1, 2 if named or gains else 1, figsize=(wide, high), layout="constrained", squeeze=False
    )
    left, *right = axes[0]
    accuracy = ("top-1 after the last epoch", "top-1 in %", bars_words(table["n"] == 1, ""), "the runs")
    _panel(left, table, ticks, axis, ("top1", "error", "values"), accuracy)
    left.legend(fontsize=8)
    if named:
        panel(right[0], named)
    elif gains:
        words_of_gain = bars_words(table["of_images"], "of the difference ")
        _panel(
            right[0],
            table,
            ticks,
            axis,
            ("gain", "gain_error", "gains"),
            (f"gain over {over}", "points", words_of_gain, "the seeds"),
        )
        right[0].axhline(0, color="black", lw=0.8)
        right[0].set_xlim(left.get_xlim())  # the reference has no gain
    note = wording.of_branches([*table["at"], *table["line"]])
    figure.suptitle(f"{title}\n{note}" if note else title, fontsize=11)
    return save(figure, stem, pdf)


def _panel(
    panel: Axes,
    table: pd.DataFrame,
    ticks: list[str],
    axis: Axis,
    columns: tuple[str, str, str],
    texts: tuple[str, ...],
) -> None:
    """Draw one column of a table over its places, a line each of its lines.

    columns: the mean, its standard error, the single values. texts: title, unit, what the bars are, and the points.
    """
    mean, error, each = columns
    title, unit, bars, points = texts
    lines = list(dict.fromkeys(table["line"]))
    for number, line in enumerate(lines):
        colour, marker = style_of(number)
        of_line = table[table["line"] == line].sort_values("place")
        # beside each other, so that no interval hides another
        x = pd.Series([ticks.index(at) for at in of_line["at"]]) + 0.06 * (number - (len(lines) - 1) / 2)
        panel.errorbar(
            x, of_line[mean].astype(float), 2 * of_line[error].astype(float), color=colour,
            marker=marker, ms=5, capsize=2, lw=1.2, ls="-" if axis.joined else "",
            label=f"{line} (n={listed(of_line['n'])})",
        )  # fmt: skip
        runs = [
            (at + 0.02, value)
            for at, found in zip(x, of_line[each], strict=True)
            if len(found) > 1  # one is the mean
            for value in found
        ]
        panel.scatter(*(zip(*runs, strict=True) if runs else ((), ())), s=10, fc="none", ec=colour, lw=0.7)
    hollow = f"; hollow: {points}" if (table["n"] > 1).any() else ""
    told = textwrap.fill(f"bars: ±2 standard errors {bars}{hollow}", CAPTION)
    panel.set_title(f"{title}\n{told}", fontsize=9)
    panel.set_ylabel(unit)
    panel.set_xlabel(axis.title)
    bare = [re.sub(r"^(model|data|recipe)\.", "", tick, flags=re.MULTILINE) for tick in ticks]
    shown = [folded(tick, 72 // len(ticks)) for tick in bare]
    longest = max(len(line) for word in shown for line in word.split("\n"))
    slant = {"rotation": 45, "ha": "right", "fontsize": 7} if longest > 96 / len(ticks) else {"fontsize": 9}
    panel.set_xticks(range(len(ticks)), shown, **slant)
    panel.grid(alpha=0.3)


def bars_words(single: pd.Series, of: str) -> str:
    """Say where the standard errors of the bars come from; single: of each cell, whether one run stands on one side."""
    words = {False: "over seeds", True: "of the images evaluated (n=1)"}
    return of + "; ".join(words[kind] for kind in sorted(set(single)))


def note(table: pd.DataFrame, over: str) -> str:
    """Write what stands above the table; over: what gains are over, in words."""
    parts = [MEANS, GAINS.format(over) if table["gain"].notna().any() else "", NO_CLAIM]
    return " ".join(filter(None, [*parts, wording.of_branches([*table["at"], *table["line"]])]))


def as_shown(table: pd.DataFrame, axis_title: str) -> pd.DataFrame:
    """Return the table as it is shown; without columns of gains where it has none."""
    gains = {
        "gain": ["reference" if pd.isna(gain) else f"{gain:+.2f}" for gain in table["gain"]],
        **{
            title: [
                f"{error:.2f}" if images is of_images and not pd.isna(error) else ""
                for error, images in zip(table["gain_error"], table["of_images"], strict=True)
            ]
            for title, of_images in (("SE over seeds", False), ("SE of images, n=1", True))
        },
    }
    return pd.DataFrame(
        {
            axis_title: table["at"].str.replace("\n", "; "),
            "line": table["line"],
            "n": table["n"],
            "top-1": table["top1"].map("{:.2f}".format),
            **(gains if table["gain"].notna().any() else {}),
            "params": table["params"].map("{:,}".format),
            "MACs": table["macs"].map("{:,}".format),
        }
    )


def as_numbers(table: pd.DataFrame, axis_title: str) -> pd.DataFrame:
    """Return the table as its CSV has it; the reference has no gain."""
    over_seeds = ~table["of_images"].astype(bool)
    gains = {
        "gain": table["gain"].astype(float).round(4),
        "SE over seeds": table["gain_error"].astype(float).where(over_seeds).round(4),
        "SE of images, n=1": table["gain_error"].astype(float).where(~over_seeds).round(4),
    }
    return pd.DataFrame(
        {
            axis_title: table["at"].str.replace("\n", "; "),
            "line": table["line"],
            "n": table["n"],
            "top-1": table["top1"].round(4),
            **(gains if table["gain"].notna().any() else {}),
            "params": table["params"],
            "MACs": table["macs"],
        }
    )
