"""ResNets with RepMLP blocks, built on timm's ResNet.

Paper: "RepMLP: Re-parameterizing Convolutions into Fully-connected Layers for Image Recognition" (arXiv 2105.01883),
Sections 3.5 and 4.2. `import repmlp` registers the networks with timm: `timm.create_model("repmlp_res50_224")` and so
on. `repmlp.insert` puts the blocks into a ResNet that a user already has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from repmlp.branches import BranchSpec
from repmlp.key_names import unwrap
from repmlp.models.registered import build_registered
from repmlp.models.repmlp_insertion import insert
from repmlp.older_key_names import convert_older
from repmlp.repmlp_block import RepMLP
from repmlp.sizes import height_width


class RepMLPResNet(ResNet):
    """timm's ResNet with RepMLP blocks in chosen stages.

    Paper: RepMLP Section 4.2. Defaults are its RepMLP-Res50 for 224 pixels: 41,071,144 parameters and 3.950 G
    multiply-accumulates while training, 40,871,528 and 3.891 G with every batch norm folded.

    layers: blocks of the four stages. img_size: pixels, a number or (height, width). stages, block, reductions, groups,
    partition, kernels, global_perceptron, global_reductions, inference_mode: see `insert`.
    resnet: timm's own arguments, such as num_classes, in_chans, output_stride, drop_path_rate, channels, base_width.
    Input (N, in_chans, H, W), output (N, num_classes).
    Raises ValueError as `insert` does.
    """

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 6, 3),
        *,
        img_size: int | tuple[int, int] = 224,
        stages: str | Sequence[str] = ("c3", "c4"),
        block: str = "bottleneck",
        reductions: int | Sequence[int] | None = None,
        groups: int | Sequence[int] = 8,
        partition: int | tuple[int, int] = 7,
        kernels: Iterable[BranchSpec | int | str] = (1, 3, 5),
        global_perceptron: bool = True,
        global_reductions: int | Sequence[int] = 1,
        zero_init_last: bool = True,
        inference_mode: bool = False,
        **resnet: Any,
    ):
        super().__init__(Bottleneck, layers, zero_init_last=zero_init_last, **resnet)
        self.img_size = height_width(img_size)
        insert(
            self,
            img_size,
            stages,
            block=block,
            reductions=reductions,
            groups=groups,
            partition=partition,
            kernels=kernels,
            global_perceptron=global_perceptron,
            global_reductions=global_reductions,
            zero_init_last=zero_init_last,
            inference_mode=inference_mode,
            inplace=True,
        )

    def reparameterize(self) -> None:
        """Merge every RepMLP; the batch norms of the convolutions stay, see repmlp.fold_batch_norms."""
        for module in self.modules():
            if isinstance(module, RepMLP):
                module.reparameterize()


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Bring the older released weights, or ours, into our names; timm calls it with pretrained=True.

    Raises ValueError where the weights are merged or folded and the model is not.
    """
    weights, own = in_our_names(state_dict), model.state_dict()
    if "conv1.bias" in weights and "conv1.bias" not in own:
        raise ValueError("these weights have no batch norms: read them with repmlp.load, which builds such a net")
    merged = [any(name.endswith(".partition_perceptron.bias") for name in names) for names in (weights, own)]
    if merged == [True, False]:
        raise ValueError("these weights are merged and the model is not: create it with inference_mode=True")
    return weights


def in_our_names(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Take a state dict out of the dictionaries and prefixes that training scripts put round it, and rename it."""
    return convert_older(unwrap(state_dict))


def _cfg(img_size: int) -> dict[str, Any]:
    """Describe a variant to timm; evaluation as for timm's ResNets."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, img_size, img_size),
        "pool_size": (-(-img_size // 32), -(-img_size // 32)),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "fixed_input_size": True,
        "license": "mit",
    }


default_cfgs = generate_default_cfgs(
    {
        "repmlp_res50_224": _cfg(224),
        "repmlp_res50_light_224": _cfg(224),
        "repmlp_res50_light_g4_224": _cfg(224),
        "repmlp_res50_g8_8_320": _cfg(320),
        "repmlp_res50_g8_16_320": _cfg(320),
        "repmlp_res50_g4_8_320": _cfg(320),
    }
)


def _create(variant: str, pretrained: bool, variant_kwargs: dict[str, Any], **kwargs: Any) -> RepMLPResNet:
    """Build a variant: its own arguments, changed by those that the user gives."""
    return build_registered(
        RepMLPResNet,
        variant,
        pretrained,
        in_our_names,
        pretrained_filter_fn=checkpoint_filter_fn,
        **{**variant_kwargs, **kwargs},
    )


LARGE = {"partition": 10, "kernels": (1, 3, 5, 7)}  # for 320 pixels  # for 320 pixels


@register_model
def repmlp_res50_224(pretrained: bool = False, **kwargs: Any) -> RepMLPResNet:
    """RepMLP-Res50, g = 8 in c3 and c4: 41.1M parameters, 3.95 G MACs; top-1 on ImageNet 78.55 % (paper)."""
    return _create("repmlp_res50_224", pretrained, {"groups": 8}, **kwargs)


@register_model
def repmlp_res50_light_224(pretrained: bool = False, **kwargs: Any) -> RepMLPResNet:
    """RepMLP-Res50 with Light blocks, g = 8: 58.4M parameters, 3.03 G MACs; top-1 on ImageNet 77.14 % (paper)."""
    return _create("repmlp_res50_light_224", pretrained, {"block": "light", "groups": 8}, **kwargs)


@register_model
def repmlp_res50_light_g4_224(pretrained: bool = False, **kwargs: Any) -> RepMLPResNet:
    """RepMLP-Res50 with Light blocks, g = 4, as in the released file: 87.0M parameters, 3.30 G MACs."""
    return _create("repmlp_res50_light_g4_224", pretrained, {"block": "light", "groups": 4}, **kwargs)


@register_model
def repmlp_res50_g8_8_320(pretrained: bool = False, **kwargs: Any) -> RepMLPResNet:
    """RepMLP-Res50-g8/8 for 320 pixels, g = 8 in c3 and c4: 72.5M parameters, 8.40 G MACs."""
    return _create("repmlp_res50_g8_8_320", pretrained, {**LARGE, "groups": (8, 8)}, **kwargs)


@register_model
def repmlp_res50_g8_16_320(pretrained: bool = False, **kwargs: Any) -> RepMLPResNet:
    """RepMLP-Res50-g8/16 for 320 pixels, g = 8 in c3 and 16 in c4: 59.5M parameters, 8.31 G MACs."""
    return _create("repmlp_res50_g8_16_320", pretrained, {**LARGE, "groups": (8, 16)}, **kwargs)


@register_model
def repmlp_res50_g4_8_320(pretrained: bool = False, **kwargs: Any) -> RepMLPResNet:
    """RepMLP-Res50-g4/8 for 320 pixels, g = 4 in c3 and 8 in c4: 87.9M parameters, 8.85 G MACs."""
    return _create("repmlp_res50_g4_8_320", pretrained, {**LARGE, "groups": (4, 8)}, **kwargs)
