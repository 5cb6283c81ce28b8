"""One door for weights: what `save` writes `load` builds again, and `load` reads the files of other projects too.

Ours (.safetensors with its configuration), the authors' and mmpretrain's of RepMLPNet, the older RepMLP-ResNets', and
a training run's .ckpt; under the nestings and prefixes that key_names.py lists. Nothing that a file holds is executed.
"""

from __future__ import annotations

import collections
import json
import math
import numbers
import pickle
import re
import types
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.models.resnet import ResNet
from torch import Tensor, nn

from repmlp.branches import BranchSpec, values
from repmlp.deployment import deploy
from repmlp.key_names import Configuration, config_of, convert, to_official, unwrap
from repmlp.models.build import build_model, merged_copy
from repmlp.models.pspnet import PSPNet
from repmlp.models.repmlp_resnet import RepMLPResNet, arguments_of, from_weights, load_older_backbone
from repmlp.models.repmlpnet import RepMLPNet, checkpoint_filter_fn
from repmlp.models.upernet import UperNet
from repmlp.older_key_names import convert_older, is_older
from repmlp.resmlp_key_names import convert_resmlp

__all__ = [
    "Checkpoint",
    "Configuration",
    "check_state_dict",
    "config_of",
    "convert",
    "load",
    "load_backbone",
    "load_model",
    "load_older",
    "open_checkpoint",
    "read",
    "save",
    "save_model",
    "start_backbone",
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
    of a training run of any of these. .safetensors, or what torch.save wrote.
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
    if path.is_file() and MODEL not in _metadata(path):
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
    metadata = _metadata(path)
    if MODEL in metadata:
        config = json.loads(metadata[MODEL])
        if config["arch"] == "resmlp":
            state = convert_resmlp(state)
        model = _matching(path, config, int(metadata["num_classes"]), state)
        model.load_state_dict(state)
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


def load_backbone(backbone: nn.Module, source: Path | str | Mapping[str, Any]) -> list[str]:
    """Load a classifier's weights into a backbone for dense prediction, in place.

    Paper: RepMLPNet Section 5.3, where an ImageNet classifier gets other embeddings between its stages. An embedding
    of another kind than the weights' stays fresh as a whole: its batch norm would have the statistics of a convolution
    that is gone. Where the backbone lacks the classifier, the last batch norm or the last stages, they are ignored.

    backbone: any RepMLPNet; of timm's features_only models, the attribute `model`; a ResNet with RepMLP blocks, see
    load_older_backbone. source: a file of a whole network, or its state dict, in any format that `load` knows.
    Returns the names of the modules that stay fresh: [] or some of "downsamples.0", "downsamples.1", ...
    Raises TypeError for another kind of model; ValueError, before anything is changed, as `convert` does, where merged
    weights meet a train-time backbone, and for any other difference, naming the first.
    """
    if not isinstance(source, Mapping):
        state_dict = read(source)
        try:
            return load_backbone(backbone, state_dict)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    if isinstance(backbone, ResNet):
        return load_older_backbone(backbone, source)
    if not isinstance(backbone, RepMLPNet):
        raise TypeError(f"load_backbone() takes a RepMLPNet itself, no wrapper; got {type(backbone).__name__}")
    tensors = checkpoint_filter_fn(source, backbone)
    own = backbone.state_dict()
    parts = {_part(name) for name in own}
    there, here = ({name: tuple(t.shape) for name, t in s.items() if _part(name) in parts} for s in (tensors, own))
    differ = [name for name in dict.fromkeys((*here, *there)) if there.get(name) != here.get(name)]
    fresh = list(dict.fromkeys(part for part in map(_part, differ) if part.startswith("downsamples.")))
    if unlike := [name for name in differ if _part(name) not in fresh]:
        raise ValueError(_why_unlike(unlike[0], there, here, backbone))
    backbone.load_state_dict({name: own[name] if _part(name) in fresh else tensors[name] for name in own})
    return fresh


def start_backbone(net: UperNet | PSPNet, path: Path | str) -> list[str]:
    """Load a classifier's weights into the backbone, in place; returns the names of the modules that stay fresh.

    Paper: RepMLPNet Section 5.3; RepMLP Section 4.4. path: for a RepMLPNet, or a ResNet with RepMLP blocks, a file of
    any format that `load_backbone` reads, else a state dict by timm's names; its classifier is ignored.
    Raises FileNotFoundError; ValueError where the file is damaged, or of another network.
    """
    tensors = read(path)
    try:
        if isinstance(net.backbone, (RepMLPNet, RepMLPResNet)):
            return load_backbone(net.backbone, tensors)
        own = net.backbone.state_dict()
        for name, tensor in own.items():
            # timm's wrapper of some networks writes the first dot of a name as _
            there = name if name in tensors else name.replace("_", ".", 1)
            if there not in tensors:
                name_of = net.upernet.encoder.name if isinstance(net, UperNet) else type(net.backbone).__name__
                raise ValueError(f"{name} is missing: expected the weights of timm's {name_of}")
            if tensors[there].shape != tensor.shape:
                raise ValueError(f"{there} is {tuple(tensors[there].shape)} there and {tuple(tensor.shape)} here")
            own[name] = tensors[there]
        net.backbone.load_state_dict(own)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return []


def read(path: Path | str) -> dict[str, Any]:
    """Read a .safetensors file, or one that torch.save wrote, onto the CPU without running code that it may hold.

    Objects of other classes than tensors and plain Python values, as training checkpoints hold, are not built: an inert
    placeholder stands for each.
    Raises FileNotFoundError, or ValueError where the file is truncated, or is no dictionary.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path.absolute()}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole safetensors file ({error}): fetch or write it again") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a cut file fails in any of a dozen ways
        if not isinstance(error, pickle.UnpicklingError) or _is_torchscript(path):
            raise ValueError(f"{path} {_why_unreadable(path, error)}") from error
        try:
            content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_TensorsOnly)
        except Exception as again:
            raise ValueError(f"{path} {_why_unreadable(path, again)}") from again
    if not isinstance(content, Mapping):
        kind = "whole pickled object" if isinstance(content, _Inert) else type(content).__name__
        raise ValueError(f"{path} holds a {kind}, expected a state_dict: save model.state_dict()")
    return dict(content)


class _Inert:
    """Stands for an object of a class that is not built: it takes whatever a pickle does to it, and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return _Inert()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    add = append


class _TensorUnpickler(pickle.Unpickler):
    """Builds tensors, ordered dictionaries and plain values; any other name in a pickle becomes a placeholder.

    Nothing is imported: what may be called is listed here. Functions are wrapped anew for each file, so that a pickle
    that sets attributes on one changes nothing outside.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): lambda *items: collections.OrderedDict(*items),
            ("torch._utils", "_rebuild_tensor"): lambda *parts: torch._utils._rebuild_tensor(*parts),
            ("torch._utils", "_rebuild_tensor_v2"): lambda *parts: torch._utils._rebuild_tensor_v2(*parts[:6]),
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch.nn.parameter", "Parameter"): lambda data, *_: data,
            ("torch", "Size"): lambda *sizes: torch.Size(*sizes),
            ("torch", "device"): lambda *_: torch.device("cpu"),
        }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        return self._known.get((module, name), _Inert)


def _load_tensors(file: Any, **kwargs: Any) -> Any:
    return _TensorUnpickler(file, **kwargs).load()


# What torch.load takes in place of the module pickle
_TensorsOnly = types.SimpleNamespace(Unpickler=_TensorUnpickler, load=_load_tensors, __name__="tensors_only")


def _is_torchscript(path: Path) -> bool:
    """Say whether a file is a TorchScript program, which torch.load would hand to another reader."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _metadata(path: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; {} for other files."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): fetch or write it again") from error


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


