"""One training step of our path against the straightforward one: forward, backward, clipping and AdamW.

Where convolutions suit the processor (repmlp.products), ours is measured with linear layers too.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from repmlp import RepMLPNet
from repmlp.products import products_by, usual_product
from repmlp.training.memory import freed_memory_kept

from .bench import Bench, Case
from .engines import compile_for
from .networks import build
from .plain_net import PlainRepMLPNet
from .settings import parse


def measure(bench: Bench, options: Mapping[str, Any]) -> None:
    engine = options["engine"]
    for text in options["training_models"]:
        name, size = parse(text)
        for batch in options["training_batch_sizes"]:
            ours = build(name, size).train()
            nets = {"ours": products_by(ours, usual_product())}
            if isinstance(ours, RepMLPNet):
                nets = {"plain": PlainRepMLPNet(ours), **nets}
                if usual_product() != "linear" and engine == "eager" and bench.dtype == torch.float32:
                    nets["ours-linear"] = products_by(copy.deepcopy(ours), "linear")
            runs = {form: step(net, batch, size, form != "plain", bench, engine) for form, net in nets.items()}
            # a GPU's memory torch keeps by itself; on a CPU our commands train with it kept
            memories = {"returned": contextlib.nullcontext, "kept": freed_memory_kept}
            if bench.device.type != "cpu":
                memories = {None: contextlib.nullcontext}
            for memory, context in memories.items():
                fact = {"model": name, "img_size": size, "engine": engine, "freed_memory": memory}
                cases = [Case(f"{form:10s}", {**fact, "form": form}, run) for form, run in runs.items()]
                said = f", freed memory {memory}" if memory else ""
                with context():
                    title = f"training, {text}, batch {batch}, {engine}{said}"
                    bench.measure("training", title, cases, batch, kernels=True)


def step(net: nn.Module, batch: int, size: int, fast: bool, bench: Bench, engine: str) -> Callable[[], Any]:
    """Return what trains a network for one step on a fixed batch; dtypes below float32 by autocast.

    size: side of the images. fast: with what makes our own commands fast, AdamW in one kernel and the engine's
    compilation.
    """
    net = net.to(bench.device)
    images = torch.randn(batch, 3, size, size, device=bench.device)
    labels = torch.randint(0, net.num_classes if hasattr(net, "num_classes") else 100, (batch,), device=bench.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, weight_decay=0.1, **({"fused": True} if fast else {}))
    called = compile_for(bench, net) if engine == "compile" and fast else net

    def run() -> None:
        with torch.autocast(bench.device.type, bench.dtype, enabled=bench.dtype != torch.float32):
            loss = F.cross_entropy(called(images), labels, label_smoothing=0.1)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run
