"""Parameters, MACs and structure of the networks in the paper's tables, counted on networks that hold no numbers."""

from __future__ import annotations

from functools import cache
from typing import Any

import timm
import torch

from paper_tables.configurations import DATA_SETS, MODELS
from repmlp import RepMLPBlock, build_model
from repmlp.cost import count_macs, count_params, count_params_layers, count_params_paper


@cache
def counts(
    name: str, classes: int, kernels: tuple[int, ...], share_sets: tuple[int, ...], gate: bool | None
) -> tuple[int, int, int]:
    """Count (params, params by the paper's rule for ResMLP, MACs) of the training-time net of a row of the paper."""
    config: dict[str, Any] = {**MODELS[name], "kernels": list(kernels)}
    if share_sets:
        config |= {"share_sets": list(share_sets), "global_perceptron": gate}
    with torch.device("meta"):
        model = build_model(config, classes).eval()
    return count_params(model), count_params_paper(model), count_macs(model, config["img_size"])


@cache
def timm_counts(name: str, img_size: int) -> tuple[int, int]:
    """Count a timm model as the paper's Table 2 does: (params, MACs).

    RepMLPNet is counted merged, and its params without those of norms; any other net as it is.
    """
    ours = name.startswith("repmlpnet")
    given = {"img_size": img_size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    with torch.device("meta"):
        model = timm.create_model(name, **given, **({"inference_mode": True} if ours else {})).eval()
    return count_params_layers(model) if ours else count_params(model), count_macs(model, img_size)


@cache
def variant_counts(name: str, img_size: int) -> tuple[int, int, int]:
    """Count a variant of RepMLPNet: (params while training, params merged, MACs while training)."""
    with torch.device("meta"):
        model, merged = (timm.create_model(name, inference_mode=form).eval() for form in (False, True))
    return count_params(model), count_params(merged), count_macs(model, img_size)


@cache
def structure(name: str) -> dict[str, str]:
    """Read off a variant what Table 1 prints of it: channels, blocks, sizes of maps and share-sets, per stage."""
    with torch.device("meta"):
        model = timm.create_model(name)
    first = [
        next(m for m in stage.modules() if isinstance(m, RepMLPBlock)).channel_perceptron for stage in model.stages
    ]
    return {
        "channels": " ".join(str(info["num_chs"]) for info in model.feature_info),
        "blocks": " ".join(str(len(stage)) for stage in model.stages),
        "maps": " ".join(str(fc.size[0]) for fc in first),
        "share_sets": " ".join(str(fc.share_sets) for fc in first),
    }


@cache
def upernet_counts(name: str, size: tuple[int, int]) -> tuple[int, int]:
    """Count (params, MACs of one image of `size` pixels) of a row's net, merged and without the auxiliary head.

    Raises ModuleNotFoundError without segmentation_models.pytorch.
    """
    with torch.device("meta"):
        model = build_model(
            {**MODELS[name], "auxiliary_channels": 0}, DATA_SETS["cityscapes"]["classes"], inference_mode=True
        )
    return count_params(model), count_macs(model, size)
