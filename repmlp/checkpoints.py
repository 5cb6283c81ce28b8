"""Weights of RepMLPNet from elsewhere: the authors' files and mmpretrain's, train-time and merged, and the way back.

The only place that knows other projects' names. `load(path)` is all that most users need; `convert` is what timm calls
for `pretrained=True`. Nothing here executes what a file holds.
"""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from repmlp.branches import check_published, parse_all, values
from repmlp.models.repmlpnet import RepMLPNet, checkpoint_filter_fn

# One row a layer: our name, the authors', mmpretrain's. # is a number; the numbers of a row are the same, in order.
_NET = (
    ("stem.conv", "conv_embedding.conv", "patch_embed.projection"),
    ("stem.norm", "conv_embedding.bn", "patch_embed.norm"),
    ("downsamples.#.conv", "embeds.#.conv", "downsample_layers.#.conv"),
    ("downsamples.#.norm", "embeds.#.bn", "downsample_layers.#.bn"),
    ("norm", "head_norm", "final_norm"),
)
_UNIT = (
    ("norm1", "prebn1", "norm1"),
    ("block.channel_perceptron", "repmlp_block.fc3", "repmlp_block.fc3"),
    ("block.channel_perceptron.norm", "repmlp_block.fc3_bn", "repmlp_block.fc3_bn"),
    *(
        (f"block.channel_perceptron.local_perceptron.{ours}.#", theirs, theirs)
        for ours, theirs in (("convs", "repmlp_block.repconv#.conv"), ("norms", "repmlp_block.repconv#.bn"))
    ),
    ("block.global_perceptron.fc1", "repmlp_block.gp.fc1", "repmlp_block.gp.conv1.conv"),
    ("block.global_perceptron.fc2", "repmlp_block.gp.fc2", "repmlp_block.gp.conv2.conv"),
    ("norm2", "prebn2", "norm2"),
    ("ffn.fc1", "ffn_block.ffn_fc1.conv", "ffn_block.ffn_fc1.conv"),
    ("ffn.norm1", "ffn_block.ffn_fc1.bn", "ffn_block.ffn_fc1.bn"),
    ("ffn.fc2", "ffn_block.ffn_fc2.conv", "ffn_block.ffn_fc2.conv"),
    ("ffn.norm2", "ffn_block.ffn_fc2.bn", "ffn_block.ffn_fc2.bn"),
)
_NAMES = (*_NET, *(tuple(f"stages.#.#.{name}" for name in row) for row in _UNIT))

# Format -> {our name of a layer: the name there}
_FORMATS: dict[str, dict[str, str]] = {
    "official": {ours: official for ours, official, _ in _NAMES} | {"head": "head"},
    "mmpretrain": {ours: f"backbone.{mmpretrain}" for ours, _, mmpretrain in _NAMES} | {"head": "head.fc"},
    "mmpretrain's backbone alone": {ours: mmpretrain for ours, _, mmpretrain in _NAMES},
    "repmlp": {ours: ours for ours, _, _ in _NAMES}
    | {name: name for name in ("downsamples.#.expand", "head")}
    # the order of a shuffled grid
    | {name: name for name in ("stages.#.#.block.channel_perceptron.local_perceptron",)},
}
_OVERLAPPING = re.compile(r"downsamples\.\d+\.expand\.")
_BRANCH = re.compile(r"\.local_perceptron\.(?:convs|norms)\.(\d[\dxds]*)\.")
# a number, or a branch of ours ("1x3", "3d2", "3s")
_NUMBER = re.compile(r"(?<=\.)\d[\dxds]*(?=\.)|(?<=\.repconv)\d+(?=\.)")
_POINTWISE = re.compile(r"\.(ffn|global_perceptron)\.fc[12]\.weight$")
# Raw weights first: they are what the published files hold
_NESTS = ("state_dict", "model", "state_dict_ema", "model_ema")
_WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile


class Configuration(NamedTuple):
    """The arguments of `repmlp.build_model`: `build_model(*config_of(state_dict))`."""

    config: dict[str, Any]
    num_classes: int
    inference_mode: bool


