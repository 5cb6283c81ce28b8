"""Contrasts of a study against independent computations: normal equations, scipy's paired t, worked examples."""

import copy

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from contrasts import contrasts_table, holm, named, p_different, p_equivalent, two_way
from scipy import stats

LABELS = {"none": [], "1x1": [1], "3x3": [3], "3s": ["3s"]}
CONTRASTS = [
    {"cell": {"kernels": [3]}, "against": {"kernels": ["3s"]}},
    {"cell": {"kernels": ["3s"]}, "against": {"kernels": [1]}, "equivalent_within": 0.8},
    {"cell": {"kernels": [3]}, "against": {"kernels": []}},
]


def record(kernels, seed, top1, model="net", precision="bf16-mixed", processor="A"):
    config = {
        "model": {"arch": "repmlpnet", "kernels": kernels}, "data": {"name": "cifar100"}, "recipe": {"epochs": 1},
        "trainer": {"precision": precision}, "seed": seed,
    }  # fmt: skip
    return {
        "model": model, "kernels": kernels, "seed": seed, "top1_pct": top1, "config": config,
        "processor": {"name": processor},
    }  # fmt: skip


def study(n=5, noise=0.3, model="net", effects=(33.0, 34.0, 36.0, 34.0), seed=0):
    generator = np.random.default_rng(seed)
    of_seed = generator.normal(0, 2, n)
    return [
        record(kernels, s, effect + of_seed[s] + generator.normal(0, noise), model)
        for kernels, effect in zip(LABELS.values(), effects, strict=True)
        for s in range(n)
    ]


@pytest.mark.parametrize(("k", "n"), [(2, 2), (2, 5), (4, 3), (6, 5)])
def test_two_way_is_the_analysis_of_variance_of_a_balanced_table(k, n):
    """Independent: means of rows and columns. For two cells the fit is the paired t test."""
    values = np.random.default_rng(k * n).normal(size=(k, n))
    fit = two_way((i, s, values[i, s]) for i in range(k) for s in range(n))
    residual = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    assert fit.df == (k - 1) * (n - 1)
    assert fit.variance == pytest.approx((residual**2).sum() / fit.df)
    difference, error = fit.difference(1, 0)
    assert difference == pytest.approx(values[1].mean() - values[0].mean())
    assert error == pytest.approx((2 * fit.variance / n) ** 0.5)
    if k == 2:
        assert p_different(difference, error, fit.df) == pytest.approx(stats.ttest_rel(values[1], values[0]).pvalue)


def test_two_way_with_missing_runs_is_least_squares_by_lstsq():
    values = np.random.default_rng(3).normal(size=(4, 5))
    runs = [(i, s, values[i, s]) for i in range(4) for s in range(5) if (i, s) not in ((0, 1), (3, 4), (2, 2))]
    design = np.zeros((len(runs), 8))  # reference coding: the first cell and the first seed have no column
    for row, (i, s, _) in enumerate(runs):
        design[row, 0] = 1
        if i:
            design[row, i] = 1
        if s:
            design[row, 3 + s] = 1
    outcome = np.array([v for *_, v in runs])
    beta, squares, *_ = np.linalg.lstsq(design, outcome, rcond=None)
    fit = two_way(runs)
    assert fit.df == len(runs) - 8
    difference, error = fit.difference(3, 0)
    assert difference == pytest.approx(beta[3])
    assert error == pytest.approx((squares[0] / fit.df * np.linalg.inv(design.T @ design)[3, 3]) ** 0.5)


def test_two_way_on_the_published_sleep_data():
    """Student (1908): extra hours of sleep by two drugs in ten patients; paired t = -4.0621, df 9, p = 0.002833."""
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    fit = two_way([("1", i, v) for i, v in enumerate(first)] + [("2", i, v) for i, v in enumerate(second)])
    difference, error = fit.difference("1", "2")
    assert (fit.df, difference) == (9, pytest.approx(-1.58))
    assert difference / error == pytest.approx(-4.0621, abs=5e-5)
    assert p_different(difference, error, fit.df) == pytest.approx(0.002833, abs=5e-7)


