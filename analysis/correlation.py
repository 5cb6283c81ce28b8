"""Rank correlation of pairs that may be compared within their group alone, and what chance would give."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

Groups = Sequence[tuple[np.ndarray, np.ndarray]]
PAIRINGS = 20_000  # up to so many are all looked at, of more so many are drawn


def rank_correlation(groups: Groups) -> float:
    """Return Spearman's correlation of pairs of values that may be compared within their group alone.

    groups: (x, y) of (n_g,) each. Ranks are taken within a group and centred there, so that differences between groups
    count for nothing; with one group it is Spearman's rho. NaN where x or y varies in no group.
    """
    centred = _centred_ranks(groups)
    both, x2, y2 = (
        sum(float(np.sum(a * b)) for a, b in pairs)
        for pairs in (centred, [(x, x) for x, _ in centred], [(y, y) for _, y in centred])
    )
    return both / (x2 * y2) ** 0.5 if x2 and y2 else float("nan")


def permutation_p(groups: Groups, pairings: int = PAIRINGS, seed: int = 0) -> float:
    """Return the share of pairings within groups whose rank correlation is at least as far from 0 as that of the data.

    Exact where there are at most `pairings` of them (the product of n_g!); of more, so many are drawn, and the pairs as
    they are count among them. No assumption but that under chance any y of a group may go with any x of it. Of one
    group of four points it cannot be below 2/24.
    """
    centred = _centred_ranks(groups)
    # the spread of the ranks is that of any pairing: only the sum of products differs
    found = abs(sum(float(x @ y) for x, y in centred)) - 1e-9
    if math.prod(math.factorial(len(x)) for x, _ in centred) <= pairings:
        sums = np.zeros(1)
        for x, y in centred:
            of_group = np.array([x @ np.array(order) for order in itertools.permutations(y)])
            sums = (sums[:, None] + of_group).ravel()
        return float(np.mean(np.abs(sums) >= found))
    generator = np.random.default_rng(seed)
    sums = np.zeros(pairings)
    for x, y in centred:
        # (pairings, n_g): a random order of the group a row
        sums += y[generator.random((pairings, len(y))).argsort(axis=1)] @ x
    return float((1 + np.sum(np.abs(sums) >= found)) / (pairings + 1))


def _centred_ranks(groups: Groups) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the ranks of x and y in each group, less their mean; equal values share the mean of their ranks."""
    return [tuple(rankdata(each) - (len(each) + 1) / 2 for each in group) for group in groups]
