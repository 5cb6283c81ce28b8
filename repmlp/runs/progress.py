"""Say how far it is, where many images are looked at."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

Batch = TypeVar("Batch", bound=Sequence[Any])


def to_stderr(line: str) -> None:
    """Print a line where it does not mix with what a command writes."""
    print(line, file=sys.stderr)


def told(
    batches: Iterable[Batch], n: int, say: Callable[[str], None] = to_stderr, every: float = 10.0
) -> Iterator[Batch]:
    """Yield batches, and say every few seconds how many of all images have been done and how long the rest takes.

    batches: the first part of each holds its images. n: images in all. say: what takes a line. every: seconds from one
    line to the next; what is over before says nothing.
    """
    start = last = time.perf_counter()
    done = 0
    for batch in batches:
        yield batch  # and it is done when the next one is asked for
        done += len(batch[0])
        now = time.perf_counter()
        if now - last >= every and 0 < done < n:
            say(f"{done:,} of {n:,} images, about {(now - start) / done * (n - done):.0f} s left")
            last = now
