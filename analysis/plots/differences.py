"""The differences that a study's sweep named before its runs, one below the other, as a panel of a figure."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from figures import style_of
from matplotlib.axes import Axes
from records import error_of_difference
from significance import Finding
from wording import contrast

from repmlp.runs.key import cell_key

CAPTION = 62  # characters of a line above a panel: longer ones run out of the picture
ANALYSED = "intervals of contrasts.md, 95 %"
BARS = {"seeds": "±2 standard errors over seeds", "images": "±2 standard errors of the images evaluated (n=1)"}


@dataclass(frozen=True)
class Difference:
    """A named difference as it is drawn, in points. seeds: that of each seed. bars: where low and high come from."""

    label: str
    mean: float
    low: float
    high: float
    bars: str
    seeds: tuple[float, ...]
    margin: float | None


def differences(records: pd.DataFrame, tests: Sequence[Finding]) -> list[Difference]:
    """Return what is drawn of the tests of a study. records: of its runs, columns as `load_records` gives them."""
    cells = dict(list(records.groupby([cell_key(config) for config in records["config"]])))
    found = []
    for test in tests:
        plus, minus = (cells[key].drop_duplicates("seed") for key in (test.pair.plus, test.pair.minus))
        each = (plus.set_index("seed")["top1_pct"] - minus.set_index("seed")["top1_pct"]).dropna()
        low, high, bars = *test.two_way, ANALYSED
        if math.isnan(low):
            error = 2 * error_of_difference(plus, minus)
            low, high = test.difference - error, test.difference + error
            bars = BARS["images" if min(len(plus), len(minus)) == 1 else "seeds"]
        margin = test.pair.contrast.equivalent_within
        verdict = test.verdict if test.verdict.startswith("open") else f"{test.verdict} (n={test.n})"
        verdict = f"equal within {margin:g}: {verdict}" if margin else verdict
        label = "\n".join(filter(None, [test.pair.where, contrast(test.pair.contrast), verdict]))
        found.append(Difference(label, test.difference, low, high, bars, tuple(each), margin))
    return found


def panel(axis: Axes, found: Sequence[Difference]) -> None:
    """Draw differences from top to bottom, each with its interval, its seeds and the margin of a claim of equality."""
    for place, each in enumerate(found):
        colour, marker = style_of(0)
        axis.plot([each.low, each.high], [place, place], color=colour, lw=1.4)
        axis.plot(each.mean, place, color=colour, marker=marker, ms=6)
        if len(each.seeds) > 1:
            axis.scatter(each.seeds, [place + 0.2] * len(each.seeds), s=10, fc="none", ec=colour, lw=0.7)
        if each.margin:
            axis.fill_betweenx([place - 0.35, place + 0.35], -each.margin, each.margin, color="grey", alpha=0.2, lw=0)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_ylim(len(found) - 0.5, -0.5)
    axis.set_yticks(range(len(found)), [each.label for each in found], fontsize=8)
    bars = "bars: " + "; ".join(dict.fromkeys(each.bars for each in found))
    bars += "; hollow: the seeds" if any(len(each.seeds) > 1 for each in found) else ""
    bars = textwrap.fill(bars, CAPTION)
    if any(each.margin for each in found):
        bars += "\ngrey: the margin of a claim of equality, its interval 90 %"
    axis.set_title(f"differences named before the runs\n{bars}", fontsize=9)
    axis.set_xlabel("points of top-1")
    axis.grid(alpha=0.3)