def test_a_cell_with_a_seed_twice_is_refused():
    with pytest.raises(ValueError, match="two runs of one seed"):
        two_way([("a", 0, 1.0), ("a", 0, 2.0)])


def test_holm_by_its_definition():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_equivalence_is_the_larger_of_two_one_sided_t_tests():
    values = np.random.default_rng(1).normal(0.2, 0.3, 5)
    error = values.std(ddof=1) / 5**0.5
    lower = stats.ttest_1samp(values, -0.8, alternative="greater").pvalue
    upper = stats.ttest_1samp(values, 0.8, alternative="less").pvalue
    assert p_equivalent(values.mean(), error, 4, 0.8) == pytest.approx(max(lower, upper))
    with pytest.raises(ValueError, match="margin 0"):
        p_equivalent(0.1, 0.1, 4, 0)


def test_the_control_decides_in_the_table():
    table = contrasts_table(pd.DataFrame(study() + study(model="other", seed=1)), CONTRASTS, "top1_pct")
    assert table["contrast"].tolist() == ["3x3 - 3s"] * 2 + ["3s - 1x1"] * 2 + ["3x3 - none"] * 2
    assert table["network"].tolist() == ["net", "other"] * 3
    assert table["verdict"].tolist() == ["clear"] * 2 + ["equivalent"] * 2 + ["clear"] * 2
    assert (table["df"] == 12).all() and (table["n"] == 5).all()  # a fit a network: 4 cells, 5 seeds
    different = table["margin"].isna()
    assert table.loc[different, "p Holm"].tolist() == pytest.approx(holm(table.loc[different, "p"].tolist()))
    # beside it the paired t
    runs = pd.DataFrame(study()).assign(label=lambda r: [str(k) for k in r["kernels"]])
    by = runs.pivot(index="seed", columns="label", values="top1_pct")
    assert table["p paired"][0] == pytest.approx(stats.ttest_rel(by["[3]"], by["['3s']"]).pvalue)


def test_no_effect_is_not_clear_and_no_difference_is_not_equivalence():
    table = contrasts_table(pd.DataFrame(study(noise=3.0, effects=(33, 33, 33, 33))), CONTRASTS, "top1_pct")
    assert table["verdict"].tolist() == ["not clear", "not shown", "not clear"]


@pytest.mark.parametrize("n", [1, 2])
def test_below_three_seeds_a_mean_and_the_word_open(n):
    table = contrasts_table(pd.DataFrame(study(n, noise=0.01)), CONTRASTS, "top1_pct")
    assert table["verdict"].tolist() == ["open"] * 3
    assert table[["low", "high", "SE", "p", "p Holm", "p paired"]].isna().all(axis=None)
    assert table["difference"].notna().all()


def test_cells_of_another_precision_are_never_compared():
    runs = [record([3], s, 36.0 + s, precision="32-true") for s in range(3)] + [record([], s, 33.0) for s in range(3)]
    assert not len(contrasts_table(pd.DataFrame(runs), CONTRASTS[2:], "top1_pct"))


def test_a_seed_on_two_processors_is_left_out():
    runs = study(4)
    moved = copy.deepcopy(runs)
    moved[0]["processor"] = {"name": "B"}  # none, seed 0
    table = contrasts_table(pd.DataFrame(moved), CONTRASTS, "top1_pct")
    without = contrasts_table(pd.DataFrame([r for r in runs if r["seed"]]), CONTRASTS, "top1_pct")
    pd.testing.assert_frame_equal(table, without)


def test_a_contrast_spelt_wrongly_or_of_nothing_is_refused():
    runs = pd.DataFrame(study(3))
    with pytest.raises(ValueError, match="same settings"):
        contrasts_table(runs, [{"cell": {"kernels": [3]}, "against": {"model": "net"}}], "top1_pct")
    with pytest.raises(ValueError, match="no run of either side"):
        contrasts_table(runs, [{"cell": {"kernels": [7]}, "against": {"kernels": [5]}}], "top1_pct")


def test_sweeps_name_their_contrasts():
    folder = ROOT / "experiments/conf/sweep"
    assert [c["cell"] for c in named("small_locality", folder)] == [{"kernels": k} for k in ([1], [3], [1, 3])]
    assert named("sharing", folder) == [] and named("no such sweep", folder) == []
