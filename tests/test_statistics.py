"""Rank correlation against its definitions; the bootstrap of images is tested with what uses it, test_borders.py."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from repmlp.statistics import interval, rank_correlation, rank_correlation_samples, ranks


def test_ranks_are_those_of_pandas():
    generator = np.random.default_rng(0)
    for n in (1, 2, 7, 40):
        values = generator.integers(0, max(2, n // 2), n).astype(float)  # with ties
        assert ranks(values).tolist() == pd.Series(values).rank().tolist()


def test_one_group_is_spearmans_rho():
    generator = np.random.default_rng(1)
    x, y = generator.permutation(9), generator.permutation(9)
    distance = sum((a - b) ** 2 for a, b in zip(ranks(x), ranks(y), strict=True))
    assert rank_correlation([(x, y)]) == pytest.approx(1 - 6 * distance / (9 * 80), abs=1e-12)
    tied = np.array([1, 1, 2, 3, 3, 3, 4, 5, 6])
    expected = np.corrcoef(pd.Series(tied).rank(), pd.Series(y).rank())[0, 1]
    assert rank_correlation([(tied, y)]) == pytest.approx(expected, abs=1e-12)
    assert rank_correlation([(np.exp(x), -y)]) == pytest.approx(-rank_correlation([(x, y)]), abs=1e-12)


def test_differences_between_groups_do_not_count():
    up, down = np.arange(5.0), np.arange(5.0)[::-1]
    assert rank_correlation([(up, up), (up + 100, up - 100)]) == pytest.approx(1)
    assert rank_correlation([(up, up), (up + 100, down)]) == pytest.approx(0)
    assert rank_correlation([(up, up), (np.zeros(5), down)]) < 1  # ranks of y that x does not explain
    assert math.isnan(rank_correlation([(np.zeros(5), up)])) and math.isnan(rank_correlation([]))


def test_chance_is_the_share_of_pairings():
    x, y = np.array([0.0, 1, 2, 3]), np.array([0.0, 2, 1, 3])
    found = rank_correlation([(x, y)])
    exact = np.mean([abs(rank_correlation([(x, np.array(p))])) >= found - 1e-12 for p in itertools.permutations(y)])
    samples, chance = rank_correlation_samples([(x, y)], resamples=4000)
    assert chance == pytest.approx(exact, abs=0.03) and len(samples) == 4000
    again, _ = rank_correlation_samples([(x, y)], resamples=4000)
    assert np.array_equal(samples, again, equal_nan=True)


def test_interval_covers_the_correlation_of_the_population():
    """200 samples of 40 pairs: the 95 % interval holds the true value in most of them, and not in nearly all."""
    generator, covered = np.random.default_rng(2), 0
    rho = 6 / math.pi * math.asin(0.6 / 2)  # Spearman's of a bivariate normal with correlation 0.6
    for seed in range(200):
        x = generator.standard_normal(40)
        y = 0.6 * x + 0.8 * generator.standard_normal(40)
        low, high = interval(rank_correlation_samples([(x, y)], resamples=200, seed=seed)[0])
        covered += low <= rho <= high
    assert 0.87 <= covered / 200 <= 0.99
