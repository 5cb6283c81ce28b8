"""What a study's runs allow to say: against independent computations; what is compared, and what is left out."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import compose_config
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from significance import _equivalent, analyse, contrasts_note, contrasts_table, pairs_of

from repmlp.runs.contrasts import Contrast, named_by, parse, shown

NONE = Contrast("model.kernels", [], [3])
BOTH = Contrast("model.kernels", [], [1, 3])


def study(values, processor=None, device=None, **changes) -> pd.DataFrame:
    """Make records of a study: values[kernels as text][seed] = top-1."""
    runs, base = [], compose_config(*(f"{name}={value}" for name, value in changes.items()))
    for kernels, by_seed in values.items():
        for seed, top1 in by_seed.items():
            config = {**base, "model": {**base["model"], "kernels": json.loads(kernels)}, "seed": seed}
            on = processor(kernels, seed) if processor else None
            runs.append({"model": "net", "seed": seed, "top1_pct": top1, "config": config, "processor": on})
            runs[-1]["device"] = device(kernels, seed) if device else "x86_64 CPU"
    return pd.DataFrame(runs)


def by_hand(wide: np.ndarray, plus: int, minus: int):
    """Difference, standard error and p of a balanced two-way layout (seeds, cells), from the sums of squares."""
    n, k = wide.shape
    residual = wide - wide.mean(axis=0) - wide.mean(axis=1, keepdims=True) + wide.mean()
    freedom = (k - 1) * (n - 1)
    error = (2 * (residual**2).sum() / freedom / n) ** 0.5
    difference = wide[:, plus].mean() - wide[:, minus].mean()
    return difference, error, freedom, 2 * stats.t.sf(abs(difference) / error, freedom)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 5))
def test_two_way_and_paired_are_those_of_the_textbook(seed, n):
    wide = np.random.default_rng(seed).normal(30, 1, (n, 3)) + np.arange(n)[:, None]
    kernels = ["[]", "[3]", "[1,3]"]
    records = study({name: dict(enumerate(wide[:, i])) for i, name in enumerate(kernels)})
    tests = analyse(records, pairs_of(records, [NONE, BOTH]))
    raw = []
    for test, column in zip(tests, (1, 2), strict=True):
        difference, error, freedom, p = by_hand(wide, column, 0)
        raw.append(p)
        assert test.difference == pytest.approx(difference) and test.freedom == freedom and test.n == n
        reach = stats.t.ppf(0.975, freedom) * error
        assert test.two_way == pytest.approx((difference - reach, difference + reach))
        d = wide[:, column] - wide[:, 0]
        t = d.mean() / (d.std(ddof=1) / n**0.5)
        assert test.paired_p == pytest.approx(2 * stats.t.sf(abs(t), n - 1))
    # Holm: the smaller p doubled, the other one at least as large
    small, large = sorted(raw)
    expected = {small: min(1, 2 * small), large: min(1, max(2 * small, large))}
    assert [test.p for test in tests] == pytest.approx([expected[p] for p in raw])


def test_a_worked_example():
    """Cushny and Peebles' sleep data, in Student's paper of 1908: mean 1.58 hours, t = 4.06 at 9 degrees of freedom."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    records = study({"[]": dict(enumerate(first)), "[3]": dict(enumerate(second))})
    (test,) = analyse(records, pairs_of(records, [NONE]))
    assert test.difference == pytest.approx(1.58)
    assert test.paired_p == pytest.approx(0.002833, abs=1e-6)
    # with two cells both analyses are the same
    assert test.p == pytest.approx(test.paired_p) and test.two_way == pytest.approx(test.paired)
    assert test.verdict == "clear"


@pytest.mark.parametrize(("n", "verdict"), [(1, "open (n=1)"), (2, "open (n=2)"), (3, "clear")])
def test_nothing_is_decided_below_three_seeds(n, verdict):
    records = study({"[]": {s: 30 + s for s in range(n)}, "[3]": {s: 35 + s + 0.01 * (s == 0) for s in range(n)}})
    (test,) = analyse(records, pairs_of(records, [NONE]))
    assert test.verdict == verdict
    table = contrasts_table([test])
    assert table["difference"][0].startswith("+5.0")
    assert (table["p (Holm)"][0] == "") == (table["interval"][0] == "") == (n < 3)


def test_equality_is_shown_by_two_one_sided_tests_and_not_by_a_missing_star():
    noisy = {"[]": {0: 30.0, 1: 33.0, 2: 31.0}, "[3]": {0: 32.5, 1: 30.0, 2: 32.0}}
    equal = {"[]": {0: 30.0, 1: 33.0, 2: 31.0}, "[3]": {0: 30.1, 1: 33.0, 2: 31.05}}
    claim = Contrast("model.kernels", [], [3], 0.8)
    for values, verdict in ((noisy, "equivalence not shown"), (equal, "equivalent")):
        records = study(values)
        (test,) = analyse(records, pairs_of(records, [claim]))
        assert test.verdict == verdict
        d = np.subtract(list(values["[3]"].values()), list(values["[]"].values()))
        sides = [stats.ttest_1samp(d, -0.8, alternative="greater"), stats.ttest_1samp(d, 0.8, alternative="less")]
        assert test.p == pytest.approx(max(side.pvalue for side in sides))
    assert _equivalent(2.0, 0.1, 4, 0.8) > 0.99


