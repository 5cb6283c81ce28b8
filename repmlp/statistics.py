"""What chance alone would do: the bootstrap over images and over runs, and rank correlation. numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def bootstrap_weights(n: int, block: int = 1, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Return how often each of n items is in each resample: (resamples, n), float64.

    block: so many consecutive items are drawn together, the last of them perhaps fewer; more than 1 where neighbours
    are alike, such as the frames of a video. The same arguments give the same resamples, so that the samples of two
    networks over the same images can be subtracted from each other.
    Raises ValueError where there are fewer than two blocks, from which nothing can be learnt.
    """
    blocks = -(-n // block)
    if blocks < 2:
        raise ValueError(f"{n} items in blocks of {block} are {blocks} block(s): the bootstrap needs 2 at least")
    drawn = np.random.default_rng(seed).multinomial(blocks, np.full(blocks, 1 / blocks), size=resamples)
    # (resamples, blocks) -> (resamples, n)
    return drawn.repeat(block, axis=1)[:, :n].astype(np.float64)


def pooled(part: np.ndarray, whole: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Return sum(part) / sum(whole) over items, of the items as they are or of every resample.

    part, whole: (n, ...). weights: (resamples, n) for (resamples, ...), None for (...). NaN where the whole is nothing.
    """
    weights = np.ones(len(part)) if weights is None else weights
    above, below = (np.tensordot(weights, np.asarray(each, dtype=np.float64), axes=1) for each in (part, whole))
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0)


def interval(samples: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Return between which two values the middle share of the samples lies: (resamples, ...) -> (2, ...)."""
    return np.nanquantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)


def ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of every value, (n,) -> (n,), counted from 1; equal values share the mean of their ranks."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[where.reshape(-1)]


def rank_correlation(groups: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Return Spearman's correlation of pairs of values that may be compared within their group alone.

    groups: (x, y) of (n_g,) each. Ranks are taken within a group and centred there, so that differences between groups
    count for nothing; with one group it is Spearman's rho. NaN where x or y varies in no group.
    """
    centred = [tuple(ranks(np.asarray(each)) - (len(each) + 1) / 2 for each in group) for group in groups]
    both, x2, y2 = (
        sum(float(np.sum(a * b)) for a, b in pairs)
        for pairs in (
            centred,
            [(x, x) for x, _ in centred],
            [(y, y) for _, y in centred],
        )
    )
    return both / (x2 * y2) ** 0.5 if x2 and y2 else float("nan")


def rank_correlation_samples(
    groups: Sequence[tuple[np.ndarray, np.ndarray]], resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, float]:
    """Return the correlation in every resample of the runs, (resamples,), and how often chance alone gives as much.

    Resamples draw as many runs of each group as it has. The second is the share of random pairings within groups whose
    correlation is at least as far from 0, the pairs as they are counted among them.
    """
    generator = np.random.default_rng(seed)
    groups = [(np.asarray(x), np.asarray(y)) for x, y in groups]
    found = abs(rank_correlation(groups))
    samples, as_far = np.empty(resamples), 1
    for number in range(resamples):
        drawn = [generator.integers(0, len(x), len(x)) for x, _ in groups]
        samples[number] = rank_correlation([(x[i], y[i]) for (x, y), i in zip(groups, drawn, strict=True)])
        as_far += abs(rank_correlation([(x, generator.permutation(y)) for x, y in groups])) >= found - 1e-12
    return samples, as_far / (resamples + 1)
