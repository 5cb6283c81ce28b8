"""Build a network from a plain configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from timm.utils import reparameterize_model
from torch import nn

from repmlp.injection import InjectedLinear
from repmlp.layers import SetSharingFC
from repmlp.models.from_timm import build_timm
from repmlp.models.mixers import build_resmlp
from repmlp.models.pspnet import build_pspnet
from repmlp.models.repmlp_pure import PureMLP
from repmlp.models.repmlpnet import RepMLPNet
from repmlp.models.upernet import build_upernet

SPATIAL_LAYERS = (SetSharingFC, InjectedLinear)  # layers over a map that have branches, `size` and `merged()`


ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {
    "pspnet": build_pspnet,
    "repmlpnet": RepMLPNet,
    "repmlp_pure": PureMLP,
    "resmlp": build_resmlp,
    "timm": build_timm,
    "upernet": build_upernet,
}
PIXELS = ("pspnet", "upernet")  # those that tell the classes of pixels, not of whole images


def build_model(config: Mapping[str, Any], num_classes: int = 100, inference_mode: bool = False) -> nn.Module:
    """Build the network that `config` describes: {"arch": one of ARCHITECTURES, ...its arguments}.

    "name" is a label, "weights" and "backbone" say what it started from; none of them is looked at.

    >>> net = build_model({"arch": "repmlpnet", "channels": [32, 64], "blocks": [3, 3], "share_sets": [4, 16]}, 10)
    >>> net = build_model({"arch": "timm", "variant": "resmlp_12_224", "kernels": [1, 3]}, num_classes=1000)

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
