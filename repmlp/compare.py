"""Forms of a network side by side: how far outputs are from a reference, and how many first guesses change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Comparison(NamedTuple):
    """How far outputs are from a reference's."""

    relative: float  # norm of the difference over the norm of the reference
    maximum: float  # largest |difference|
    changed: int  # of the first guesses (along the second axis)
    guesses: int  # how many there are: images, or pixels of maps


class Comparer:
    """Gathers two networks' outputs batch by batch, in float64; `result()` says how far they are apart."""

    def __init__(self) -> None:
        self._error = self._norm = self._maximum = 0.0
        self._changed = self._guesses = 0

    def update(self, expected: Tensor, found: Tensor) -> None:
        """Add a batch: logits of the reference and of the other, both (N, K) or (N, K, ...).

        Raises ValueError where the shapes differ.
        """
        if expected.shape != found.shape:
            raise ValueError(f"outputs of shapes {tuple(expected.shape)} and {tuple(found.shape)} cannot be compared")
        expected, found = expected.detach().cpu().double(), found.detach().cpu().double()
        error = (found - expected).abs()
        self._error += float(error.square().sum())
        self._norm += float(expected.square().sum())
        # NaN wins, as a difference that is no number is none that passes
        self._maximum = float(torch.maximum(torch.tensor(self._maximum).double(), error.max())) if len(error) else 0.0
        self._changed += int((expected.argmax(1) != found.argmax(1)).sum())
        self._guesses += expected.argmax(1).numel()

    def result(self) -> Comparison:
        # an untrained network may answer zeros
        relative = (self._error / self._norm) ** 0.5 if self._norm else (self._error and float("inf"))
        return Comparison(relative, self._maximum, self._changed, self._guesses)


@torch.no_grad()
def compare(
    reference: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], batches: Iterable[Tensor]
) -> Comparison:
    """Run both on the same images and compare all outputs.

    reference, other: networks in evaluation mode, or anything that takes a batch. batches: (B, C, H, W) each.
    """
    comparer = Comparer()
    for images in batches:
        comparer.update(reference(images), other(images))
    return comparer.result()


def random_batches(shape: Sequence[int], batch_sizes: Iterable[int] = (1, 2, 5), seed: int = 0) -> Iterable[Tensor]:
    """Yield standard normal images, the same for each seed; shape: (C, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    for n in batch_sizes:
        yield torch.randn(n, *shape, generator=generator)
