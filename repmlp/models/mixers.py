"""timm's ResMLP and gMLP in the shapes that the papers' tables and our studies need, ready for branches.

Papers: "ResMLP: Feedforward networks for image classification with data-efficient training" (arXiv 2105.03404); "Pay
Attention to MLPs" (arXiv 2105.08050); RepMLPNet (arXiv 2112.11081), Section 5.2, for the branches. The networks are
timm's MlpMixer; `inject_locality` puts branches beside their token-mixing layers: a branch is a convolution with one
channel that all channels share. S12 and S24 are timm's resmlp_12_224 and resmlp_24_224; `import repmlp` registers what
timm lacks beside them. To add one: a row of `default_cfgs` and a function below it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import GatedMlp
from timm.models import generate_default_cfgs, mlp_mixer, register_model
from timm.models.mlp_mixer import MlpMixer
from torch import nn

from repmlp.branches import BranchSpec
from repmlp.injection import inject_locality
from repmlp.models.registered import build_registered
from repmlp.resmlp_key_names import convert_resmlp
from repmlp.sizes import height_width

RESMLP = {"block_layer": mlp_mixer.ResBlock, "mlp_ratio": 4, "norm_layer": mlp_mixer.Affine}
GMLP = {"block_layer": mlp_mixer.SpatialGatingBlock, "mlp_ratio": 6, "mlp_layer": GatedMlp}
CIFAR = {"num_classes": 100, "input_size": (3, 32, 32), "crop_pct": 1.0}


class FlatAffine(mlp_mixer.Affine):
    """timm's alpha * x + beta, its parameters (C,) where timm's are (1, 1, C): no weight decay on 1-D parameters."""

    def __init__(self, dim: int, **kwargs: Any):
        super().__init__(dim, **kwargs)
        # (1, 1, C) -> (C,)
        self.alpha, self.beta = (nn.Parameter(p.detach().flatten()) for p in (self.alpha, self.beta))


def build_resmlp(
    img_size: int | tuple[int, int] = 32,
    patch_size: int = 2,
    depth: int = 12,
    width: int = 256,
    kernels: Sequence[BranchSpec | int | str] = (1, 3),
    *,
    layer_scale: float = 0.1,
    init_std: float = 0.02,
    num_classes: int = 100,
    in_chans: int = 3,
    inference_mode: bool = False,
) -> MlpMixer:
    """Build a ResMLP of any size, with branches, that starts from its paper's initial values instead of timm's.

    Defaults are the reduced ResMLP-12 of RepMLPNet's Table 5: 7,144,292 parameters and 1,812,751,360
    multiply-accumulates without branches.

    img_size, patch_size: pixels; img_size a side, or (height, width). depth: blocks. width: channels.
    kernels: branches, () for none. layer_scale: initial value (0.1 for 12 layers in ResMLP; 1e-5 for 24).
    init_std: standard deviation of the truncated normal that linear weights start from; biases start at 0.
    inference_mode: build the merged form, to load merged weights into.

    Input (N, in_chans, height, width), output (N, num_classes).
    Raises ValueError where the image is no whole number of patches, and as inject_locality does.
    """
    if any(side % patch_size for side in height_width(img_size)):
        raise ValueError(f"img_size={img_size} is no multiple of patch_size={patch_size}")
    with torch.random.fork_rng([]):  # the values that timm draws are drawn anew
        net = MlpMixer(
            num_classes,
            img_size,
            in_chans,
            patch_size,
            depth,
            width,
            **{**RESMLP, **_layer_scale(layer_scale), "norm_layer": FlatAffine},
        )
    _draw(net, () if inference_mode else kernels, init_std)
    return net


def _draw(net: MlpMixer, kernels: Sequence[BranchSpec | int | str], init_std: float) -> None:
    """Inject the branches and draw all initial values of a ResMLP, in place.

    A seed stands for the same training for ever, so the order of the draws must not change: layer by layer torch's own
    values, the branches of a token-mixing layer before it; then the truncated normals, which replace the linear ones.
    """
    for name, module in list(net.named_modules()):
        if name.endswith(".linear_tokens"):
            inject_locality(net, kernels, layers=name, inplace=True)
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.reset_parameters()
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=init_std)
            nn.init.zeros_(module.bias)


def _layer_scale(initial: float) -> dict[str, Any]:
    """Return the block of a ResMLP whose layer scale starts at a value."""
    return {"block_layer": partial(mlp_mixer.ResBlock, init_values=initial)}


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.proj",
        "classifier": "head",
        "fixed_input_size": True,
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "resmlp_12_patch2_32": _cfg(**CIFAR),
        "resmlp_12_patch4_32": _cfg(**CIFAR),
        "gmlp_12_patch4_32": _cfg(**CIFAR),
        "resmlp_big_24_patch16_224": _cfg(),
    }
)


def _create_mixer(variant: str, pretrained: bool, given: Mapping[str, Any], **shape: Any) -> MlpMixer:
    """Build a variant; given: the user's arguments, which go before those of its shape. Weights have timm's names."""
    return build_registered(
        MlpMixer,
        variant,
        pretrained,
        pretrained_filter_fn=mlp_mixer.checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**shape, **given},
    )


@register_model
def resmlp_12_patch2_32(pretrained: bool = False, **kwargs: Any) -> MlpMixer:
    """The reduced ResMLP-12 of RepMLPNet's Table 5, by default without branches; takes what `build_resmlp` takes."""
    return build_registered(
        build_resmlp,
        "resmlp_12_patch2_32",
        pretrained,
        pretrained_filter_fn=lambda state, model: convert_resmlp(state),
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{"kernels": (), **kwargs},
    )


@register_model
def resmlp_12_patch4_32(pretrained: bool = False, **kwargs: Any) -> MlpMixer:
    """ResMLP with 12 blocks of width 192 and 8x8 maps; layer scale starts at 0.1, its paper's value there."""
    shape = {**RESMLP, **_layer_scale(0.1), "patch_size": 4, "num_blocks": 12, "embed_dim": 192}
    return _create_mixer("resmlp_12_patch4_32", pretrained, kwargs, **shape)


@register_model
def gmlp_12_patch4_32(pretrained: bool = False, **kwargs: Any) -> MlpMixer:
    """gMLP with 12 blocks of width 192 and 8x8 maps."""
    return _create_mixer("gmlp_12_patch4_32", pretrained, kwargs, **GMLP, patch_size=4, num_blocks=12, embed_dim=192)


@register_model
def resmlp_big_24_patch16_224(pretrained: bool = False, **kwargs: Any) -> MlpMixer:
    """ResMLP-B24 with patches of 16: 115.7M parameters, 23.0G MACs, as in RepMLPNet's Table 2.

    timm's own resmlp_big_24_224 has patches of 8. Layer scale starts at 1e-6, as there.
    """
    shape = {**RESMLP, **_layer_scale(1e-6), "patch_size": 16, "num_blocks": 24, "embed_dim": 768}
    return _create_mixer("resmlp_big_24_patch16_224", pretrained, kwargs, **shape)