def convert(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Bring weights of RepMLPNet into our names and shapes.

    state_dict: the authors' weights, mmpretrain's (also the backbone alone) or ours, train-time or merged, with or
    without a classifier. It may lie under "state_dict", "model", "state_dict_ema" or "model_ema" (the first of these
    that is there: raw weights go before averaged ones; timm's own reader of files prefers averaged ones), beside
    anything else; the prefixes of DistributedDataParallel and torch.compile are taken off.
    Returns what RepMLPNet.load_state_dict() takes, strictly; dtypes and values unchanged, views where possible. A
    batch norm without a count of batches, as old files have it, gets 0.
    Raises ValueError where names or shapes fit no format: the first missing and unexpected name in the nearest one.
    """
    weights = _recognise(state_dict)
    expected = _expected_shapes(*_arguments(weights))
    missing = [ours for ours in expected if ours not in weights.keys and not ours.endswith("num_batches_tracked")]
    known = {weights.keys[ours] for ours in expected if ours in weights.keys}
    unexpected = [key for key in weights.tensors if key not in known]
    if missing or unexpected:
        raise weights.misfit(missing[:1], unexpected[:1])
    converted = {}
    for ours, shape in expected.items():
        if ours not in weights.keys:
            mean = converted[ours.replace("num_batches_tracked", "running_mean")]
            converted[ours] = torch.zeros((), dtype=torch.long, device=mean.device)
            continue
        key = weights.keys[ours]
        found = tuple(weights.tensors[key].shape)
        needed = shape if weights.format == "repmlp" else _foreign_shape(ours, shape)
        if found != needed and ours.endswith("global_perceptron.fc1.weight") and found[1:] == needed[1:]:
            raise ValueError(
                f"{key} has {found[0]} inner features, RepMLPNet has C/4 = {needed[0]}: these weights are of another "
                "network (mmpretrain rounds to a multiple of 8, so its D256 cannot be converted)"
            )
        if found != needed:
            raise ValueError(f"{key} is {found}, the other weights need {needed}")
        converted[ours] = weights.tensors[key].reshape(shape)
    return converted


def to_official(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Bring weights of any format that `convert` knows into the authors' names and shapes, to use in their code.

    Values, dtypes and form (train-time or merged) are unchanged: convert(to_official(s)) equals convert(s).
    Raises ValueError as `convert` does, and for a net without Global Perceptrons, with overlapping embeddings or with
    branches that are no plain squares, which the authors' code has not.
    """
    converted = convert(state_dict)
    if any(_OVERLAPPING.match(ours) for ours in converted):
        raise ValueError(
            "a net with overlapping embeddings (embed_kernel) cannot be written: the authors' code has 2x2 ones only"
        )
    check_published({match[1] for ours in converted if (match := _BRANCH.search(ours))})
    if not any(".global_perceptron." in ours for ours in converted):
        raise ValueError("a net without Global Perceptrons cannot be written: every block of the authors' has one")
    return {
        _translate(ours, _FORMATS["official"]): tensor.reshape(_foreign_shape(ours, tuple(tensor.shape)))
        for ours, tensor in converted.items()
    }


def read(path: Path | str) -> dict[str, Any]:
    """Read a .safetensors file, or one that torch.save wrote, onto the CPU without running code that it may hold.

    Raises FileNotFoundError, or ValueError where the file is truncated, holds objects other than tensors and plain
    Python values (a training checkpoint often does), or is no dictionary.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is no whole safetensors file ({error}): fetch or write it again") from error
    with path.open("rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a cut file fails in any of a dozen ways
            raise ValueError(f"{path} {_why_unreadable(path, error)}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a state_dict: save model.state_dict()")
    return dict(content)


def config_of(state_dict: Mapping[str, Any]) -> Configuration:
    """Infer the network from its weights, in any format that `convert` knows.

    Returns (config, num_classes, inference_mode) for `build_model`. num_classes is 0 without a classifier. Merged
    weights do not tell which kernels there were: [] stands for them. Image and maps are taken to be square, because
    weights of a map hold h*w alone.
    Raises ValueError as `convert` does, and where h*w is no square number.
    """
    weights = _recognise(convert(state_dict))
    arguments, positions = _arguments(weights)
    side = math.isqrt(positions)
    if side**2 != positions:
        raise ValueError(
            f"the last stage's maps have {positions} positions, not a square number, and weights do not tell height "
            "from width: build RepMLPNet(img_size=(height, width), ...) and load convert(state_dict) into it"
        )
    num_classes, inference_mode = arguments.pop("num_classes"), arguments.pop("inference_mode")
    stride = arguments["stem_stride"] * 2 ** (len(arguments["blocks"]) - 1)
    return Configuration({"arch": "repmlpnet", "img_size": stride * side, **arguments}, num_classes, inference_mode)


def load(path: Path | str) -> RepMLPNet:
    """Build the network whose weights a file holds, in any format that `convert` knows, in evaluation mode.

    Parameters are float32 whatever the file's dtype: exact for float16 and bfloat16, rounded for float64.
    Raises FileNotFoundError, or ValueError as `read`, `convert` and `config_of` do, with the path.
    """
    state_dict = read(path)
    try:
        state_dict = convert(state_dict)
        config, num_classes, inference_mode = config_of(state_dict)
        arguments = {name: value for name, value in config.items() if name != "arch"}
        model = RepMLPNet(**arguments, num_classes=num_classes, inference_mode=inference_mode)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    model.load_state_dict(state_dict)
    return model.eval()


def load_backbone(backbone: RepMLPNet, state_dict: Mapping[str, Any]) -> list[str]:
    """Load a classifier's weights into a backbone for dense prediction, in place.

    Paper: RepMLPNet Section 5.3, where an ImageNet classifier gets other embeddings between its stages. An embedding
    of another kind than the weights' stays fresh as a whole: its batch norm would have the statistics of a convolution
    that is gone. Where the backbone lacks the classifier, the last batch norm or the last stages, they are ignored.

    backbone: any RepMLPNet; of timm's features_only models, the attribute `model`. state_dict: of a whole network, in
    any format that `convert` knows.
    Returns the names of the modules that stay fresh: [] or some of "downsamples.0", "downsamples.1", ...
    Raises TypeError for another kind of model; ValueError, before anything is changed, as `convert` does, where merged
    weights meet a train-time backbone, and for any other difference, naming the first.
    """
    if not isinstance(backbone, RepMLPNet):
        raise TypeError(f"load_backbone() takes a RepMLPNet itself, no wrapper; got {type(backbone).__name__}")
    tensors = checkpoint_filter_fn(state_dict, backbone)
    own = backbone.state_dict()
    parts = {_part(name) for name in own}
    there, here = ({name: tuple(t.shape) for name, t in s.items() if _part(name) in parts} for s in (tensors, own))
    differ = [name for name in dict.fromkeys((*here, *there)) if there.get(name) != here.get(name)]
    fresh = list(dict.fromkeys(part for part in map(_part, differ) if part.startswith("downsamples.")))
    if unlike := [name for name in differ if _part(name) not in fresh]:
        raise ValueError(_why_unlike(unlike[0], there, here, backbone))
    backbone.load_state_dict({name: own[name] if _part(name) in fresh else tensors[name] for name in own})
    return fresh


class _Weights(NamedTuple):
    """The tensors of a file by the names they have there, and where ours are among them."""

    format: str
    tensors: dict[str, Tensor]
    keys: dict[str, str]  # our name -> the name there

    def misfit(self, missing: list[str], unexpected: list[str]) -> ValueError:
        """Say what is wrong; missing: our names, unexpected: names there."""
        faults = [f"{_translate(ours, _FORMATS[self.format])} is missing" for ours in missing]
        faults += [f"{key} is unexpected" for key in unexpected]
        return ValueError(
            f"these weights have none of the formats {', '.join(_FORMATS)}; read as the nearest, {self.format}: "
            f"{' and '.join(faults)}"
        )

    def shape(self, ours: str, dims: int) -> tuple[int, ...]:
        """Return the shape that a tensor has there; ValueError where it is missing or has other dimensions."""
        if ours not in self.keys:
            unknown = [key for key in self.tensors if key not in set(self.keys.values())]
            raise self.misfit([ours], unknown[:1])
        shape = tuple(self.tensors[self.keys[ours]].shape)
        if len(shape) != dims or 0 in shape:
            raise ValueError(f"{self.keys[ours]} is {shape}, expected {dims} dimensions, none of them empty")
        return shape


def _recognise(state_dict: Mapping[str, Any]) -> _Weights:
    """Unwrap a state dict and choose the format that knows the most of its names."""
    tensors = _unwrap(state_dict)
    found = []
    for label, names in _FORMATS.items():
        ours = {there: here for here, there in names.items()}
        translated = {key: _translate(key, ours) for key in tensors}
        found.append(_Weights(label, tensors, {name: key for key, name in translated.items() if name is not None}))
    return max(found, key=lambda weights: len(weights.keys))


def _unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Find the tensors in a checkpoint and take the wrappers' prefixes off their names."""
    top = state_dict
    while isinstance(state_dict, Mapping) and (nest := _first_nest(state_dict)):
        state_dict = state_dict[nest]
    tensors = {}
    if isinstance(state_dict, Mapping):
        tensors = {str(key): value for key, value in state_dict.items() if isinstance(value, Tensor)}
    if not tensors:
        there = f"the keys {[*top][:5]}" if isinstance(top, Mapping) else f"a {type(top).__name__}"
        raise ValueError(f"found no weights in {there}: expected a state_dict, perhaps under {' or '.join(_NESTS)}")
    while prefix := next((p for p in _WRAPPERS if all(key.startswith(p) for key in tensors)), ""):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _first_nest(state_dict: Mapping[str, Any]) -> str | None:
    return next((nest for nest in _NESTS if isinstance(state_dict.get(nest), Mapping)), None)


def _translate(key: str, names: Mapping[str, str]) -> str | None:
    """Rename a tensor by the name of its layer, keeping the numbers in it; None where `names` has no such layer."""
    layer, _, tensor = _NUMBER.sub("#", key).rpartition(".")
    if layer not in names:
        return None
    name = names[layer]
    for number in _NUMBER.findall(key):
        name = name.replace("#", number, 1)
    return f"{name}.{tensor}"


def _foreign_shape(ours: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape that a tensor of ours has in the authors' and mmpretrain's files, where FCs are convolutions."""
    if _POINTWISE.search(ours):
        return (*shape, 1, 1)
    if ours.endswith(".channel_perceptron.weight"):
        return (shape[0] * shape[1], shape[2], 1, 1)
    if ours.endswith(".channel_perceptron.bias"):
        return (shape[0] * shape[1],)
    return shape


def _arguments(weights: _Weights) -> tuple[dict[str, Any], int]:
    """Infer RepMLPNet's arguments but the image size, and the positions h*w of the last stage's maps.

    Reads the first unit of each stage only: whether the others agree is for `convert` to check.
    """
    units: dict[str, set[str]] = {}
    for ours in weights.keys:
        if match := re.match(r"stages\.(\d+)\.(\d+)\.", ours):
            units.setdefault(match[1], set()).add(match[2])
    # a stage or unit left out leaves a gap in the numbers, which shows as names missing and unexpected
    blocks = [len(units.get(str(i), "1")) for i in range(max(1, len(units)))]
    _, in_chans, stem_stride, _ = weights.shape("stem.conv.weight", 4)
    channels, share_sets, positions = [], [], 1
    for i in range(len(blocks)):
        channels.append(weights.shape(f"stages.{i}.0.norm1.weight", 1)[0])
        weight = f"stages.{i}.0.block.channel_perceptron.weight"
        if weights.format == "repmlp":
            sets, _, positions = weights.shape(weight, 3)
        else:
            rows, positions, _, _ = weights.shape(weight, 4)
            sets, rest = divmod(rows, positions)
            if rest:
                raise ValueError(
                    f"{weights.keys[weight]} has {rows} rows and {positions} columns: the rows should be a multiple"
                )
        share_sets.append(sets)
    branches = (_BRANCH.search(ours) for ours in weights.keys)
    head = [weights.tensors[weights.keys[ours]] for ours in ("head.weight", "head.bias") if ours in weights.keys]
    arguments = {
        "stem_stride": stem_stride,
        "channels": channels,
        "blocks": blocks,
        "share_sets": share_sets,
        "kernels": values({match[1] for match in branches if match}),
        "global_perceptron": weights.format != "repmlp" or any(".global_perceptron." in ours for ours in weights.keys),
        "in_chans": in_chans,
        "num_classes": len(head[0]) if head and head[0].ndim else 0,
        "inference_mode": any(ours.endswith(".channel_perceptron.bias") for ours in weights.keys),
    }
    if any(_OVERLAPPING.match(ours) for ours in weights.keys):
        arguments["embed_kernel"] = weights.shape("downsamples.0.conv.weight", 4)[-1]
    return arguments, positions


def _expected_shapes(arguments: Mapping[str, Any], positions: int) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that the network has, in its order."""
    # Weights hold h*w alone, so any map of as many positions will do in the last stage: one row of them, or the first
    # that leaves room for a dilated branch.
    specs = parse_all(arguments["kernels"])
    maps = [(h, positions // h) for h in range(1, positions + 1) if positions % h == 0]
    h, w = next((size for size in maps if all(spec.fits(size) for spec in specs)), maps[0])
    stride = arguments["stem_stride"] * 2 ** (len(arguments["blocks"]) - 1)
    with torch.device("meta"):
        net = RepMLPNet(img_size=(stride * h, stride * w), **arguments)
    return {ours: tuple(tensor.shape) for ours, tensor in net.state_dict().items()}


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
    """Say why torch.load refused a file: objects that weights_only does not allow, or a damaged file."""
    if "TorchScript" in str(error):
        return "is a TorchScript program, not weights: save model.state_dict() instead"
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and (refused or zipfile.is_zipfile(path)):
        objects = refused[1] if refused else "pickled objects"
        return (
            f"holds more than tensors ({objects}), which could run code: where you trust the file, re-save its "
            "state_dict alone, for instance torch.save(torch.load(path, weights_only=False)['model'], new_path)"
        )
    return f"is no whole PyTorch file ({type(error).__name__}): fetch or write it again"
