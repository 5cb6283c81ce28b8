"""How a set-sharing FC's time and memory grow: fitted exponents beside theory, and what larger images would cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import timm
import torch
from scipy.optimize import nnls

import repmlp  # noqa: F401  (registers our networks with timm)
from repmlp import RepMLPBlock
from repmlp.statistics import fit_power_law

FORMS = ("deployed", "training")
AXES = ("positions", "channels", "share_sets")
# exponents by axis; at the peak a forward pass holds maps, a training step maps and the weight's gradient
THEORY = {
    "seconds": {"positions": "2", "channels": "1", "share_sets": "0"},
    "weight_bytes": {"positions": "2", "channels": "0", "share_sets": "1"},
}
PEAK = {
    "deployed": {"positions": "1", "channels": "1", "share_sets": "0"},
    "training": {"positions": "1 to 2", "channels": "0 to 1", "share_sets": "0 to 1"},
}
DEPARTURE = 0.1  # from theory; what departs by more has to be explained
NETWORK = "repmlpnet_t256"
PIXELS = (256, 512, 1024)
WHY = (
    "Why time departs from theory: a layer is not its products alone. Its time is taken apart into a fixed part, one "
    "that grows with the value and, with positions, one that grows with its square (non-negative least squares of "
    "relative errors); the shares are those at the smallest and at the largest value, and what is fixed and what is "
    "linear few points tell apart badly. The square is the products. What "
    "grows with positions alone goes over the maps: copies between layouts and, in training, batch norms and branches. "
    "What grows with share-sets goes over the S matrices: they are read, in training also merged with the branches and "
    "given gradients, for 8 C/S rows of input each. largest two: the exponent between the two largest values alone."
)


def note(rows: pd.DataFrame) -> str:
    """Say what was measured, where, and what else the machine did."""
    first = rows.iloc[0]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    clock = {"processor": "the processor's own clock", "wall": "the clock on the wall"}[first["clock"]]
    load = f"load average {rows['load'].min():.0f} to {rows['load'].max():.0f}" if rows["load"].notna().all() else ""
    return (
        f"One set-sharing FC, batch {first['batch_size']}: forward pass of the merged layer (deployed), forward and "
        f"backward pass with branches of 1x1 and 3x3 (training). Median of {first['rounds']} rounds in turn by "
        f"{clock}. {first['processor']['name']}, {first['threads']} thread(s), {first['dtype']}, {versions}"
        f"{', ' * bool(load)}{load}. ±: standard error of the fit to all points, logarithms by least squares. *: more "
        f"than {DEPARTURE} from theory."
    )


def exponents_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Make the table of exponents beside theory, one row a form and an axis."""
    table = []
    for _, row in ordered(rows):
        of, points = row["of"], row["points"]
        fixed = ", ".join(f"{name} {value}" for name, value in row["base"].items() if name != of)
        last = math.log(row["point_seconds"][-1] / row["point_seconds"][-2]) / math.log(points[-1] / points[-2])
        peak = row["exponents"]["peak_memory_bytes"]
        table.append(
            {
                "form": row["form"],
                "growing": f"{of}, {points[0]} to {points[-1]}",
                "fixed": fixed,
                "time": _written(row["exponents"]["seconds"], THEORY["seconds"][of]),
                "theory": THEORY["seconds"][of],
                "largest two": f"{last:.2f}",
                "parts, smallest to largest": parts(of, points, row["point_seconds"]),
                "weight": f"{row['exponents']['weight_bytes']['exponent'] + 0.0:.2f}",
                "weight, theory": THEORY["weight_bytes"][of],
                "peak memory": "" if peak is None else _written(peak, PEAK[row["form"]][of]),
                "peak, theory": PEAK[row["form"]][of],
            }
        )
    return pd.DataFrame(table)


class Curve(NamedTuple):
    """Time as a fixed part, one that grows with a value and one that grows with its square: their coefficients."""

    coefficients: tuple[float, ...]

    @classmethod
    def fit(cls, of: str, points: Sequence[float], seconds: Sequence[float]) -> Curve:
        """Fit by non-negative least squares of relative errors; a square along positions alone."""
        powers = np.arange(3 if of == "positions" else 2)
        x, y = np.asarray(points, dtype=np.float64) / points[-1], np.asarray(seconds)
        # (points, powers), each row over its time
        found, _ = nnls(x[:, None] ** powers / y[:, None], np.ones_like(y))
        return cls(tuple(found / float(points[-1]) ** powers))

    def __call__(self, x: float) -> float:
        return sum(c * x**power for power, c in enumerate(self.coefficients))

    def shares(self, x: float) -> list[float]:
        """Return the shares of the parts at a value, in percent."""
        return [100 * c * x**power / self(x) for power, c in enumerate(self.coefficients)]


def parts(of: str, points: Sequence[float], seconds: Sequence[float]) -> str:
    """Say which share of the time grows with which power of the value, at the smallest and the largest."""
    curve = Curve.fit(of, points, seconds)
    ends = zip(("fixed", "linear", "square"), curve.shares(points[0]), curve.shares(points[-1]), strict=False)
    return ", ".join(f"{name} {first:.0f} to {last:.0f} %" for name, first, last in ends)


