"""How time and memory of a merged set-sharing FC grow with side of the map, channels and share-sets (batch 8)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from repmlp import SetSharingFC

from .bench import Bench, middle

BASE = {"side": 16, "channels": 256, "share_sets": 16}
VALUES = {"side": (8, 16, 32, 64), "channels": (64, 128, 256, 512), "share_sets": (1, 4, 16, 64)}


def measure(bench: Bench, options: Mapping[str, Any]) -> None:
    for name, points in VALUES.items():
        runs, memory = {}, {}
        for value in points:
            at = {**BASE, name: value}
            fc = SetSharingFC((at["side"],) * 2, at["share_sets"], inference_mode=True)
            fc = fc.to(bench.device, bench.dtype).eval()
            x = torch.randn(8, at["channels"], at["side"], at["side"], device=bench.device, dtype=bench.dtype)
            runs[value] = torch.inference_mode()(partial(fc, x))
            memory[value] = sum(p.numel() * p.element_size() for p in fc.parameters())
        seconds = bench.in_turn(runs)
        times = [middle(seconds[value]) for value in points]
        exponents = {"seconds": slope(points, times), "weight_bytes": slope(points, list(memory.values()))}
        fact = {
            "of": name,
            "base": BASE,
            "points": list(points),
            "point_seconds": times,
            "weight_bytes": list(memory.values()),
            "exponents": exponents,
        }
        bench.write("scaling", fact)
        text = ", ".join(f"{v}: {1000 * t:.2f} ms" for v, t in zip(points, times, strict=True))
        print(f"scaling with {name}: {text}; exponent {exponents['seconds']:.2f}", flush=True)


def slope(x: tuple[int, ...], y: list[float]) -> float:
    """Return the exponent of y ~ x^p fitted to all points, by least squares of the logarithms."""
    log_x, log_y = torch.tensor(x, dtype=torch.float64).log(), torch.tensor(y, dtype=torch.float64).log()
    log_x = log_x - log_x.mean()
    return float((log_x * log_y).sum() / log_x.square().sum())
