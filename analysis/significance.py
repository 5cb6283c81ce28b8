"""What a study's runs allow to say of the contrasts that its sweep named before them.

Primary: the outcome on cell and seed (order and augmentation are those of the seed), two-way without interaction, with
(k-1)(n-1) residual degrees of freedom where all k cells have all n seeds, Holm's correction over all contrasts of the
study. Beside it Student's t of each contrast paired by seed, n-1 degrees of freedom. That two cells are equivalent is
shown by two one-sided tests with a margin that the sweep names. Below three seeds nothing is decided.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import statsmodels.formula.api as smf
import wording
from records import differing_settings, text_of
from scipy import stats
from statsmodels.stats.multitest import multipletests

from repmlp.runs.contrasts import Contrast
from repmlp.runs.key import cell_key

LEVEL = 0.05
FEWEST = 3  # seeds, below which nothing is decided


@dataclass
class Pair:
    """A contrast between two cells of a study. where: the settings that both have, in words."""

    contrast: Contrast
    where: str
    minus: str
    plus: str


@dataclass
class Finding:
    """What the data say of one pair. Differences in points; intervals of 95 %.

    difference: mean over the n seeds that both cells have (the two-way estimate uses the other cells' seeds too, where
    cells lack some). two_way and paired: (low, high), 90 % where the claim is equality. Below three seeds nothing but
    the difference. p: of the claim, by the two-way analysis, corrected by Holm. paired_p: uncorrected.
    """

    pair: Pair
    n: int
    left_out: tuple[int, ...]
    difference: float
    freedom: int
    two_way: tuple[float, float]
    p: float
    paired: tuple[float, float]
    paired_p: float

    @property
    def verdict(self) -> str:
        """Say what stands: clear or not clear, equivalent or not shown; open below three seeds."""
        if self.n < FEWEST:
            return f"open (n={self.n})"
        if self.pair.contrast.equivalent_within is None:
            return "clear" if self.p < LEVEL else "not clear"
        return "equivalent" if self.p < LEVEL else "equivalence not shown"


def pairs_of(records: pd.DataFrame, contrasts: Iterable[Contrast]) -> list[Pair]:
    """Return every two cells of a study that differ as a contrast says and in nothing else but the seed."""
    differing = differing_settings(records)
    keys = [cell_key(config) for config in records["config"]]
    table = differing.assign(cell=keys).drop_duplicates("cell").set_index("cell") if len(keys) else pd.DataFrame()
    table = table.where(table.notna(), None)  # absent settings: at their neutral value
    found = []
    for contrast in contrasts:
        name = "model.name" if contrast.vary == "model" else contrast.vary
        if name not in table:
            continue
        others = [n for n in table if n != name and not (contrast.vary == "model" and n.startswith("model."))]
        place = {cell: json.dumps([row[n] for n in others], default=str) for cell, row in table.iterrows()}
        for plus, to in table[name].items():
            for minus, before in table[name].items():
                ends = contrast.matches(to, contrast.to) and contrast.matches(before, contrast.before)
                if ends and place[plus] == place[minus]:
                    found.append(Pair(contrast, _where(table, plus, others), minus, plus))
    return sorted(found, key=lambda pair: pair.where)


def _where(table: pd.DataFrame, cell: str, others: Sequence[str]) -> str:
    """Say which of the cells that differ otherwise this is; a network's name stands for what all its cells have."""
    named = [
        name
        for name in others
        if name == "model.name"
        or not name.startswith("model.")
        or "model.name" not in table
        or table[name].map(text_of).groupby(table["model.name"]).nunique().max() > 1
    ]
    row = table.loc[cell]
    return ", ".join(
        wording.phrase(name, wording.value(name, row[name])) for name in named if table[name].map(text_of).nunique() > 1
    )


def analyse(records: pd.DataFrame, pairs: Sequence[Pair], outcome: str = "top1_pct") -> list[Finding]:
    """Finding contrasts of one study. records: of its runs; outcome: the column that is compared, in percent.

    Cells that contrasts connect are one analysis, over the seeds that one device did for all of them: one processor, or
    one GPU and its host's processor.
    """
    keys = pd.Series([cell_key(config) for config in records["config"]], records.index)
    processors = [json.dumps(p, sort_keys=True) if isinstance(p, dict) else "" for p in _column(records, "processor")]
    devices = [f"{d} {p}" for d, p in zip(_column(records, "device"), processors, strict=True)]
    data = pd.DataFrame(
        {"cell": keys, "seed": records["seed"].astype(int), "y": records[outcome].astype(float), "on": devices}
    ).drop_duplicates(["cell", "seed"])
    tests = [test for block in _blocks(pairs) for test in _block_tests(data, block)]
    # all contrasts count, those that cannot be decided yet too: a verdict does not move because another run arrives
    raw = [1.0 if np.isnan(test.p) else test.p for test in tests]
    for test, p in zip(tests, multipletests(raw, method="holm")[1] if tests else (), strict=True):
        test.p = float("nan") if np.isnan(test.p) else float(p)
    order = {id(pair): number for number, pair in enumerate(pairs)}
    return sorted(tests, key=lambda test: order[id(test.pair)])


def _column(records: pd.DataFrame, name: str) -> Iterable[Any]:
    return records[name] if name in records else [None] * len(records)


