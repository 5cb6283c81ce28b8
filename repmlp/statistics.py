"""What chance alone would do: the bootstrap over images, and fits with their errors. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


class PowerLaw(NamedTuple):
    """y = exp(level) (x / exp(middle))^exponent, fitted to the logarithms of points by least squares.

    error: standard error of the exponent. middle, level: means of log x and log y.
    """

    exponent: float
    error: float
    middle: float
    level: float

    def __call__(self, x: float) -> float:
        """Return y at x."""
        return float(np.exp(self.level + self.exponent * (np.log(x) - self.middle)))


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw:
    """Fit y ~ x^p to points by least squares of the logarithms.

    Raises ValueError for fewer than three points, which leave no error to tell, and for values that are not positive.
    """
    if len(x) < 3 or len(set(x)) < 2:
        raise ValueError(f"{len(x)} points at {len(set(x))} place(s): a power law and its error need three points")
    if min(x) <= 0 or min(y) <= 0:
        raise ValueError(f"a power law needs positive values, not {min(*x, *y)}")
    log_x, log_y = np.log(np.asarray(x, dtype=np.float64)), np.log(np.asarray(y, dtype=np.float64))
    middle, level = log_x.mean(), log_y.mean()
    spread = ((log_x - middle) ** 2).sum()
    exponent = ((log_x - middle) * (log_y - level)).sum() / spread
    residuals = log_y - level - exponent * (log_x - middle)
    deviation = ((residuals**2).sum() / (len(x) - 2)) ** 0.5
    return PowerLaw(*map(float, (exponent, deviation / spread**0.5, middle, level)))
