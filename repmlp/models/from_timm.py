"""Any network of timm's by its name, with branches put into it where it is not one of ours."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import timm
from torch import nn

from repmlp.branches import BranchSpec, values
from repmlp.injection import inject_locality
from repmlp.models.repmlp_resnet import RepMLPResNet
from repmlp.models.repmlpnet import RepMLPNet


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
    try:
        return inject_locality(model, () if inference_mode else kernels, inplace=True)
    except ValueError as error:
        if not kernels:  # a network of any kind
            return model
        raise ValueError(f"{variant} takes no branches, use kernels=[]: {error}") from error