def _part(ours: str) -> str:
    """Return the part of the network that a tensor belongs to: "stem", "stages.0", "downsamples.0", "norm", "head"."""
    return re.match(r"(stages|downsamples)\.\d+|\w+", ours)[0]


def _why_unlike(
    name: str, there: Mapping[str, tuple[int, ...]], here: Mapping[str, tuple[int, ...]], backbone: RepMLPNet
) -> str:
    """Say what to do about weights whose tensor `name` is not the backbone's; there, here: shapes by our names."""
    if name not in there or name not in here:
        difference = f"{name} is missing {'there' if name not in there else 'here'}"
    else:
        difference = f"{name} is {there[name]} there and {here[name]} here"
        # (S, h*w, h*w): the same layer of a network for another image size
        if name.endswith(".channel_perceptron.weight") and there[name][0] == here[name][0]:
            side = math.isqrt(there[name][1])
            stride = backbone.feature_info[int(name.split(".")[1])]["reduction"]
            size = f"img_size={side * stride}" if side**2 == there[name][1] else "the img_size of the weights"
            return f"{difference}: build the backbone with {size}, or repmlp.resize the classifier first"
    return (
        f"{difference}: build the backbone with the arguments of the weights' network, which "
        "repmlp.checkpoints.config_of(weights) tells; embed_kernel alone may be another"
    )


def _why_unreadable(path: Path, error: Exception) -> str:
    """Say why a file could not be read: a TorchScript program, or damaged."""
    if "TorchScript" in str(error) or _is_torchscript(path):
        return "is a TorchScript program, not weights: save model.state_dict() instead"
    return f"is no whole PyTorch file ({type(error).__name__}): fetch or write it again"
