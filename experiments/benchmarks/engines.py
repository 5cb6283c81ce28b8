"""What runs a network on a batch of images: torch as it is or compiled, ONNX Runtime, OpenVINO."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .bench import Bench

IN_TORCH = ("eager", "compile")  # the others run an exported network, which is merged


def compile_for(bench: Bench, model: nn.Module) -> nn.Module:
    """Compile a network, on a GPU with CUDA graphs."""
    return torch.compile(model, mode="reduce-overhead" if bench.device.type == "cuda" else None)


def runner(model: nn.Module, engine: str, images: Tensor, bench: Bench) -> Callable[[], Any]:
    """Return what runs a network once on images, (B, 3, H, W), by an engine; the network stays as it is.

    Raises ModuleNotFoundError where the engine is not installed.
    """
    if engine in IN_TORCH:
        # a copy: `to` casts in place, and the next form is made of the same network
        model = copy.deepcopy(model).to(bench.device, bench.dtype)
        images = images.to(bench.device, bench.dtype)
        if engine == "compile":
            model = compile_for(bench, model)

        def run() -> None:
            with torch.inference_mode():
                model(images)

        return run
    from repmlp.export import onnx_session, run_onnx, to_exported_program, to_onnx

    program = to_exported_program(model, tuple(images.shape[-2:]))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        to_onnx(program, path)
        if engine == "onnxruntime":
            return partial(run_onnx, onnx_session(path, torch.get_num_threads()), images)
        try:
            import openvino
        except ImportError as error:
            raise ModuleNotFoundError(f"engine=openvino ({error}): pip install openvino") from error
        core = openvino.Core()
        settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
        compiled = core.compile_model(core.read_model(path), "CPU", settings)
    return partial(compiled, images.numpy())
