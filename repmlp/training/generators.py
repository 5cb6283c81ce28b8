"""The generators that steps of training draw from, each seeded by where the run stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch


class _Generator(NamedTuple):
    seed: Callable[[int], Any]
    state: Callable[[], bytes]  # without a wait for the device: torch keeps it on the CPU


class Generators:
    """torch's generators on the CPU and on the training device, and numpy's: `seed` before each step.

    The first step of an epoch seeds all, the others those alone that something drew from since: stochastic depth,
    dropout, mixup by numpy. Most networks draw nothing. A run goes on from between two epochs, so a draw that comes in
    a later step only is the same there too.

    device: of training.
    """

    def __init__(self, device: torch.device):
        self._all = [
            _Generator(torch.default_generator.manual_seed, lambda: _bytes(torch.default_generator.get_state())),
            _Generator(lambda seed: np.random.seed(seed % 2**32), _numpy_state),
        ]
        if device.type != "cpu":
            of = torch.get_device_module(device)
            self._all.append(_Generator(of.manual_seed, lambda: _bytes(of.get_rng_state(device))))
        self._drawing, self._seeded = self._all, []

    def seed(self, seed: int, step: int) -> None:
        """Seed what step number `step` of an epoch, counted from 0, may draw from."""
        if step == 0:
            self._drawing = self._all
        elif step == 1:
            states = [each.state() for each in self._all]
            self._drawing = [
                each for each, now, then in zip(self._all, states, self._seeded, strict=True) if now != then
            ]
        for each in self._drawing:
            each.seed(seed)
        if step == 0:
            self._seeded = [each.state() for each in self._all]


def _bytes(state: torch.Tensor) -> bytes:
    return state.numpy().tobytes()


def _numpy_state() -> bytes:
    _, numbers, *rest = np.random.get_state()
    return numbers.tobytes() + repr(rest).encode()
