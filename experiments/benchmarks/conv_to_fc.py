"""One 3x3 convolution as a matrix on a 64x64 map, one share-set: in closed form, and by convolving an identity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from repmlp import conv_to_fc

from .bench import Bench, Case
from .plain_net import conv_to_fc_by_identity


def measure(bench: Bench, options: Mapping[str, Any]) -> None:
    kernel = torch.randn(1, 1, 3, 3)
    runs = {
        "ours": lambda: conv_to_fc(kernel, (64, 64)),
        "identity": lambda: conv_to_fc_by_identity(kernel, (64, 64)),
    }
    same = torch.equal(runs["ours"]()[0], runs["identity"]())
    what = "3x3 on 64x64, S=1"
    fact = {"of": what, "same_bits": same, "result_bytes": 4 * 64**4, "dtype": "float32"}
    cases = [Case(f"{form:10s}", {**fact, "form": form}, run) for form, run in runs.items()]
    bench.measure("conv_to_fc", f"conv_to_fc, {what}", cases)
