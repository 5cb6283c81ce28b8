"""Images a second of training-time networks with and without branches: the last column of the paper's Table 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from repmlp.branches import label as branch_label

from .bench import Bench, Case
from .engines import runner
from .networks import build
from .settings import CIFAR, parse

TABLE_5 = (*CIFAR, "repmlpnet_t224", "repmlpnet_d256")


def measure(bench: Bench, options: Mapping[str, Any]) -> None:
    engine = options["engine"]
    for batch in options["batch_sizes"]:
        cases = []
        for name in TABLE_5:
            size = parse(name)[1]
            for kernels in ((), (1,), (3,), (1, 3)) if name in CIFAR else ((), (1, 3)):
                model = build(name, size, kernels)
                run = runner(model, engine, torch.randn(batch, 3, size, size), bench)
                fact = {"model": name, "img_size": size, "kernels": list(kernels), "form": "train-time"}
                cases.append(Case(f"{name:16s} {branch_label(kernels):8s}", {**fact, "engine": engine}, run))
        title = f"branches, batch {batch}, {engine}: {len(cases)} networks"
        bench.measure("branches", title, cases, batch, memory=False)
