"""Sizes of images as people give them."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral


def height_width(img_size: int | Sequence[int]) -> tuple[int, int]:
    """Return (height, width) in pixels of one side, or of both.

    Raises ValueError for anything but one or two whole numbers above 0.
    """
    sides = (img_size, img_size) if isinstance(img_size, Integral) else img_size
    pixels = isinstance(sides, Sequence) and all(
        isinstance(n, Integral) and not isinstance(n, bool) and n > 0 for n in sides
    )
    if not pixels or len(sides) != 2:
        raise ValueError(f"img_size={img_size!r}: use a whole number of pixels, or (height, width)")
    return int(sides[0]), int(sides[1])
