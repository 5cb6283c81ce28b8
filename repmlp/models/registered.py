"""What all networks that this package registers with timm do alike when they are created."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from timm.models import build_model_with_cfg, get_pretrained_cfg, load_state_dict
from torch import nn

from repmlp.sizes import height_width


def build_registered(
    kind: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    renamed: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    **kwargs: Any,
) -> nn.Module:
    """Build a variant by timm's own function, with two things that it leaves to its caller.

    A file of weights that the configuration names keeps its classifier where the network has as many classes: timm
    looks at the configuration alone, whose number is ImageNet's. And `timm.data.resolve_model_data_config` tells the
    images of the network that was built, not of the variant.

    kind: class or function that makes the network. renamed: brings the names of a file into the network's.
    kwargs: for timm's function and for `kind`.
    """
    overlay = kwargs.get("pretrained_cfg_overlay") or {}
    if pretrained and overlay.get("file") and "num_classes" not in overlay:
        head = f"{get_pretrained_cfg(variant).classifier}.weight"
        tensors = renamed(load_state_dict(overlay["file"], weights_only=True))
        if head in tensors:
            kwargs["pretrained_cfg_overlay"] = {**overlay, "num_classes": len(tensors[head])}
    given = kwargs.get("img_size")
    if given is not None:  # numpy's numbers and the like as Python's; a side stays one, so that messages name it
        asked = height_width(given)
        kwargs["img_size"] = asked if isinstance(given, (tuple, list)) else asked[0]
    model = build_model_with_cfg(kind, variant, pretrained, **kwargs)
    channels, *size = model.pretrained_cfg["input_size"]
    built = (kwargs.get("in_chans") or channels, *(size if given is None else asked))
    model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "input_size": built}
    return model
