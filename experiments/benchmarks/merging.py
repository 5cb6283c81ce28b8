"""Time and memory of merging a whole variant: ours (float64, by blocks of rows) and by convolving identities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from repmlp import SetSharingFC

from .bench import Bench, Case
from .networks import build
from .plain_net import PlainRepMLPNet, merge_by_identity
from .settings import parse


def measure(bench: Bench, options: Mapping[str, Any]) -> None:
    for text in options["models"]:
        name, size = parse(text)
        if not name.startswith("repmlpnet"):
            continue
        model = build(name, size)
        plain = PlainRepMLPNet(model)
        layers = [m for m in model.modules() if isinstance(m, SetSharingFC)]
        plain_blocks = [unit.repmlp_block for stage in plain.stages for unit in stage]

        def ours(layers: list[SetSharingFC] = layers) -> None:
            with torch.no_grad():
                for layer in layers:  # in place, as reparameterize() does; the branches stay, to do it again
                    layer.merged(out=layer.weight)

        def by_identity(blocks: list[nn.Module] = plain_blocks) -> None:
            for block in blocks:
                merge_by_identity(block)

        fact = {"model": name, "img_size": size, "dtype": "float32"}  # of the weights, whatever was asked for
        runs = {"ours": ours, "identity": by_identity}
        cases = [Case(f"{form:10s}", {**fact, "form": form}, run) for form, run in runs.items()]
        bench.measure("merging", f"merging, {name}", cases)
