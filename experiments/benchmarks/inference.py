"""Images a second of every network and form, beside the machine's matrix product in the same rounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from repmlp.cost import count_macs

from .bench import Bench, Case
from .engines import IN_TORCH, runner
from .networks import build, fused, in_form, is_ours, params
from .settings import parse


def measure(bench: Bench, options: Mapping[str, Any]) -> None:
    engine = options["engine"]
    for batch in options["batch_sizes"]:
        cases = []
        for text in options["models"]:
            name, size = parse(text)
            model = build(name, size)
            # an exported network is merged, so other forms would be the same one again
            forms = [f for f in options["forms"] if engine in IN_TORCH or f in ("plain", "deployed")]
            if engine != "eager" or bench.dtype != torch.float32:  # which have one kind of product
                forms = [f for f in forms if f != "deployed-linear"]
            for form in forms if is_ours(name) else ["fused"]:
                if (shaped := in_form(model, form) if is_ours(name) else fused(model)) is None:
                    continue
                fact = {
                    "model": name,
                    "form": form,
                    "img_size": size,
                    "params": params(shaped),
                    "macs": count_macs(shaped, size),
                    "engine": engine,
                }
                run = runner(shaped, engine, torch.randn(batch, 3, size, size), bench)
                cases.append(Case(f"{text:28s} {form:10s}", fact, run))
        title = f"inference, batch {batch}, {engine}: {len(cases)} networks"
        bench.measure("inference", title, cases, batch, beside_matmul=True)
