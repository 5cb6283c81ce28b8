"""Build a network from a plain configuration, and keep it with its weights in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from repmlp.repmlpnet import RepMLPNet
from repmlp.resmlp import ResMLP

ARCHITECTURES: dict[str, type[nn.Module]] = {"repmlpnet": RepMLPNet, "resmlp": ResMLP}


def build_model(config: Mapping[str, Any], num_classes: int = 100, inference_mode: bool = False) -> nn.Module:
    """Build the network that `config` describes: {"arch": "repmlpnet" | "resmlp", ...constructor arguments}.

    "name" is a label and not looked at. Raises ValueError for an unknown architecture or argument.
    """
    arguments = {key: value for key, value in config.items() if key not in ("name", "arch")}
    arch = config.get("arch")
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}: use one of {', '.join(ARCHITECTURES)}")
    try:
        return ARCHITECTURES[arch](**arguments, num_classes=num_classes, inference_mode=inference_mode)
    except TypeError as error:
        raise ValueError(f"model {arch}: {error}") from error


def save_model(path: Path, model: nn.Module, config: Mapping[str, Any], extra: Mapping[str, str] | None = None) -> None:
    """Write weights and configuration to one safetensors file, through a temporary file."""
    metadata = {"repmlp_model": json.dumps(dict(config)), "num_classes": str(model.num_classes), **(extra or {})}
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, partial, metadata)
    partial.replace(path)


def load_model(path: Path | str) -> tuple[nn.Module, dict[str, str]]:
    """Read a file that `save_model` wrote: the network in evaluation mode, train-time or merged, and its metadata.

    Raises FileNotFoundError, or ValueError where the file is truncated, not ours, or of another architecture.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): write it again") from error
    if "repmlp_model" not in metadata:
        raise ValueError(f"{path} names no repmlp model in its metadata: was it written by save_model?")
    config = json.loads(metadata["repmlp_model"])
    merged = not any(".local_perceptron." in name or ".channel_perceptron.norm." in name for name in state)
    model = build_model(config, int(metadata["num_classes"]), inference_mode=merged)
    check_state_dict(path, state, model.state_dict())
    model.load_state_dict(state)
    return model.eval(), metadata


def check_state_dict(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError where two state dicts differ in names or shapes, naming the first difference."""
    for name in dict.fromkeys([*expected, *found]):
        if name not in found or name not in expected:
            difference = f"{name} is {'missing' if name not in found else 'unexpected'}"
        elif found[name].shape != expected[name].shape:
            difference = f"{name} is {tuple(found[name].shape)} there and {tuple(expected[name].shape)} here"
        else:
            continue
        raise ValueError(f"{path} is the checkpoint of another architecture: {difference}")
