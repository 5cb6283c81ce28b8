"""Names and shapes in the released files of the older RepMLP-ResNets <-> ours: tables and patterns, no networks.

Paper: RepMLP (arXiv 2105.01883). Its files are written while training (a batch norm behind every convolution) or
converted (all of them folded, as `repmlp.fold_batch_norms` does it).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

# One row a layer: ours, theirs. # is a number; those of a row are the same, in order.
_BLOCK = (
    ("downsample.0", "shortcut.conv"),
    ("downsample.1", "shortcut.bn"),
    *((f"{ours}{n}", f"conv{n}.{theirs}") for n in (1, 2, 3) for ours, theirs in (("conv", "conv"), ("bn", "bn"))),
)
_LIGHT = tuple(
    (f"{layer}{ours}", f"light_conv{theirs}.{layer}") for ours, theirs in ((1, 1), (2, 3)) for layer in ("conv", "bn")
)
_BOTTLENECK = tuple(
    (f"{layer}{ours}", f"btnk_conv{theirs}.{layer}")
    for ours, theirs in ((1, 1), (2, 2), (3, 4), (4, 5))
    for layer in ("conv", "bn")
)
_REPMLP = (
    ("global_perceptron.norm", "avg.bn"),
    ("global_perceptron.fc1", "fc1_fc2.fc1"),
    ("global_perceptron.fc2", "fc1_fc2.fc2"),
    ("partition_perceptron", "fc3"),
    ("partition_perceptron.norm", "fc3_bn"),
    ("partition_perceptron.local_perceptron.convs.#", "repconv#.conv"),
    ("partition_perceptron.local_perceptron.norms.#", "repconv#.bn"),
)
_NET = (("conv1", "stage0.0.conv"), ("bn1", "stage0.0.bn"), ("fc", "linear"))


def _layers(kind: str) -> dict[str, str]:
    """Return {our name of a layer: theirs} for the layers of a block; kind: "plain", "light" or "btnk"."""
    rows = {"plain": _BLOCK, "light": _LIGHT, "btnk": _BOTTLENECK}[kind]
    if kind != "plain":
        rows = (*rows, *((f"repmlp.{ours}", f"{kind}_repmlp.{theirs}") for ours, theirs in _REPMLP))
    return {f"layer#.#.{ours}": f"stage#.#.{theirs}" for ours, theirs in rows}


_KINDS = {kind: _layers(kind) | dict(_NET) for kind in ("plain", "light", "btnk")}
_OURS = {theirs: ours for names in _KINDS.values() for ours, theirs in names.items()}


def is_older(state_dict: Mapping[str, Tensor]) -> bool:
    """Say whether a state dict has the names of the older released files."""
    return "stage0.0.conv.weight" in state_dict


def convert_older(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring weights of an older RepMLP-ResNet, or a plain ResNet of that code, into our names and shapes.

    state_dict: train-time or converted; ours go through unchanged.
    Returns what RepMLPResNet.load_state_dict() takes (of converted files: its form by `fold_batch_norms`); values and
    dtypes unchanged, views where possible.
    Raises ValueError for a name that those files do not have, and an FC3 whose shape fits none.
    """
    if not is_older(state_dict):
        return dict(state_dict)
    converted = {}
    for key, tensor in state_dict.items():
        ours = _translate(key, _OURS)
        if ours is None:
            raise ValueError(f"{key} is no name of an older RepMLP-ResNet's file")
        if ours.endswith(".partition_perceptron.weight"):
            tensor = tensor.reshape(_group_shape(key, tuple(tensor.shape)))
        elif ours.endswith(".partition_perceptron.bias"):
            weight = key.removesuffix("bias") + "weight"
            if weight not in state_dict:
                raise ValueError(f"{weight} is missing")
            # (O*h*w,) -> (g, O/g*h*w)
            tensor = tensor.reshape(_group_shape(weight, tuple(state_dict[weight].shape))[:2])
        converted[ours] = tensor
    return converted


def to_older(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring our weights into names and shapes of the older code: the inverse of `convert_older`.

    state_dict: of a RepMLPResNet while training, or of its form by `fold_batch_norms`.
    Raises ValueError for a tensor that the older code has no name for: a branch that is not square, or a network that
    is merged but not folded.
    """
    if is_older(state_dict):
        return dict(state_dict)
    folded = "conv1.bias" in state_dict
    found = {}
    for key, tensor in state_dict.items():
        block = re.match(r"layer\d\.\d+\.", key)
        kind = "plain"
        if block and any(name.startswith(f"{block[0]}repmlp.") for name in state_dict):
            kind = "btnk" if f"{block[0]}conv4.weight" in state_dict else "light"
        theirs = _translate(key, _KINDS[kind])
        if theirs is None:
            raise ValueError(f"{key} has no name in the older code, whose branches are square")
        if key.endswith(".partition_perceptron.weight"):
            # (g, O/g*h*w, C/g*h*w) -> (O*h*w, C/g*h*w, 1, 1)
            tensor = tensor.flatten(0, 1)[:, :, None, None]
        elif key.endswith(".partition_perceptron.bias"):
            if not folded:
                raise ValueError("a network that is merged but not folded cannot be written: use fold_batch_norms")
            tensor = tensor.flatten()
        found[theirs] = tensor
    return found


def _group_shape(key: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return (g, O/g*h*w, C/g*h*w) of an FC3 that is stored as (O*h*w, C/g*h*w, 1, 1); C = O in these networks."""
    if len(shape) != 4 or 0 in shape or shape[2:] != (1, 1) or shape[0] % shape[1]:
        raise ValueError(f"{key} is {shape}, expected (O*h*w, C/g*h*w, 1, 1) with C = O")
    return shape[0] // shape[1], shape[1], shape[1]


def _translate(key: str, names: Mapping[str, str]) -> str | None:
    """Rename a tensor by the name of its layer, keeping the numbers in it; None where `names` has no such layer."""
    layer, _, tensor = key.rpartition(".")
    for pattern, numbers in _patterns(layer):
        if pattern in names:
            name = names[pattern]
            for number in numbers:
                name = name.replace("#", number, 1)
            return f"{name}.{tensor}"
    return None


def _patterns(layer: str) -> Iterator[tuple[str, list[str]]]:
    """Yield a layer's name with its numbers replaced by #, and the numbers; the name itself first."""
    yield layer, []
    found = re.fullmatch(r"(stage|layer)([1-4])\.(\d+)\.(.+)", layer)
    if not found:
        return
    kind, stage, block, rest = found.groups()
    yield f"{kind}#.#.{rest}", [stage, block]
    branch = re.fullmatch(r"(.*\.repconv)(\d+)(\.\w+)|(.*\.local_perceptron\.\w+\.)(\d+)()", rest)
    if branch:
        before, number, after = branch.groups()[:3] if branch[2] else branch.groups()[3:]
        yield f"{kind}#.#.{before}#{after}", [stage, block, number]
