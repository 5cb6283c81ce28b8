"""How time and memory of one set-sharing FC grow with the map, the channels and the share-sets.

Two forms: `training` is a forward and a backward pass with branches of 1x1 and 3x3, `deployed` the merged layer's
forward pass. One of the three is varied, the other two stay at the middle of their lists. Theory: time goes with
positions^2 x channels x share-sets^0, the weight with positions^2 x channels^0 x share-sets^1.

One thread of a CPU is timed by the processor's own clock, which other work on the machine hardly moves; several
threads, and a GPU, by the clock on the wall.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from repmlp import SetSharingFC
from repmlp.statistics import fit_power_law

from .bench import Bench, middle, quartiles
from .memory import peak_memory

BATCH = 8
FORMS = ("deployed", "training")
AXES = ("positions", "channels", "share_sets")


def measure(bench: Bench, options: Mapping[str, Any]) -> None:
    alone = bench.device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    sides = options["scaling_sides"]
    values = {"positions": [side**2 for side in sides]}
    values |= {name: options[f"scaling_{name}"] for name in AXES[1:]}
    base = {name: points[(len(points) - 1) // 2] for name, points in values.items()}
    for name, points in values.items():
        cases = {(form, value): case({**base, name: value}, form, bench) for form in FORMS for value in points}
        seconds = bench.in_turn({key: run for key, (run, _) in cases.items()}, clock)
        for form in FORMS:
            found = {
                "seconds": [middle(seconds[form, value]) for value in points],
                "weight_bytes": [cases[form, value][1] for value in points],
                "peak_memory_bytes": [peak_memory(cases[form, value][0], bench.device) for value in points],
            }
            fact = {
                "of": name,
                "form": form,
                "batch_size": BATCH,
                "base": base,
                "points": points,
                "point_seconds": found["seconds"],
                "point_quartiles": [quartiles(seconds[form, value]) for value in points],
                "weight_bytes": found["weight_bytes"],
                "peak_memory_bytes": found["peak_memory_bytes"],
                "exponents": {what: exponent(points, numbers) for what, numbers in found.items()},
                "clock": "processor" if alone else "wall",
                "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
            }
            bench.write("scaling", fact)
            times = ", ".join(f"{v}: {1000 * t:.2f} ms" for v, t in zip(points, found["seconds"], strict=True))
            fitted = fact["exponents"]["seconds"]
            print(
                f"scaling of {form} with {name}: {times}; exponent {fitted['exponent']:.2f} ± {fitted['error']:.2f}",
                flush=True,
            )


def case(at: Mapping[str, int], form: str, bench: Bench) -> tuple[Callable[[], Any], int]:
    """Return what runs a layer once, and the bytes of its weight and bias; at: positions, channels and share_sets."""
    side = round(at["positions"] ** 0.5)
    deployed = form == "deployed"
    fc = SetSharingFC((side, side), at["share_sets"], () if deployed else (1, 3), inference_mode=deployed)
    fc = fc.to(bench.device, bench.dtype).train(not deployed)
    x = torch.randn(BATCH, at["channels"], side, side, device=bench.device, dtype=bench.dtype)
    size = sum(p.numel() * p.element_size() for p in (fc.weight, fc.bias) if p is not None)

    def infer() -> None:
        with torch.inference_mode():
            fc(x)

    def train() -> None:
        out = fc(x.detach().requires_grad_())
        out.backward(torch.ones_like(out))
        fc.zero_grad(set_to_none=True)

    return infer if deployed else train, size


def exponent(points: list[int], numbers: list[Any]) -> dict[str, float] | None:
    """Fit the exponent and its standard error; None where something was not measured, or was nothing."""
    if not all(numbers):
        return None
    fitted = fit_power_law(points, numbers)
    return {"exponent": fitted.exponent, "error": fitted.error}
