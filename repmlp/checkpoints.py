"""One door for weights: what `save` writes `load` builds again, and `load` reads the files of other projects too.

Ours (.safetensors with its configuration), the authors' and mmpretrain's of RepMLPNet, the older RepMLP-ResNets', and
a training run's .ckpt; under the nestings and prefixes that key_names.py lists. Nothing that a file holds is executed.
"""

from __future__ import annotations

import json
import numbers
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from timm.models.resnet import ResNet
from torch import Tensor, nn

from repmlp.branches import BranchSpec, values
from repmlp.deployment import deploy
from repmlp.key_names import Configuration, config_of, convert, to_official, unwrap
from repmlp.models.build import build_model, merged_copy
from repmlp.models.repmlp_weights import arguments_of, from_weights
from repmlp.models.repmlpnet import RepMLPNet
from repmlp.older_key_names import convert_older, is_older
from repmlp.reading import metadata_of, read
from repmlp.resmlp_key_names import convert_resmlp

__all__ = [
    "Checkpoint",
    "Configuration",
    "check_state_dict",
    "config_of",
    "convert",
    "load",
    "load_model",
    "load_older",
    "open_checkpoint",
    "save",
    "save_model",
    "to_official",
]

MODEL = "repmlp_model"  # the configuration in a file's metadata
# the FC's own batch norm, or its branches: what merging takes away
_TRAIN_TIME = (".local_perceptron.", ".channel_perceptron.norm.", ".partition_perceptron.norm.")


class Checkpoint(NamedTuple):
    """A network in evaluation mode, the configuration that `build_model` and `save` take, and the file's metadata."""

    model: nn.Module
    config: dict[str, Any]
    metadata: dict[str, str]