def _blocks(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Split pairs into groups that share no cell."""
    blocks: list[tuple[set[str], list[Pair]]] = []
    for pair in pairs:
        cells, members = {pair.minus, pair.plus}, [pair]
        apart = []
        for block in blocks:
            if block[0] & cells:
                cells, members = cells | block[0], block[1] + members
            else:
                apart.append(block)
        blocks = [*apart, (cells, members)]
    return [members for _, members in blocks]


def _block_tests(data: pd.DataFrame, pairs: Sequence[Pair]) -> list[Finding]:
    """Analyse the cells of some pairs together; p is not corrected yet."""
    cells = sorted({cell for pair in pairs for cell in (pair.minus, pair.plus)})
    of_block = data[data["cell"].isin(cells)]
    by_seed = of_block.groupby("seed").agg(cells=("cell", "nunique"), on=("on", "nunique"))
    # a seed of one cell says nothing of differences
    seeds = by_seed.index[(by_seed["cells"] > 1) & (by_seed["on"] == 1)]
    left_out = tuple(sorted(set(of_block["seed"]) - set(seeds)))
    used = of_block[of_block["seed"].isin(seeds)]
    wide = used.pivot(index="seed", columns="cell", values="y").reindex(columns=cells)
    fit = smf.ols("y ~ 0 + C(cell) + C(seed)", used).fit() if len(seeds) >= FEWEST else None
    findings = []
    for pair in pairs:
        both = wide[[pair.minus, pair.plus]].dropna()
        difference, n = both[pair.plus] - both[pair.minus], len(both)
        nothing = (float("nan"), float("nan"))
        found = Finding(pair, n, left_out, float(difference.mean()), 0, nothing, float("nan"), nothing, float("nan"))
        if fit is not None and n >= FEWEST:
            margin = pair.contrast.equivalent_within
            # two one-sided tests at 5 % say "equivalent" where the interval of 90 % lies within the margin
            beyond = LEVEL if margin is None else 2 * LEVEL
            result = fit.t_test(f"C(cell)[{pair.plus}] = C(cell)[{pair.minus}]")
            paired = stats.ttest_rel(both[pair.plus], both[pair.minus])
            found.freedom = int(fit.df_resid)
            found.two_way = tuple(map(float, result.conf_int(beyond)[0]))
            found.paired = tuple(map(float, paired.confidence_interval(1 - beyond)))
            if margin is None:
                found.p, found.paired_p = float(result.pvalue), float(paired.pvalue)
            else:
                estimate, error = float(np.squeeze(result.effect)), float(np.squeeze(result.sd))
                found.p = _equivalent(estimate, error, fit.df_resid, margin)
                found.paired_p = _equivalent(found.difference, float(difference.std() / n**0.5), n - 1, margin)
        findings.append(found)
    return findings


def _equivalent(difference: float, error: float, freedom: float, margin: float) -> float:
    """Return p of two one-sided tests that a difference lies within +-margin: the larger of the two."""
    if not error:
        return 0.0 if abs(difference) < margin else 1.0
    return float(stats.t.sf((margin - abs(difference)) / error, freedom))


def contrasts_table(tests: Sequence[Finding]) -> pd.DataFrame:
    """Write the tests of a study as its table shows them."""
    rows = []
    for test in tests:
        named = test.pair.contrast
        margin = named.equivalent_within
        rows.append(
            {
                "of": test.pair.where,
                "contrast": wording.contrast(named),
                "claim": "differ" if margin is None else f"equal within {margin:g}",
                "n": test.n,
                "difference": "" if np.isnan(test.difference) else f"{test.difference:+.2f}",
                "interval": _interval(test.two_way),
                "df": test.freedom or "",
                "p (Holm)": _p(test.p),
                "verdict": test.verdict,
                "paired interval": _interval(test.paired),
                "paired p": _p(test.paired_p),
            }
        )
    table = pd.DataFrame(rows)
    return table if table["of"].any() else table.drop(columns="of")


def contrasts_numbers(tests: Sequence[Finding]) -> pd.DataFrame:
    """Write the tests of a study as numbers, one a column; NaN where nothing is decided.

    Rounded, so that another processor's last digits change no committed file.
    """
    rows = [
        {
            "of": test.pair.where,
            "contrast": wording.contrast(test.pair.contrast),
            "equal_within": test.pair.contrast.equivalent_within,
            "n": test.n,
            "difference": test.difference,
            "low": test.two_way[0],
            "high": test.two_way[1],
            "df": test.freedom,
            "p_holm": test.p,
            "verdict": test.verdict,
            "paired_low": test.paired[0],
            "paired_high": test.paired[1],
            "paired_p": test.paired_p,
        }
        for test in tests
    ]
    table = pd.DataFrame(rows)
    for name in ("p_holm", "paired_p"):
        table[name] = [float(f"{p:.4g}") for p in table[name]]
    return table.round(dict.fromkeys(("difference", "low", "high", "paired_low", "paired_high"), 4))


def _interval(bounds: tuple[float, float]) -> str:
    return "" if np.isnan(bounds[0]) else f"{bounds[0]:+.2f} to {bounds[1]:+.2f}"


def _p(p: float) -> str:
    return "" if np.isnan(p) else "<0.0001" if p < 1e-4 else f"{p:.4f}"


def contrasts_note(tests: Sequence[Finding]) -> str:
    """Say how the tests were made, and which seeds they could not use."""
    left_out = sorted({seed for test in tests for seed in test.left_out})
    shuffled = wording.of_branches(wording.contrast(test.pair.contrast) for test in tests)
    more = f" Seeds {', '.join(map(str, left_out))} are left out: one cell alone has them, or two devices did them."
    return (
        "Top-1 of the last epoch, in points; contrasts named by the sweep. Two-way analysis on cell and seed, Holm's "
        "correction over all contrasts of the study, of both kinds; beside it each contrast paired by seed (n-1 "
        "degrees of freedom, p uncorrected). Equality: two one-sided tests. Intervals of 95 %, of 90 % where the claim "
        "is equality. Below three seeds there is a mean and nothing is decided." + (more if left_out else "")
    ) + (f" {shuffled}" if shuffled else "")
