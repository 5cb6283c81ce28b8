"""Images a second of RepMLP in ResNets and of its peers (arXiv 2105.01883), all with their batch norms folded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from repmlp.cost import count_macs

from .bench import Bench, Case
from .engines import runner
from .networks import fused
from .older_networks import OLDER


def measure(bench: Bench, options: Mapping[str, Any]) -> None:
    engine = options["engine"]
    for batch in options["batch_sizes"]:
        cases = []
        for name in options["older_models"]:
            construct, size = OLDER[name]
            torch.manual_seed(0)
            net = fused(construct().eval())
            fact = {
                "model": name,
                "form": "fused",
                "img_size": size,
                "params": sum(p.numel() for p in net.parameters()),
                "macs": count_macs(net, size),
                "engine": engine,
            }
            cases.append(Case(f"{name:28s}", fact, runner(net, engine, torch.randn(batch, 3, size, size), bench)))
        bench.measure("older", f"older, batch {batch}, {engine}: {len(cases)} networks", cases, batch)