def save(
    path: Path | str,
    model: nn.Module,
    config: Mapping[str, Any] | None = None,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write weights and configuration to one safetensors file, through a temporary file.

    model: train-time, merged or deployed; the wrappers of torch.compile, DataParallel and DistributedDataParallel are
    taken off. config: what `build_model` builds it from; None for a RepMLPNet, whose shapes tell. extra: more metadata.
    Raises ValueError, before anything is written, where `config` describes another network (naming the first
    difference), or holds what JSON cannot.

        save("net.safetensors", model, {"arch": "timm", "variant": "resmlp_12_224", "kernels": [3]})
        model = load("net.safetensors")
    """
    path, net = Path(path), _unwrapped(model)
    if config is None:
        if not isinstance(net, RepMLPNet):
            raise ValueError(
                f"config=None: a {type(net).__name__} does not tell it; give what build_model builds it from"
            )
        config = config_of(net.state_dict(), net.img_size).config
    config = _plain(config, "config")
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in net.state_dict().items()}
    with torch.random.fork_rng(devices=[]):  # what is drawn below is thrown away
        _matching("config", config, net.num_classes, state)
    metadata = {MODEL: json.dumps(config), "num_classes": str(net.num_classes), **(extra or {})}
    partial = path.with_name(f"{path.name}.partial")
    # copies: tensors that share memory, which a file cannot hold as such
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, partial, metadata)
    partial.replace(path)


def load(path: Path | str) -> nn.Module:
    """Build the network whose weights a file holds, in evaluation mode, in the form that the file has.

    path: what `save` wrote; a file of RepMLPNet in any format that `convert` knows; an older RepMLP-ResNet's; the .ckpt
    of a training run of any of these; that of a run of ours, whatever its network. .safetensors, or of torch.save.
    Parameters are float32 whatever the file's dtype: exact for float16 and bfloat16, rounded for float64.
    Raises FileNotFoundError, or ValueError that names the file, and the first missing and unexpected name where it is
    of no such network.
    """
    return open_checkpoint(path).model


def load_model(path: Path | str) -> tuple[nn.Module, dict[str, str]]:
    """Read a file that `save` wrote: the network in evaluation mode and the file's metadata; see `load`.

    Raises FileNotFoundError, or ValueError where the file is truncated, not ours, or of another architecture.
    """
    path = Path(path)
    if path.is_file() and MODEL not in metadata_of(path):
        raise ValueError(
            f"{path} names no repmlp model in its metadata: was it written by save_model? repmlp.load reads other files"
        )
    model, _, metadata = open_checkpoint(path)
    return model, metadata


save_model = save


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a file as `load` does, and tell its configuration and metadata too."""
    path = Path(path)
    state = read(path)
    metadata = metadata_of(path)
    if MODEL in metadata:
        config = json.loads(metadata[MODEL])
        if config["arch"] == "resmlp":
            state = convert_resmlp(state)
        model = _matching(path, config, int(metadata["num_classes"]), state)
        model.load_state_dict(state)
        return Checkpoint(model.eval(), config, metadata)
    if isinstance(state.get(MODEL), str) and isinstance(state.get("state_dict"), Mapping):  # a run's .ckpt
        config, num_classes = json.loads(state[MODEL]), int(state["num_classes"])
        weights = {n.removeprefix("net."): t for n, t in state["state_dict"].items() if n.startswith("net.")}
        if config.get("kernels") and not any(".local_perceptron." in name for name in weights):
            config = {**config, "kernels": []}  # merged in the middle of training
        model = _matching(path, config, num_classes, weights)
        model.load_state_dict(weights)
        return Checkpoint(model.eval(), config, metadata)
    try:
        tensors = unwrap(state)
        if is_older(tensors) or any(".repmlp." in name for name in tensors):
            given = arguments_of(convert_older(tensors))
            config = {"arch": "timm", "variant": "repmlp_res50_224"}
            config |= {name: given.pop(name) for name in ("img_size", "kernels")}
            given = {name: value for name, value in given.items() if name not in ("num_classes", "inference_mode")}
            return Checkpoint(from_weights(tensors), {**config, "arguments": given}, metadata)
        converted = convert(tensors)
        config, num_classes, inference_mode = config_of(converted)
        model = build_model(config, num_classes, inference_mode)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    model.load_state_dict(converted)
    return Checkpoint(model.eval(), config, metadata)


def load_older(source: Path | str | Mapping[str, Any]) -> ResNet:
    """Build the network whose weights an older released file holds, in evaluation mode; see from_weights.

    source: a file (.pth, read safely, or .safetensors), or a state dict; of the older code or ours.
    Raises FileNotFoundError, or ValueError where the file is damaged, or no network of this kind.
    """
    if isinstance(source, Mapping):
        return from_weights(unwrap(source))
    state_dict = read(source)
    try:
        return from_weights(unwrap(state_dict))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _unwrapped(model: nn.Module) -> nn.Module:
    """Take the wrappers of torch.compile, DataParallel and DistributedDataParallel off a model."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _plain(value: Any, name: str) -> Any:
    """Return a configuration as JSON has it, branches as they are spelled; ValueError for anything else."""
    if isinstance(value, Mapping):
        return {
            str(key): values(inner) if key == "kernels" and inner is not None else _plain(inner, f"{name}.{key}")
            for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_plain(inner, name) for inner in value]
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, BranchSpec):
        return value.value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Path):
        return str(value)
    raise ValueError(f"{name}={value!r} cannot be written to a file: use numbers, text and lists")


def _forms(config: Mapping[str, Any], num_classes: int, state: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """Yield the network of a configuration in the forms that it may have been saved in, the likeliest first."""
    merged = not any(part in name for name in state for part in _TRAIN_TIME)
    model = build_model(config, num_classes, inference_mode=merged).eval()
    yield model
    yield merged_copy(model)
    try:
        deployed = deploy(model)
    except (TypeError, ValueError):  # a network that has no such form
        return
    yield deployed


def _matching(path: Path | str, config: Mapping[str, Any], num_classes: int, state: Mapping[str, Tensor]) -> nn.Module:
    """Build the network of a configuration in the form that has the names and shapes of a state dict.

    Raises ValueError where none has, with the first difference from the likeliest form.
    """
    first: ValueError | None = None
    for model in _forms(config, num_classes, state):
        try:
            check_state_dict(path, state, model.state_dict())
        except ValueError as error:
            first = first or error
        else:
            return model
    assert first is not None
    raise first


def check_state_dict(path: Path | str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError where two state dicts differ: the first missing and unexpected name, else the first shape."""
    faults = [f"{name} is missing" for name in expected if name not in found][:1]
    faults += [f"{name} is unexpected" for name in found if name not in expected][:1]
    if not faults:
        faults = [
            f"{name} is {tuple(found[name].shape)} there and {tuple(expected[name].shape)} here"
            for name in expected
            if found[name].shape != expected[name].shape
        ][:1]
    if faults:
        raise ValueError(f"{path} is of another architecture: {' and '.join(faults)}")
