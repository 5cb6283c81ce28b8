"""ResMLP whose spatial layer takes convolution branches, and the ResMLP-B24 that timm lacks.

Papers: "ResMLP: Feedforward networks for image classification with data-efficient training" (arXiv 2105.03404);
RepMLPNet (arXiv 2112.11081), Section 5.2, for the branches. Its spatial layer is a set-sharing FC with one share-set,
so a branch is a convolution with ONE channel that all channels share. S12 and S24 are timm's resmlp_12_224 and
resmlp_24_224; `import repmlp` registers the paper's B24 beside them. `inject_locality` puts branches into all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, mlp_mixer, register_model
from torch import Tensor, nn

from repmlp.branches import BranchSpec
from repmlp.layers import SetSharingFC


class Affine(nn.Module):
    """alpha * x + beta per channel; input and output (..., C)."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.beta, self.alpha, x)


class ResMLPBlock(nn.Module):
    """x + scale1 * spatial(affine1(x)), then x + scale2 * mlp(affine2(x)). Input and output (N, h*w, C)."""

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        kernels: Sequence[BranchSpec | int | str],
        *,
        layer_scale: float,
        expansion: int = 4,
        inference_mode: bool = False,
    ):
        super().__init__()
        self.norm1 = Affine(channels)
        self.spatial = SetSharingFC(size, 1, kernels, bias=True, norm=False, inference_mode=inference_mode)
        self.norm2 = Affine(channels)
        self.fc1 = nn.Linear(channels, channels * expansion)
        self.fc2 = nn.Linear(channels * expansion, channels)
        self.scale1 = nn.Parameter(torch.full((channels,), float(layer_scale)))
        self.scale2 = nn.Parameter(torch.full((channels,), float(layer_scale)))

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, c = x.shape
        # (N, h*w, C) -> (N, C, h, w) -> (N, h*w, C)
        mixed = self.spatial(self.norm1(x).transpose(1, 2).reshape(n, c, *self.spatial.size))
        x = x + self.scale1 * mixed.view(n, c, tokens).transpose(1, 2)
        return x + self.scale2 * self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ResMLP(nn.Module):
    """ResMLP with optional branches beside its spatial layers.

    Defaults are the reduced ResMLP-12 of RepMLPNet's Table 5: 7,144,292 parameters and 1,812,751,360
    multiply-accumulates without branches.

    img_size, patch_size: pixels; the map is (img_size/patch_size) squared. depth: blocks. width: channels.
    kernels: branches, () for none. layer_scale: initial value (0.1 for 12 layers in ResMLP; 1e-5 for 24).
    init_std: standard deviation of the truncated normal that linear weights start from; biases start at 0.
    inference_mode: build the merged form, to load merged weights into.

    Input (N, in_chans, img_size, img_size), output (N, num_classes).
    Raises ValueError where the image is no whole number of patches, here or in forward().
    """

    def __init__(
        self,
        img_size: int = 32,
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
    ):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"img_size={img_size} is no multiple of patch_size={patch_size}")
        self.num_classes = num_classes
        self.size = (img_size // patch_size, img_size // patch_size)
        self.patch_embed = nn.Conv2d(in_chans, width, patch_size, patch_size)
        self.blocks = nn.Sequential(
            *(
                ResMLPBlock(width, self.size, kernels, layer_scale=layer_scale, inference_mode=inference_mode)
                for _ in range(depth)
            )
        )
        self.norm = Affine(width)
        self.head = nn.Linear(width, num_classes)
        # ResMLP's initial values: every fully-connected weight, the spatial ones too
        for module in self.modules():
            if isinstance(module, (nn.Linear, SetSharingFC)):
                nn.init.trunc_normal_(module.weight, std=init_std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, h*w, C), after the last affine layer."""
        x = self.patch_embed(x)
        if tuple(x.shape[-2:]) != self.size:
            raise ValueError(f"ResMLP was built for maps of {self.size} patches, got {tuple(x.shape[-2:])}")
        # (N, C, h, w) -> (N, h*w, C)
        return self.norm(self.blocks(x.flatten(2).transpose(1, 2).contiguous()))

    def forward_head(self, x: Tensor) -> Tensor:
        """(N, h*w, C) -> (N, num_classes)."""
        return self.head(x.mean(dim=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def reparameterize(self) -> None:
        """Merge every spatial layer; see SetSharingFC.reparameterize. Does nothing the second time."""
        for block in self.blocks:
            block.spatial.reparameterize()


default_cfgs = generate_default_cfgs(
    {
        "resmlp_big_24_patch16_224": {
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
        }
    }
)


@register_model
def resmlp_big_24_patch16_224(pretrained: bool = False, **kwargs: Any) -> mlp_mixer.MlpMixer:
    """ResMLP-B24 with patches of 16: 115.7M parameters, 23.0G MACs, as in RepMLPNet's Table 2.

    timm's own resmlp_big_24_224 has patches of 8. layer scale starts at 1e-6, as there.
    """
    shape = {"patch_size": 16, "num_blocks": 24, "embed_dim": 768, "mlp_ratio": 4, "norm_layer": mlp_mixer.Affine}
    block = partial(mlp_mixer.ResBlock, init_values=1e-6)
    return build_model_with_cfg(
        mlp_mixer.MlpMixer, "resmlp_big_24_patch16_224", pretrained, **{**shape, "block_layer": block, **kwargs}
    )
