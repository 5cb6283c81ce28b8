"""The differences that a sweep names before its runs, tested: is one clear, are two cells equivalent?

A sweep file names them under `contrasts`, a list of

    {cell: {kernels: [3]}, against: {kernels: ["3s"]}}                                  # is there a difference?
    {cell: {kernels: ["3s"]}, against: {kernels: [1]}, equivalent_within: 0.8}          # or none above 0.8 points?

`cell` and `against` set the same settings of the network (`model`: its name); every other setting has to be equal on
both sides, so that one line names a contrast for each value of them (for each network, say).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from scipy import stats

from repmlp import branches
from repmlp.runs.key import cell_key, config_key, determining

LEVEL = 0.05
FEWEST = 3  # below so many seeds nothing is called clear or equivalent


@dataclass(frozen=True)
class TwoWay:
    """Least squares of an outcome on cell + seed: what two cells differ by, and how sure that is.

    cells: their names. effects: (k,), of each cell, up to a constant. covariance: (k, k), of the effects for a residual
    variance of 1. variance: the residual one. df: its degrees of freedom, (k - 1)(n - 1) where no run is missing.
    """

    cells: tuple[Any, ...]
    effects: np.ndarray
    covariance: np.ndarray
    variance: float
    df: int

    def difference(self, cell: Any, against: Any) -> tuple[float, float]:
        """Return the difference of two cells and its standard error."""
        contrast = np.zeros(len(self.cells))
        contrast[self.cells.index(cell)], contrast[self.cells.index(against)] = 1, -1
        return float(contrast @ self.effects), float((contrast @ self.covariance @ contrast * self.variance) ** 0.5)


def two_way(runs: Iterable[tuple[Any, Any, float]]) -> TwoWay:
    """Fit the outcome of runs (cell, seed, outcome) on cell + seed. Runs may be missing; variance is NaN where df is 0.

    Raises ValueError where a cell has a seed twice.
    """
    runs = list(runs)
    if len({(cell, seed) for cell, seed, _ in runs}) < len(runs):
        raise ValueError("a cell has two runs of one seed")
    cells, seeds = (tuple(dict.fromkeys(run[i] for run in runs)) for i in (0, 1))
    # (N, k + n): a column a cell and a column a seed, one of them too many, which the pseudo-inverse bears
    design = np.array(
        [[cell == each for each in cells] + [seed == each for each in seeds] for cell, seed, _ in runs], float
    )
    outcome = np.array([value for *_, value in runs])
    inverse = np.linalg.pinv(design)
    fitted = inverse @ outcome
    df = len(runs) - int(np.linalg.matrix_rank(design))
    squares = float(np.sum((outcome - design @ fitted) ** 2))
    k = len(cells)
    return TwoWay(cells, fitted[:k], (inverse @ inverse.T)[:k, :k], squares / df if df else float("nan"), df)


def p_different(difference: float, error: float, df: int) -> float:
    """Return Student's two-sided p of a difference."""
    return float(2 * stats.t.sf(abs(difference) / error, df)) if error > 0 else float(difference == 0)


def p_equivalent(difference: float, error: float, df: int, margin: float) -> float:
    """Return p of two one-sided tests: small where the difference lies between -margin and margin (Schuirmann, 1987).

    Raises ValueError where the margin is not above 0.
    """
    if not margin > 0:
        raise ValueError(f"margin {margin}: equivalence needs one above 0")
    if error == 0:
        return float(abs(difference) >= margin)
    return float(stats.t.sf((margin - abs(difference)) / error, df))


