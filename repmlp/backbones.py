"""Start a backbone for dense prediction from the weights of a classifier."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models.resnet import ResNet
from torch import nn

from repmlp.models.pspnet import PSPNet
from repmlp.models.repmlp_resnet import RepMLPResNet
from repmlp.models.repmlp_weights import load_older_backbone
from repmlp.models.repmlpnet import RepMLPNet, checkpoint_filter_fn
from repmlp.models.upernet import UperNet
from repmlp.reading import read


def load_backbone(backbone: nn.Module, source: Path | str | Mapping[str, Any]) -> list[str]:
    """Load a classifier's weights into a backbone for dense prediction, in place.

    Paper: RepMLPNet Section 5.3, where an ImageNet classifier gets other embeddings between its stages. An embedding
    of another kind than the weights' stays fresh as a whole: its batch norm would have the statistics of a convolution
    that is gone. Where the backbone lacks the classifier, the last batch norm or the last stages, they are ignored.

    backbone: any RepMLPNet; of timm's features_only models, the attribute `model`; a ResNet with RepMLP blocks, see
    load_older_backbone. source: a file of a whole network, or its state dict, in any format that `repmlp.load` knows.
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