def test_cells_of_other_settings_are_not_compared():
    """Precision, data and recipe are part of a cell; the contrast is made within each of them."""
    values = {"[]": {0: 1.0, 1: 2.0}, "[3]": {0: 2.0, 1: 2.5}}
    records = pd.concat([study(values), study(values, **{"trainer.precision": "bf16-mixed"})], ignore_index=True)
    pairs = pairs_of(records, [NONE])
    assert [pair.where for pair in pairs] == ["precision 32-true", "precision bf16-mixed"]
    mixed = pd.concat(
        [study({"[]": {0: 1.0}}), study({"[3]": {0: 1.0}}, **{"trainer.precision": "bf16-mixed"})], ignore_index=True
    )
    assert pairs_of(mixed, [NONE]) == []


def test_a_seed_that_is_not_whole_or_was_done_on_two_processors_is_left_out():
    values = {"[]": {0: 30.0, 1: 31.0, 2: 30.5, 3: 30.2}, "[3]": {0: 32.0, 1: 33.5, 2: 32.4}}
    kinds = {True: {"name": "one", "amx": True}, False: {"name": "other", "amx": False}}
    records = study(values, processor=lambda kernels, seed: kinds[not (seed == 2 and kernels == "[3]")])
    (test,) = analyse(records, pairs_of(records, [NONE]))
    assert (test.n, test.left_out) == (2, (2, 3))
    assert "Seeds 2, 3 are left out" in contrasts_note([test])


def test_a_seed_of_a_gpu_and_its_hosts_own_processor_is_left_out():
    values = {"[]": {0: 30.0, 1: 31.0, 2: 30.5}, "[3]": {0: 32.0, 1: 33.5, 2: 32.4}}
    host = {"name": "one", "amx": True}
    gpu = {(kernels, 0) for kernels in values} | {("[]", 2)}  # seed 0 wholly, seed 2 in part
    records = study(
        values, lambda *_: host, lambda kernels, seed: "NVIDIA H200" if (kernels, seed) in gpu else "x86_64 CPU"
    )
    (test,) = analyse(records, pairs_of(records, [NONE]))
    assert (test.n, test.left_out) == (2, (2,))


def test_a_cell_that_grows_takes_no_other_one_down():
    """Least squares over all runs: cells of five seeds keep them beside one of two, which stays open and counts."""
    values = np.random.default_rng(3).normal(30, 1, (5, 2))
    whole = {"[]": dict(enumerate(values[:, 0])), "[3]": dict(enumerate(values[:, 1] + 9))}
    records = study({**whole, "[1,3]": {0: 33.0, 1: 34.0}})
    three, both = analyse(records, pairs_of(records, [NONE, BOTH]))
    assert (three.n, both.n, both.verdict) == (5, 2, "open (n=2)") and three.verdict == "clear"
    frame = [(0, s, v) for s, v in whole["[]"].items()] + [(1, s, v) for s, v in whole["[3]"].items()]
    frame += [(2, 0, 33.0), (2, 1, 34.0)]
    design = np.array([[cell == 0, cell == 1, cell == 2, *(seed == k for k in range(1, 5))] for cell, seed, _ in frame])
    design, y = design.astype(float), np.array([value for *_, value in frame])
    coefficients, squares, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    freedom = len(y) - rank
    covariance = np.linalg.inv(design.T @ design) * squares[0] / freedom
    contrast = np.array([-1, 1, 0, 0, 0, 0, 0])
    error, middle = (contrast @ covariance @ contrast) ** 0.5, contrast @ coefficients
    reach = stats.t.ppf(0.975, freedom) * error
    assert three.freedom == freedom and three.two_way == pytest.approx((middle - reach, middle + reach))
    # the open one counts in Holm's correction
    assert three.p == pytest.approx(min(1, 2 * 2 * stats.t.sf(abs(middle) / error, freedom)))


def test_sweeps_name_contrasts(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.yaml").write_text("sweep: a\ncontrasts:\n- {vary: model.kernels, from: ['3s'], to: [3]}\n")
    (tmp_path / "b.yaml").write_text("sweep: b\n")
    (contrast,) = named_by(["a", "b"], tmp_path)
    assert str(contrast) == "3x3 - 3x3s"
    assert contrast.matches(["3"], contrast.to) and not contrast.matches([1], contrast.to)
    with pytest.raises(ValueError, match="equivalent_within=-1"):
        parse([{"vary": "x", "from": 1, "to": 2, "equivalent_within": -1}])
    with pytest.raises(ValueError, match=r"use \{vary: SETTING"):
        parse([{"vary": "x", "form": 1, "to": 2}])


def test_a_contrast_may_start_from_a_default():
    """Runs at a setting's default are those without it in their key, whatever the records spell out."""
    records = pd.concat(
        [study({"[]": {0: 30.0}}), study({"[]": {0: 31.0}}, **{"recipe.mixup": 0.8})], ignore_index=True
    )
    del records.loc[0, "config"]["recipe"]["mixup"]  # an older record
    for start, words in ((0.0, "recipe.mixup: 0.8 - 0"), (0.2, None)):
        pairs = pairs_of(records, [Contrast("recipe.mixup", start, 0.8)])
        assert [str(pair.contrast) for pair in pairs] == ([words] if words else [])


def test_values_are_written_as_what_they_are():
    values = [0, 1, False, True, None, 0.5, 2.0, [4, 16], "head"]
    written = [shown("data.shift", value) for value in values]
    assert written == ["0", "1", "no", "yes", "none", "0.5", "2", "4,16", "head"]
    assert shown("model.kernels", [1, 3]) == "1x1+3x3"
