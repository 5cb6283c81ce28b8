"""Two of timm's MLPs at the size of CIFAR images, to put branches into: networks that are not ours.

`import repmlp` registers them with timm, whose own ResMLP and gMLP take no other patches, depth or width. Patches of 4
pixels, 8x8 maps. `inject_locality` puts branches into both.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import GatedMlp
from timm.models import build_model_with_cfg, generate_default_cfgs, mlp_mixer, register_model

SHAPE = {"img_size": 32, "patch_size": 4, "num_blocks": 12, "embed_dim": 192}
CFG = {
    "url": "",
    "num_classes": 100,
    "input_size": (3, 32, 32),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": "stem.proj",
    "classifier": "head",
    "fixed_input_size": True,
}
default_cfgs = generate_default_cfgs({"resmlp_12_patch4_32": CFG, "gmlp_12_patch4_32": CFG})


@register_model
def resmlp_12_patch4_32(pretrained: bool = False, **kwargs: Any) -> mlp_mixer.MlpMixer:
    """ResMLP (arXiv 2105.03404) with 12 blocks of width 192; layer scale starts at 0.1, its paper's value there."""
    parts = {"mlp_ratio": 4, "norm_layer": mlp_mixer.Affine, "num_classes": 100}
    block = partial(mlp_mixer.ResBlock, init_values=0.1)
    return build_model_with_cfg(
        mlp_mixer.MlpMixer, "resmlp_12_patch4_32", pretrained, **{**SHAPE, **parts, "block_layer": block, **kwargs}
    )


@register_model
def gmlp_12_patch4_32(pretrained: bool = False, **kwargs: Any) -> mlp_mixer.MlpMixer:
    """gMLP (arXiv 2105.08050) with 12 blocks of width 192."""
    parts = {"mlp_ratio": 6, "mlp_layer": GatedMlp, "block_layer": mlp_mixer.SpatialGatingBlock, "num_classes": 100}
    return build_model_with_cfg(mlp_mixer.MlpMixer, "gmlp_12_patch4_32", pretrained, **{**SHAPE, **parts, **kwargs})
