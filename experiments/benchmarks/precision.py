"""The deployed network in float32, bfloat16 and int8, in torch and in ONNX Runtime, all in the same rounds."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from repmlp import deploy
from repmlp.cost import count_macs
from repmlp.export import onnx_session, run_onnx, to_exported_program, to_onnx
from repmlp.int8 import quantize_dynamic

from .bench import Bench, Case
from .networks import build
from .settings import parse


def measure(bench: Bench, options: Mapping[str, Any]) -> None:
    for text in options["precision_models"]:
        name, size = parse(text)
        net = deploy(build(name, size))
        in_bfloat16 = copy.deepcopy(net).bfloat16()  # a copy: it casts in place
        with tempfile.TemporaryDirectory() as folder:
            plain, quantised = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
            to_onnx(to_exported_program(net, size), plain)
            quantize_dynamic(plain, quantised)
            sessions = {path.stem: onnx_session(path, torch.get_num_threads()) for path in (plain, quantised)}
        fact = {"model": name, "form": "deployed", "img_size": size, "macs": count_macs(net, size)}
        for batch in options["batch_sizes"]:
            images = torch.randn(batch, 3, size, size)
            runs = {
                ("eager", "float32"): partial(_in_torch, net, images),
                ("eager", "bfloat16"): partial(_in_torch, in_bfloat16, images.bfloat16()),
                **{("onnxruntime", dtype): partial(run_onnx, session, images) for dtype, session in sessions.items()},
            }
            cases = [
                Case(f"{engine:12s} {dtype:9s}", {**fact, "engine": engine, "dtype": dtype}, run)
                for (engine, dtype), run in runs.items()
            ]
            bench.measure("precision", f"precision, {text}, batch {batch}", cases, batch, memory=False)


def _in_torch(net: torch.nn.Module, images: torch.Tensor) -> None:
    with torch.inference_mode():
        net(images)
