"""Rank correlation and its permutation p, against their definitions and scipy."""

import itertools
import math

import numpy as np
import pytest
from correlation import permutation_p, rank_correlation
from scipy import stats


def test_one_group_is_spearmans_rho():
    generator = np.random.default_rng(1)
    x, y = generator.permutation(9), generator.permutation(9)
    assert rank_correlation([(x, y)]) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    tied = np.array([1, 1, 2, 3, 3, 3, 4, 5, 6])
    assert rank_correlation([(tied, y)]) == pytest.approx(stats.spearmanr(tied, y).statistic, abs=1e-12)
    assert rank_correlation([(np.exp(x), -y)]) == pytest.approx(-rank_correlation([(x, y)]), abs=1e-12)


def test_differences_between_groups_do_not_count():
    up, down = np.arange(5.0), np.arange(5.0)[::-1]
    assert rank_correlation([(up, up), (up + 100, up - 100)]) == pytest.approx(1)
    assert rank_correlation([(up, up), (up + 100, down)]) == pytest.approx(0)
    assert rank_correlation([(up, up), (np.zeros(5), down)]) < 1  # ranks of y that x does not explain
    assert math.isnan(rank_correlation([(np.zeros(5), up)])) and math.isnan(rank_correlation([]))


def test_p_is_the_share_of_all_pairings():
    first = (np.array([0.0, 1, 2, 3]), np.array([0.0, 2, 1, 3]))
    second = (np.array([5.0, 1, 2]), np.array([0.0, 7, 7]))
    found = abs(rank_correlation([first, second]))
    orders = itertools.product(itertools.permutations(first[1]), itertools.permutations(second[1]))
    exact = np.mean(
        [abs(rank_correlation([(first[0], np.array(a)), (second[0], np.array(b))])) >= found - 1e-9 for a, b in orders]
    )
    assert permutation_p([first, second]) == pytest.approx(exact, abs=1e-12)
    drawn = permutation_p([first, second], pairings=100)  # fewer than the 144 that there are
    assert drawn == permutation_p([first, second], pairings=100) == pytest.approx(exact, abs=0.15)
    assert permutation_p([first, second], pairings=143, seed=1) >= 1 / 144


def test_p_is_scipys_of_one_group():
    x, y = np.arange(6.0), np.array([1.0, 0, 3, 2, 5, 4])
    theirs = stats.permutation_test(
        (x,), lambda x: stats.spearmanr(x, y).statistic, permutation_type="pairings", n_resamples=np.inf
    )
    assert permutation_p([(x, y)]) == pytest.approx(theirs.pvalue, abs=1e-9)


def test_four_points_cannot_say_more_than_they_can():
    assert permutation_p([(np.arange(4), np.arange(4))]) == pytest.approx(2 / 24)
    assert permutation_p([(np.arange(2), np.arange(2))]) == 1
    assert permutation_p([(np.arange(3), np.arange(3))] * 40) == pytest.approx(1 / 20_001)


def test_under_chance_p_is_what_it_says():
    """Of 400 samples without a correlation, 5 % have p of at most 0.05."""
    generator = np.random.default_rng(4)
    samples = [[(generator.random(4), generator.random(4)) for _ in range(3)] for _ in range(400)]
    small = np.mean([permutation_p(groups, pairings=400) <= 0.05 for groups in samples])
    assert 0.02 <= small <= 0.08