def holm(p: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p of a family of tests, in their order (Holm, 1979)."""
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(np.argsort(p, kind="stable")):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def named(sweep: str, folder: Path) -> list[dict[str, Any]]:
    """Read the contrasts that the sweep of this name names in its file below `folder`; [] where it names none."""
    for path in sorted(folder.rglob("*.yaml")):
        content = yaml.safe_load(path.read_text())
        if content.get("sweep") == sweep:
            return content.get("contrasts") or []
    return []


def contrasts_table(records: pd.DataFrame, contrasts: Sequence[Mapping[str, Any]], outcome: str) -> pd.DataFrame:
    """Test the named contrasts of a study, one a row; numbers are numbers, NaN where there are too few seeds.

    records: the runs of one study. outcome: the column to compare, in percent. Cells that contrasts join, over other
    cells too, are fitted together on cell + seed, so that networks that are never compared with each other do not
    share a variance. Holm's family are all tests of a difference, and all of equivalence, that the study names. A seed
    whose runs were made on different processors is left out of a fit.
    Raises ValueError for a contrast that names no cells of the study or is spelt wrongly.
    """
    pairs = _pairs(records, contrasts)
    keys = pd.Series([cell_key(config) for config in records["config"]], records.index)
    rows = []
    for pair in pairs:
        joined = _joined({pair["cell"], pair["against"]}, pairs)
        runs = _of_one_processor(records[keys.isin(joined)])
        values = {
            key: runs[keys[runs.index] == key].set_index("seed")[outcome].astype(float)
            for key in (pair["cell"], pair["against"])
        }
        differences = (values[pair["cell"]] - values[pair["against"]]).dropna()
        n = len(differences)
        row = {"network": pair["network"], "contrast": pair["words"], "n": n, "difference": differences.mean()}
        margin = pair["margin"]
        row |= dict.fromkeys(("low", "high", "SE", "df", "p", "p Holm", "p paired"), float("nan"))
        row |= {"margin": float("nan") if margin is None else margin}
        if n >= FEWEST:
            fit = two_way(zip(keys[runs.index], runs["seed"], runs[outcome].astype(float), strict=True))
            estimate, error = fit.difference(pair["cell"], pair["against"])
            # two one-sided tests at 5 % are a 90 % interval within the margin
            half = error * stats.t.isf(LEVEL if margin is not None else LEVEL / 2, fit.df)
            paired = float(differences.std() / n**0.5)
            if margin is None:
                p, of_pairs = p_different(estimate, error, fit.df), p_different(differences.mean(), paired, n - 1)
            else:
                p, of_pairs = (
                    p_equivalent(d, e, df, margin)
                    for d, e, df in ((estimate, error, fit.df), (differences.mean(), paired, n - 1))
                )
            row |= {"difference": estimate, "low": estimate - half, "high": estimate + half, "SE": error}
            row |= {"df": fit.df, "p": p, "p paired": of_pairs}
        rows.append(row)
    table = pd.DataFrame(rows)
    for family in (table["margin"].isna(), table["margin"].notna()):
        tested = family & table["p"].notna()
        table.loc[tested, "p Holm"] = holm(_with_untested(table.loc[family, "p"]))[: int(tested.sum())]
    table["verdict"] = [_verdict(row) for row in table.to_dict("records")]
    return table


def _with_untested(p: pd.Series) -> list[float]:
    """Return the p that there are, then 1 for every contrast not tested yet: the family is as large as it was named."""
    return [*p.dropna(), *([1.0] * int(p.isna().sum()))]


def _verdict(row: Mapping[str, Any]) -> str:
    if row["n"] < FEWEST:
        return "open"
    small = row["p Holm"] < LEVEL
    if row["margin"] == row["margin"]:
        return "equivalent" if small else "not shown"
    return "clear" if small else "not clear"


def _setting(record: Mapping[str, Any], name: str) -> Any:
    """Return the value that a run has for a name of a contrast."""
    if name == "model":
        return record["model"]
    model = determining(record["config"])["model"]
    if name == "kernels":
        return branches.label(model.get("kernels") or [])
    return model.get(name)


def _pairs(records: pd.DataFrame, contrasts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return for each named contrast the pairs of cells (their keys) that it compares, in its order."""
    pairs = []
    runs = records.to_dict("records")
    for contrast in contrasts:
        unknown = contrast.keys() - {"cell", "against", "equivalent_within"}
        if (
            unknown
            or not contrast.keys() >= {"cell", "against"}
            or contrast["cell"].keys() != contrast["against"].keys()
        ):
            raise ValueError(
                f"contrast {dict(contrast)}: it has `cell` and `against`, which set the same settings, and perhaps "
                "`equivalent_within`"
            )
        names = list(contrast["cell"])
        found: dict[str, dict[str, Any]] = {}
        for side in ("cell", "against"):
            wanted = {
                name: branches.label(value) if name == "kernels" else value for name, value in contrast[side].items()
            }
            for run in runs:
                if all(_setting(run, name) == value for name, value in wanted.items()):
                    found.setdefault(_rest(run, names), {"network": run["model"]})[side] = cell_key(run["config"])
        words = " - ".join(_words(contrast[side]) for side in ("cell", "against"))
        whole = [(rest, pair) for rest, pair in found.items() if "cell" in pair and "against" in pair]
        if not found:
            raise ValueError(f"contrast {words}: the study has no run of either side")
        apart = _telling(rest for rest, _ in whole)
        for rest, pair in sorted(whole, key=lambda item: (item[1]["network"], item[0])):
            where = f" ({apart[rest]})" if apart[rest] else ""
            network = "" if "model" in names else pair["network"]
            pairs.append(
                {**pair, "network": network, "words": words + where, "margin": contrast.get("equivalent_within")}
            )
    return pairs


def _rest(run: Mapping[str, Any], names: Sequence[str]) -> str:
    """Write all settings of a run but its seed and those of a contrast, for comparison."""
    config = {k: v for k, v in determining(run["config"]).items() if k != "seed"}
    config["model"] = (
        {} if "model" in names else {"": run["model"], **{k: v for k, v in config["model"].items() if k not in names}}
    )
    return json.dumps(config, sort_keys=True)


def _telling(rests: Iterable[str]) -> dict[str, str]:
    """Return for each the settings in which those of one network differ, in words; "" where there is nothing to say."""
    rests = list(rests)
    flat = {}
    for rest in rests:
        config = json.loads(rest)
        parts = {k: v for k, v in config.items() if not isinstance(v, dict)}
        for part in ("model", "data", "recipe"):
            parts |= config[part]
        flat[rest] = parts
    told = {}
    for rest, parts in flat.items():
        alike = [other for other in flat.values() if other.get("") == parts.get("")]
        differing = [k for k in parts if k and any(other.get(k) != parts[k] for other in alike)]
        told[rest] = ", ".join(f"{k}={_plain(parts[k])}" for k in differing)
    return told


def _words(side: Mapping[str, Any]) -> str:
    shown = [
        branches.label(v) if name == "kernels" else v if name == "model" else f"{name}={_plain(v)}"
        for name, v in side.items()
    ]
    return ", ".join(shown)


def _plain(value: Any) -> str:
    return json.dumps(value).replace(" ", "")


def _joined(cells: set[str], pairs: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return these cells and all that contrasts join with them, directly or over others."""
    while True:
        more = {p[side] for p in pairs if {p["cell"], p["against"]} & cells for side in ("cell", "against")}
        if more <= cells:
            return cells
        cells = cells | more


def _of_one_processor(runs: pd.DataFrame) -> pd.DataFrame:
    """Leave out the seeds whose runs name different processors; older records name none."""
    if "processor" not in runs:
        return runs
    named = pd.Series([config_key(p) if isinstance(p, dict) else None for p in runs["processor"]], runs.index)
    return runs[named.groupby(runs["seed"]).transform("nunique", dropna=False) <= 1]
