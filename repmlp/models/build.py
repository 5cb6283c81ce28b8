"""Build a network from a plain configuration, and keep it with its weights in one safetensors file."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.utils import reparameterize_model
from torch import Tensor, nn

from repmlp import checkpoints
from repmlp.branches import BranchSpec, values
from repmlp.injection import InjectedLinear, inject_locality
from repmlp.layers import SetSharingFC
from repmlp.models.repmlp_pure import PureMLP
from repmlp.models.repmlp_resnet import RepMLPResNet
from repmlp.models.repmlpnet import RepMLPNet
from repmlp.models.resmlp import ResMLP
from repmlp.models.upernet import build_upernet

SPATIAL_LAYERS = (SetSharingFC, InjectedLinear)  # layers over a map that have branches, `size` and `merged()`


class Checkpoint(NamedTuple):
    """A network in evaluation mode, and the configuration that `build_model` and `save_model` take."""

    model: nn.Module
    config: dict[str, Any]


def build_timm(
    variant: str,
    kernels: Sequence[BranchSpec | int | str] = (),
    *,
    img_size: int | None = None,
    num_classes: int,
    inference_mode: bool = False,
    arguments: Mapping[str, Any] | None = None,
    **more: Any,
) -> nn.Module:
    """Build a model by its timm name, untrained; branches are injected into one that is not RepMLPNet.

    variant: e.g. "repmlpnet_t224" or "resmlp_12_224". kernels: branches, () for none. img_size: pixels; given to
    models that are built for one size (others take any). inference_mode: without branches, to load merged weights into.
    arguments, more: of the model's constructor.
    Raises ValueError for an unknown name, and where branches fit no layer; see inject_locality.
    """
    if not timm.is_model(variant):
        close = difflib.get_close_matches(variant, timm.list_models(), n=3)
        raise ValueError(f"timm has no model {variant!r}" + (f": did you mean {' or '.join(close)}?" if close else ""))
    ours = timm.model_entrypoint(variant).__module__ in (RepMLPNet.__module__, RepMLPResNet.__module__)
    given = {**more, **(arguments or {})}
    if img_size is not None and (cfg := timm.get_pretrained_cfg(variant)) and cfg.fixed_input_size:
        given["img_size"] = img_size
    if ours:
        return timm.create_model(
            variant, num_classes=num_classes, kernels=values(kernels), inference_mode=inference_mode, **given
        )
    model = timm.create_model(variant, num_classes=num_classes, **given)
    if not kernels or inference_mode:
        return model
    try:
        return inject_locality(model, kernels, inplace=True)
    except ValueError as error:
        raise ValueError(f"{variant} takes no branches, use kernels=[]: {error}") from error


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "repmlpnet": RepMLPNet,
    "repmlp_pure": PureMLP,
    "resmlp": ResMLP,
    "timm": build_timm,
    "upernet": build_upernet,
}


def build_model(config: Mapping[str, Any], num_classes: int = 100, inference_mode: bool = False) -> nn.Module:
    """Build the network that `config` describes: {"arch": one of ARCHITECTURES, ...its arguments}.

    "name" is a label, "weights" and "backbone" say what it started from; none of them is looked at.
    Raises ValueError for an unknown architecture or argument.
    """
    arguments = {key: value for key, value in config.items() if key not in ("name", "arch", "weights", "backbone")}
    arch = config.get("arch")
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}: use one of {', '.join(ARCHITECTURES)}")
    try:
        return ARCHITECTURES[arch](**arguments, num_classes=num_classes, inference_mode=inference_mode)
    except TypeError as error:
        raise ValueError(f"model {arch}: {error}") from error


def merged_copy(model: nn.Module) -> nn.Module:
    """Return a copy of any model with every part merged that has reparameterize(), its root too; the model stays."""
    return reparameterize_model(nn.ModuleList([model]))[0]  # timm visits children only


def check_num_classes(checkpoint: Path | str, model: nn.Module, data: str, num_classes: int) -> None:
    """Raise ValueError where a checkpoint's model tells another number of classes than the data set `data` has."""
    if model.num_classes != num_classes:
        raise ValueError(
            f"{checkpoint} tells {model.num_classes} classes, data={data} has {num_classes}: choose the data set that "
            "it was trained on, data=NAME data.root=FOLDER"
        )


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
    train_time = (".local_perceptron.", ".channel_perceptron.norm.", ".partition_perceptron.norm.")
    merged = not any(part in name for name in state for part in train_time)
    model = build_model(config, int(metadata["num_classes"]), inference_mode=merged)
    check_state_dict(path, state, model.state_dict())
    model.load_state_dict(state)
    return model.eval(), metadata


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open what `save_model` wrote, or the authors' or mmpretrain's weights; see load_model and checkpoints.load.

    Raises FileNotFoundError, or ValueError where the file is neither.
    """
    path = Path(path)
    if path.suffix == ".safetensors" and path.is_file() and _is_ours(path):
        model, metadata = load_model(path)
        return Checkpoint(model, json.loads(metadata["repmlp_model"]))
    model = checkpoints.load(path)
    return Checkpoint(model, checkpoints.config_of(model.state_dict()).config)


def _is_ours(path: Path) -> bool:
    """Say whether `save_model` wrote a safetensors file; a damaged one is for the reader to complain of."""
    try:
        with safe_open(path, "pt") as file:
            return "repmlp_model" in (file.metadata() or {})
    except SafetensorError:
        return False


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
