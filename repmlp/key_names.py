"""Names and shapes of RepMLPNet's weights in other projects' files <-> ours: tables and patterns, no networks.

Ours, the authors' and mmpretrain's, train-time and merged. What an older RepMLP-ResNet's files say is in
older_key_names.py.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repmlp.branches import check_published, parse_all, values

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
_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
_POINTWISE = re.compile(r"\.(ffn|global_perceptron)\.fc[12]\.weight$")
# Raw weights first: they are what the published files hold
NESTS = ("state_dict", "model", "net", "network", "state_dict_ema", "model_ema", "ema_state_dict", "ema")
# DistributedDataParallel, and the attributes that training scripts keep a network under
WRAPPERS = ("module.", "model.", "net.", "network.", "backbone.")
_COMPILED = re.compile(r"(?<![^.])_orig_mod\.")


class Configuration(NamedTuple):
    """The arguments of `repmlp.build_model`: `build_model(*config_of(state_dict))`."""

    config: dict[str, Any]
    num_classes: int
    inference_mode: bool


def convert(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Bring weights of RepMLPNet into our names and shapes.

    state_dict: the authors' weights, mmpretrain's (also the backbone alone) or ours, train-time or merged, with or
    without a classifier. It may lie under one of NESTS (the first that is there: raw weights go before averaged
    ones; timm's own reader of files prefers averaged ones), beside anything else; the prefixes WRAPPERS and
    torch.compile's are taken off.
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


def config_of(state_dict: Mapping[str, Any], img_size: Sequence[int] | None = None) -> Configuration:
    """Infer the network from its weights, in any format that `convert` knows.

    Returns (config, num_classes, inference_mode) for `build_model`. num_classes is 0 without a classifier. Merged
    weights do not tell which kernels there were: [] stands for them. Image and maps are taken to be square, because
    weights of a map hold h*w alone, unless img_size (height, width) is given.
    Raises ValueError as `convert` does, and where h*w is no square number.
    """
    weights = _recognise(convert(state_dict))
    arguments, positions = _arguments(weights)
    side = math.isqrt(positions)
    if img_size is None and side**2 != positions:
        raise ValueError(
            f"the last stage's maps have {positions} positions, not a square number, and weights do not tell height "
            "from width: build RepMLPNet(img_size=(height, width), ...) and load convert(state_dict) into it"
        )
    num_classes, inference_mode = arguments.pop("num_classes"), arguments.pop("inference_mode")
    stride = arguments["stem_stride"] * 2 ** (len(arguments["blocks"]) - 1)
    size = stride * side if img_size is None else list(img_size)
    return Configuration({"arch": "repmlpnet", "img_size": size, **arguments}, num_classes, inference_mode)


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
    tensors = unwrap(state_dict)
    found = []
    for label, names in _FORMATS.items():
        ours = {there: here for here, there in names.items()}
        translated = {key: _translate(key, ours) for key in tensors}
        found.append(_Weights(label, tensors, {name: key for key, name in translated.items() if name is not None}))
    return max(found, key=lambda weights: len(weights.keys))


def unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Find the tensors in a checkpoint, under any of NESTS, and take the wrappers' prefixes off their names.

    Raises ValueError where there are none.
    """
    top = state_dict
    while isinstance(state_dict, Mapping) and (nest := _first_nest(state_dict)):
        state_dict = state_dict[nest]
    tensors = {}
    if isinstance(state_dict, Mapping):
        # torch.compile's name stands before that of any part that was compiled
        tensors = {_COMPILED.sub("", str(key)): value for key, value in state_dict.items() if isinstance(value, Tensor)}
    if not tensors:
        there = f"the keys {[*top][:5]}" if isinstance(top, Mapping) else f"a {type(top).__name__}"
        raise ValueError(f"found no weights in {there}: expected a state_dict, perhaps under {' or '.join(NESTS)}")
    while prefix := next((p for p in WRAPPERS if all(key.startswith(p) for key in tensors)), ""):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _first_nest(state_dict: Mapping[str, Any]) -> str | None:
    return next((nest for nest in NESTS if isinstance(state_dict.get(nest), Mapping)), None)


def is_foreign(state_dict: Mapping[str, Any]) -> bool:
    """Say whether weights of RepMLPNet have other names than ours: another project's, or prefixes."""
    try:
        weights = _recognise(state_dict)
    except ValueError:
        return False
    return "stem.conv.weight" in weights.keys and "stem.conv.weight" not in state_dict


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
    """Return name and shape of every tensor that the network has: what RepMLPNet(...).state_dict() says of itself.

    arguments: of RepMLPNet, but the image size. positions: h*w of the last stage's maps.
    Raises ValueError where share_sets do not divide the channels, or a branch is none.
    """
    specs = parse_all(arguments["kernels"])
    channels, blocks, sets = (arguments[name] for name in ("channels", "blocks", "share_sets"))
    merged, embed, stride = (arguments.get(name) for name in ("inference_mode", "embed_kernel", "stem_stride"))
    for c, s in zip(channels, sets, strict=True):
        if s < 1 or c % s:
            raise ValueError(f"share_sets={s} does not divide channels={c}")
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, features: int) -> None:
        shapes.update({f"{name}.{tensor}": (features,) for tensor in _NORM_TENSORS})
        shapes[f"{name}.num_batches_tracked"] = ()

    shapes["stem.conv.weight"] = (channels[0], arguments["in_chans"], stride, stride)
    norm("stem.norm", channels[0])
    for i, (c, depth, s) in enumerate(zip(channels, blocks, sets, strict=True)):
        size = positions * 4 ** (len(channels) - 1 - i)
        for unit in (f"stages.{i}.{j}" for j in range(depth)):
            norm(f"{unit}.norm1", c)
            if arguments["global_perceptron"]:
                gate = f"{unit}.block.global_perceptron"
                shapes |= {f"{gate}.fc1.weight": (c // 4, c), f"{gate}.fc1.bias": (c // 4,)}
                shapes |= {f"{gate}.fc2.weight": (c, c // 4), f"{gate}.fc2.bias": (c,)}
            fc = f"{unit}.block.channel_perceptron"
            shapes[f"{fc}.weight"] = (s, size, size)
            if merged:
                shapes[f"{fc}.bias"] = (s, size)
            else:
                norm(f"{fc}.norm", s)
                for spec in specs:
                    shapes[f"{fc}.local_perceptron.convs.{spec.value}.weight"] = (s, 1, *spec.shape)
                    norm(f"{fc}.local_perceptron.norms.{spec.value}", s)
                if any(spec.shuffled for spec in specs):
                    shapes[f"{fc}.local_perceptron.permutation"] = (size,)
            norm(f"{unit}.norm2", c)
            shapes |= {f"{unit}.ffn.fc1.weight": (4 * c, c), f"{unit}.ffn.fc2.weight": (c, 4 * c)}
            norm(f"{unit}.ffn.norm1", 4 * c)
            norm(f"{unit}.ffn.norm2", c)
    for i, (before, c) in enumerate(itertools.pairwise(channels)):
        if embed:
            shapes[f"downsamples.{i}.expand.weight"] = (c, before, 1, 1)
        shapes[f"downsamples.{i}.conv.weight"] = (c, 1, embed, embed) if embed else (c, before, 2, 2)
        norm(f"downsamples.{i}.norm", c)
    norm("norm", channels[-1])
    if classes := arguments["num_classes"]:
        shapes |= {"head.weight": (classes, channels[-1]), "head.bias": (classes,)}
    return shapes
