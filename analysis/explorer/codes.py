"""Weights as 16-bit numbers, and as text that a browser unpacks without a library."""

from __future__ import annotations

import base64
import zlib

import numpy as np

# One step of a code in log |w|, 0.1 %. A colour map of 256 colours over at least one e-fold (which page.js sees to) has
# steps of 1/256 or more, so that what is drawn is what would be drawn of the weights themselves.
STEP = 1 / 1024
LARGEST_CODE = 2**15 - 1


def quantise(weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Write weights as sign and logarithm, with a relative error of at most STEP / 2.

    weights: of any shape, finite.
    Returns codes, int16 of that shape, and the base b: w = sign(code) * b * exp(STEP * (|code| - 1)), and 0 for code 0.
    The base is the smallest magnitude that is none of 0. Magnitudes below 1e-13 of the largest, for which there are no
    codes left, become 0.
    Raises ValueError for weights that are not finite.
    """
    magnitude = np.abs(weights.astype(np.float64))
    if not np.isfinite(magnitude).all():
        raise ValueError("the kernel holds numbers that are not finite: its training has diverged")
    if not magnitude.any():
        return np.zeros(weights.shape, np.int16), 1.0
    lowest = magnitude.max() * np.exp(-STEP * (LARGEST_CODE - 2))
    kept = magnitude >= lowest
    base = float(magnitude[kept].min())
    steps = np.log(np.where(kept, magnitude, base) / base) / STEP
    codes = np.where(kept, np.sign(weights) * (1 + np.rint(steps)), 0)
    return codes.astype(np.int16), base


def restore(codes: np.ndarray, base: float) -> np.ndarray:
    """Return the weights that codes stand for, float64; what page.js does."""
    return np.sign(codes) * base * np.exp(STEP * (np.abs(codes.astype(np.float64)) - 1))


def pack(codes: np.ndarray) -> str:
    """Write int16 numbers as text: all low bytes, then all high bytes (which compress well), deflated, in base64."""
    planes = codes.astype("<i2").reshape(-1, 1).view(np.uint8).T
    return base64.b64encode(zlib.compress(np.ascontiguousarray(planes).tobytes(), 9)).decode()


def unpack(text: str) -> np.ndarray:
    """Return the numbers that `pack` wrote, int16 (n,)."""
    planes = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).reshape(2, -1)
    return np.ascontiguousarray(planes.T).view("<i2")[:, 0]


def packed_limit(numbers: int) -> int:
    """Return how many characters `pack` writes at most for so many numbers."""
    # deflate adds 5 bytes a block of at most 16 KiB to what it cannot compress; base64 writes 4 characters for 3 bytes
    raw = 2 * numbers
    return 4 * ((raw + 5 * (raw // 16384 + 1) + 6 + 2) // 3)