def _written(fitted: Mapping[str, float], theory: str) -> str:
    """Write an exponent and its error, with a star where it departs from theory, a number or a range."""
    low, high = (float(number) for number in (theory.split(" to ") * 2)[:2])
    departs = not low - DEPARTURE <= fitted["exponent"] <= high + DEPARTURE
    return f"{fitted['exponent']:.2f} ± {fitted['error']:.2f}{' *' if departs else ''}"


def points_table(rows: pd.DataFrame) -> pd.DataFrame:
    """List what was measured, for the CSV: one row a form, an axis and a value."""
    table = []
    for _, row in ordered(rows):
        for number, point in enumerate(row["points"]):
            peak = row["peak_memory_bytes"][number]
            table.append(
                {
                    "form": row["form"],
                    **row["base"],
                    row["of"]: point,
                    "growing": row["of"],
                    "ms": f"{1000 * row['point_seconds'][number]:.3f}",
                    "ms low": f"{1000 * row['point_quartiles'][number][0]:.3f}",
                    "ms high": f"{1000 * row['point_quartiles'][number][1]:.3f}",
                    "weight MiB": f"{row['weight_bytes'][number] / 2**20:.3f}",
                    "peak MiB": "" if peak is None else f"{peak / 2**20:.1f}",
                }
            )
    return pd.DataFrame(table)


def ordered(rows: pd.DataFrame) -> list[tuple[Any, pd.Series]]:
    """Return the records by form and axis."""
    return sorted(rows.iterrows(), key=lambda pair: (FORMS.index(pair[1]["form"]), AXES.index(pair[1]["of"])))


def estimate(rows: pd.DataFrame, at: Mapping[str, int]) -> np.ndarray:
    """Return seconds of a layer of one form: by the parts of its time along positions, and by the exponent: (2,).

    Along channels and share-sets by the exponents, from where the axes cross.
    rows: the form's records. at: positions, channels and share_sets of the layer.
    """
    found = rows.set_index("of")
    along = found.loc["positions"]
    points, seconds = along["points"], along["point_seconds"]
    times = np.array(
        [f(at["positions"]) for f in (Curve.fit("positions", points, seconds), fit_power_law(points, seconds))]
    )
    for name in AXES[1:]:
        times = times * (at[name] / along["base"][name]) ** found.loc[name, "exponents"]["seconds"]["exponent"]
    return times


def layers(pixels: int) -> list[list[dict[str, int]]]:
    """Return positions, channels and share_sets of the set-sharing FCs of NETWORK at an input size, by stage."""
    with torch.device("meta"):
        net = timm.create_model(NETWORK, img_size=pixels, inference_mode=True)
    found = []
    for stage, info in zip(net.stages, net.feature_info, strict=True):
        fcs = [m.channel_perceptron for m in stage.modules() if isinstance(m, RepMLPBlock)]
        found.append(
            [{"positions": fc.weight.shape[-1], "channels": info["num_chs"], "share_sets": fc.share_sets} for fc in fcs]
        )
    return found


def estimates_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Make the table of what the FCs of NETWORK would cost at larger inputs, each FC over its whole map."""
    base = rows.iloc[0]["base"]
    ranges = {row["of"]: (min(row["points"]), max(row["points"])) for _, row in rows.iterrows()}
    item = rows.iloc[0]["weight_bytes"][0] / _numbers({**base, rows.iloc[0]["of"]: rows.iloc[0]["points"][0]})
    table = []
    for pixels in PIXELS:
        total: dict[str, Any] = {form: np.zeros(2) for form in FORMS}
        size, beyond = 0.0, False
        for number, stage in enumerate(layers(pixels), 1):
            at = stage[0]
            inside = all(ranges[name][0] <= at[name] <= ranges[name][1] for name in AXES)
            beyond |= not inside
            spent = {form: len(stage) * estimate(rows[rows["form"] == form], at) for form in FORMS}
            weights = len(stage) * _numbers(at) * item
            total = {form: total[form] + spent[form] for form in FORMS}
            size += weights
            side = math.isqrt(at["positions"])
            words = f"{number}: {len(stage)} FCs on {side}x{side}"
            table.append(_line(pixels, words, at["channels"], at["share_sets"], spent, weights, inside))
        table.append(_line(pixels, "all", "", "", total, size, not beyond))
    return pd.DataFrame(table)


def _line(
    pixels: int, stage: str, channels: int | str, sets: int | str, times: Mapping[str, np.ndarray], size: float,
    inside: bool,
) -> dict[str, Any]:  # fmt: skip
    """Write a line of the estimates; times: of each form. size: of the weights in bytes. inside: what was measured."""
    return {
        "input": pixels,
        "stage": stage,
        "channels": channels,
        "share-sets": sets,
        **_seconds(times),
        "weights GiB": f"{size / 2**30:.3f}",
        "estimate": "within what was measured" if inside else "extrapolated",
    }


def _numbers(at: Mapping[str, int]) -> int:
    """Count weight and bias of a merged FC."""
    return at["share_sets"] * at["positions"] * (at["positions"] + 1)


def _seconds(times: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Write the two estimates of each form."""
    return {
        f"{form} s{how}": f"{seconds:.3g}"
        for form in FORMS
        for how, seconds in zip(("", ", by exponents"), times[form], strict=True)
    }
