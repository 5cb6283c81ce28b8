"""RepMLPNet: a hierarchical vision MLP whose spatial layers train with convolution branches.

Paper: "RepMLPNet: Hierarchical Vision MLP with Re-parameterized Locality" (CVPR 2022, arXiv 2112.11081), Section 4.
`import repmlp` registers the six ImageNet variants with timm: `timm.create_model("repmlpnet_t224")` and so on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from repmlp.branches import BranchSpec
from repmlp.key_names import convert, is_foreign
from repmlp.layers import RepMLPBlock
from repmlp.models.registered import build_registered
from repmlp.processor import PRODUCTS
from repmlp.products import bare, by_convolution, convolved
from repmlp.sizes import height_width
from repmlp.tracing import channels_last, readable

torch.fx.wrap("channels_last")  # torch.fx looks in the module that calls it


class ConvBNReLU(nn.Module):
    """A k x k convolution with stride k, batch norm and ReLU: the stem and the down-sampling between stages."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, stride, stride, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class OverlappingEmbedding(nn.Module):
    """A k x k down-sampling in two parts: 1x1 convolution, k x k depth-wise one with stride 2, batch norm, ReLU.

    Paper: RepMLPNet Section 5.3, there in place of the 2x2 embeddings for semantic segmentation, so that neighbouring
    partitions communicate. It is one k x k convolution with kernel[o, i] = depthwise[o] * expand[o, i], decomposed,
    hence one batch norm and one ReLU. The 1x1 takes the multiply-accumulates of the 2x2 embedding with a quarter of its
    parameters; its output, C_out channels at the full resolution, takes memory. Where tiles start at even positions,
    k = 3 reaches into the tiles to the left and above alone; from k = 5 on also into those to the right and below.

    kernel: k, odd.
    Input (N, C_in, H, W), output (N, C_out, ceil(H/2), ceil(W/2)): where H or W is odd, one more than the 2x2 embedding
    gives, which leaves out the last row or column.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int):
        super().__init__()
        self.expand = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.conv = nn.Conv2d(
            out_channels, out_channels, kernel, 2, padding=kernel // 2, groups=out_channels, bias=False
        )
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        # Maps stay channels-last, as everywhere in the net. Forward and backward of 8 maps of 48x48, 32 -> 64 channels,
        # took 4.6 ms on a CPU core where contiguous ones took 8.5 ms (k = 3), and 9.0 where they took 12.9 (k = 5).
        return F.relu(self.norm(self.conv(self.expand(x))))


class FFN(nn.Module):
    """1x1 convolution + BN -> GELU -> 1x1 convolution + BN, written as linear layers over pixels.

    Paper: RepMLPNet Section 4; expansion 4. A 1x1 convolution is a linear layer on each pixel; which of the two is
    faster depends on the processor, see repmlp.products. Input and output (N, C, H, W), channels-last in memory.
    """

    def __init__(self, channels: int, expansion: int = 4):
        super().__init__()
        self.products = PRODUCTS[0]  # see products_by
        self.fc1 = nn.Linear(channels, channels * expansion, bias=False)
        self.norm1 = nn.BatchNorm1d(channels * expansion)
        self.fc2 = nn.Linear(channels * expansion, channels, bias=False)
        self.norm2 = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        # (N, C, H, W) -> (N*H*W, C): a view where the map is channels-last
        x = x.permute(0, 2, 3, 1).reshape(-1, c)
        x = self._second(F.gelu(self.norm1(self._first(x))))
        # (N*H*W, C) -> (N, C, H, W)
        return self.norm2(x).view(n, h, w, c).permute(0, 3, 1, 2)

    def _first(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript skips what stands below this condition alone)
            if by_convolution(self.products, x) and bare(self.fc1):
                return convolved(x, self.fc1.weight)
        return self.fc1(x)

    def _second(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102
            if by_convolution(self.products, x) and bare(self.fc2):
                return convolved(x, self.fc2.weight)
        return self.fc2(x)


class RepMLPNetUnit(nn.Module):
    """y = x + RepMLPBlock(BN(x)); z = y + FFN(BN(y)). Paper: RepMLPNet Figure 2. Input and output (N, C, H, W).

    drop_path: probability that a training image leaves out a residual branch; the two are drawn apart.
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        share_sets: int,
        kernels: Sequence[BranchSpec | int | str],
        *,
        global_perceptron: bool = True,
        drop_path: float = 0.0,
        inference_mode: bool = False,
    ):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.block = RepMLPBlock(
            channels, size, share_sets, kernels, global_perceptron=global_perceptron, inference_mode=inference_mode
        )
        self.norm2 = nn.BatchNorm2d(channels)
        self.ffn = FFN(channels)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(channels_last(self.block(self.norm1(x))))
        return x + self.drop_path(self.ffn(self.norm2(x)))


class RepMLPNet(nn.Module):
    """The hierarchical vision MLP of the paper, for any number of stages, with timm's interface.

    Paper: RepMLPNet Section 4, Table 1. Defaults are the CIFAR-100 net of Table 5: 8,305,284 parameters and
    468,329,472 multiply-accumulates without branches.

    img_size: side of the square image it is trained on, or (height, width), in pixels; multiples of
    stem_stride * 2**(stages - 1). stem_stride: patch size of the stem. channels, blocks, share_sets: one number a
    stage; share_sets[i] divides channels[i]. kernels: branches, () for none. global_perceptron: whether every
    block has one. embed_kernel: None for 2x2 embeddings between stages; an odd k >= 3 for k x k ones that overlap, for
    dense prediction (Section 5.3, see OverlappingEmbedding). num_classes: 0 for no classifier. in_chans: channels of
    the image. global_pool: "avg", or "" to leave the map as it is. drop_rate: dropout before the classifier.
    drop_path_rate: stochastic depth of the last unit; it grows linearly from 0. inference_mode: build the merged form,
    to load merged weights into.

    Input (N, in_chans, H, W), output (N, num_classes). Other image sizes than img_size go through as partitions.
    Raises ValueError where the lengths differ, a map has no whole size, share_sets do not divide the channels, or
    embed_kernel is none of these.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        stem_stride: int = 2,
        channels: Sequence[int] = (128, 256),
        blocks: Sequence[int] = (6, 6),
        share_sets: Sequence[int] = (8, 32),
        kernels: Sequence[BranchSpec | int | str] = (1, 3),
        *,
        global_perceptron: bool = True,
        embed_kernel: int | None = None,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        inference_mode: bool = False,
    ):
        super().__init__()
        if not len(channels) == len(blocks) == len(share_sets):
            raise ValueError(
                f"channels={list(channels)}, blocks={list(blocks)} and share_sets={list(share_sets)} "
                "need one number a stage"
            )
        height, width = height_width(img_size)
        smallest = stem_stride * 2 ** (len(channels) - 1)
        if height % smallest or width % smallest:
            raise ValueError(f"img_size={img_size} is no multiple of {smallest}, the stride of the last stage")
        for name, rate in (("drop_rate", drop_rate), ("drop_path_rate", drop_path_rate)):
            if not 0 <= rate < 1:  # NaN too
                raise ValueError(f"{name}={rate}: use a number from 0 to below 1")
        if embed_kernel is not None:
            number = isinstance(embed_kernel, int) and not isinstance(embed_kernel, bool)
            if not number or embed_kernel < 3 or embed_kernel % 2 == 0:
                raise ValueError(f"embed_kernel={embed_kernel!r}: use None for 2x2 embeddings, or an odd number >= 3")
        self.img_size = (height, width)
        self.in_chans = in_chans
        self.embed_kernel = embed_kernel
        self.grad_checkpointing = False
        self.stem = ConvBNReLU(in_chans, channels[0], stem_stride)
        self.stages = nn.ModuleList()
        self.downsamples = nn.ModuleList()
        self.feature_info: list[dict[str, Any]] = []
        units_before = 0
        for i, (features, depth, sets) in enumerate(zip(channels, blocks, share_sets, strict=True)):
            stride = stem_stride * 2**i
            if i:
                self.downsamples.append(
                    OverlappingEmbedding(channels[i - 1], features, embed_kernel)
                    if embed_kernel
                    else ConvBNReLU(channels[i - 1], features, 2)
                )
            units = (
                RepMLPNetUnit(
                    features,
                    (height // stride, width // stride),
                    sets,
                    kernels,
                    global_perceptron=global_perceptron,
                    drop_path=drop_path_rate * (units_before + j) / max(1, sum(blocks) - 1),
                    inference_mode=inference_mode,
                )
                for j in range(depth)
            )
            self.stages.append(nn.Sequential(*units))
            self.feature_info.append({"num_chs": features, "reduction": stride, "module": f"stages.{i}"})
            units_before += depth
        self.norm = nn.BatchNorm2d(channels[-1])
        self.num_features = self.head_hidden_size = channels[-1]
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def get_classifier(self) -> nn.Module:
        """Return the last layer, an Identity where there is no classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer by a fresh one; num_classes: 0 for none. global_pool: "avg", "" or None to keep it.

        Raises ValueError for another kind of pooling, or for a classifier without pooling.
        """
        if global_pool is not None:
            if global_pool not in ("", "avg"):
                raise ValueError(f"global_pool={global_pool!r}: use 'avg', or '' for none")
            self.global_pool = global_pool
        if num_classes and not self.global_pool:
            raise ValueError(f"num_classes={num_classes} needs global_pool='avg': there is nothing to classify")
        self.num_classes = num_classes
        like = self.norm.weight if isinstance(self.norm, nn.BatchNorm2d) else self.stem.conv.weight
        self.head = (
            nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: keep the input of every unit alone and compute the rest again."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return regular expressions that sort parameters by depth, by stage (coarse) or by unit; see timm.

        As in timm's own hierarchical nets, a down-sampling goes with the first unit of the stage that it opens.
        """
        return {
            "stem": r"^stem",
            "blocks": [
                (r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)", None),
                *((rf"^downsamples\.{i}\.", (i + 1,) if coarse else (i + 1, 0)) for i in range(len(self.downsamples))),
                (r"^norm", (99999,)),
            ],
        }

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps of chosen stages, each taken before the down-sampling that follows it.

        x: (N, in_chans, H, W). indices: stages; a number for that many last ones, None for all. norm: apply the last
        batch norm to the last stage's map. stop_early: leave out the stages after the last chosen one.
        Returns (N, C_i, H/stride_i, W/stride_i) for each, and before that forward_features() unless intermediates_only.
        Raises ValueError for an output_fmt other than "NCHW".
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt={output_fmt!r}: RepMLPNet has maps, use 'NCHW'")
        take, last = feature_take_indices(len(self.stages), indices)
        x = self.stem(channels_last(x))
        maps = []
        final = len(self.feature_info) - 1
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = self._stage(i, stage, x)
            if i in take:
                maps.append(self.norm(x) if norm and i == final else x)
        if intermediates_only:
            return maps
        return (self.norm(x) if i == final else x), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps of the chosen stages do not need; returns the stages, counted from 0."""
        take, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        self.downsamples = self.downsamples[:last]
        cut = last < len(self.feature_info) - 1
        if cut:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm or cut:
            self.norm = nn.Identity()
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take

    def _stage(self, i: int, stage: nn.Sequential, x: Tensor) -> Tensor:
        """(N, C_before, H, W) -> (N, C_i, H/2, W/2): down-sampling (not before the first stage) and the units."""
        if i:
            x = self.downsamples[i - 1](x)
        if not (self.grad_checkpointing and self.training and torch.is_grad_enabled()):
            return stage(x)
        for unit in stage:
            x = checkpoint(unit, x, use_reentrant=False, context_fn=partial(_contexts, unit))
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> the last stage's map after its batch norm, (N, C, H/stride, W/stride)."""
        x = self.stem(channels_last(x))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for i, stage in enumerate(self.stages):
                x = self._stage(i, stage, x)
        else:
            for i, stage in enumerate(self.stages):
                for j, downsample in enumerate(self.downsamples):  # TorchScript knows no self.downsamples[i - 1]
                    if j + 1 == i:
                        x = downsample(x)
                x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, C, H, W) -> (N, num_classes), or what the classifier sees, (N, C), with pre_logits."""
        if self.global_pool == "avg":
            x = x.mean(dim=(2, 3))
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    @readable
    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights as torch does, and those in any format that `key_names.convert` knows (timm's checkpoint_path).

        Raises ValueError where they are of another image size.
        """
        if is_foreign(state_dict):
            state_dict = checkpoint_filter_fn(state_dict, self)
        own = self.state_dict()
        for name, tensor in state_dict.items():
            here = own.get(name)
            # (S, h*w, h*w): the same layer of a network for another image size
            if here is None or not name.endswith(".channel_perceptron.weight"):
                continue
            if tensor.shape[:1] == here.shape[:1] and tensor.shape != here.shape:
                raise ValueError(
                    f"{name} is {tuple(tensor.shape)} there and {tuple(here.shape)} here: the weights are of a "
                    f"network for another image size than {self.img_size}; build that one and repmlp.resize it"
                )
        return super().load_state_dict(state_dict, strict, assign)

    def reparameterize(self) -> None:
        """Merge every block; see SetSharingFC.reparameterize. Does nothing the second time."""
        for module in self.modules():
            if isinstance(module, RepMLPBlock):
                module.reparameterize()


def _contexts(unit: nn.Module) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """Return what surrounds a checkpointed unit's first computation, and its second one in the backward pass."""
    return contextlib.nullcontext(), _statistics_untouched(unit)


@contextlib.contextmanager
def _statistics_untouched(module: nn.Module) -> Iterator[None]:
    """Let batch norms count the batch in copies: computed again, it would enter the running statistics twice.

    Copies, because checkpoint() wants the same tensors saved both times: without running statistics there are fewer.
    """
    buffers = [(m, *b) for m in module.modules() if isinstance(m, _BatchNorm) for b in m.named_buffers(recurse=False)]
    for norm, name, buffer in buffers:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in buffers:
            setattr(norm, name, buffer)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Bring weights of any format that `key_names.convert` knows into ours; timm calls it with pretrained=True."""
    weights = convert(state_dict)
    merged = {
        key: any(name.endswith(".channel_perceptron.bias") for name in names)
        for key, names in (("weights", weights), ("model", model.state_dict()))
    }
    if merged["weights"] and not merged["model"]:
        raise ValueError("these weights are merged and the model is not: create it with inference_mode=True")
    return weights


def _cfg(img_size: int) -> dict[str, Any]:
    """Describe a variant to timm; evaluation as in the released script: resize to the input size, crop nothing."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, img_size, img_size),
        "pool_size": (img_size // 32, img_size // 32),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        "classifier": "head",
        "fixed_input_size": True,
        "license": "mit",
    }


default_cfgs = generate_default_cfgs(
    {
        "repmlpnet_t224": _cfg(224),
        "repmlpnet_b224": _cfg(224),
        "repmlpnet_t256": _cfg(256),
        "repmlpnet_b256": _cfg(256),
        "repmlpnet_d256": _cfg(256),
        "repmlpnet_l256": _cfg(256),
    }
)


def _create(variant: str, pretrained: bool, variant_kwargs: dict[str, Any], **kwargs: Any) -> RepMLPNet:
    """Build a variant: its own arguments, changed by those that the user gives."""
    if kwargs.get("features_only"):
        kwargs.setdefault("out_indices", tuple(range(len(variant_kwargs["blocks"]))))
    return build_registered(
        RepMLPNet,
        variant,
        pretrained,
        convert,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"feature_cls": "getter"},
        **{"stem_stride": 4, **variant_kwargs, **kwargs},
    )


@register_model
def repmlpnet_t224(pretrained: bool = False, **kwargs: Any) -> RepMLPNet:
    """RepMLPNet-T224: 38.3M parameters, 2.8G MACs; top-1 on ImageNet 76.4 % (paper), 76.62 % (released weights)."""
    shape = {"channels": (64, 128, 256, 512), "blocks": (2, 2, 6, 2), "share_sets": (1, 4, 16, 128)}
    return _create("repmlpnet_t224", pretrained, shape, **kwargs)


@register_model
def repmlpnet_b224(pretrained: bool = False, **kwargs: Any) -> RepMLPNet:
    """RepMLPNet-B224: 68.2M parameters, 6.7G MACs; top-1 on ImageNet 80.1 % (paper), 80.32 % (released weights)."""
    shape = {"channels": (96, 192, 384, 768), "blocks": (2, 2, 12, 2), "share_sets": (1, 4, 32, 128)}
    return _create("repmlpnet_b224", pretrained, shape, **kwargs)


@register_model
def repmlpnet_t256(pretrained: bool = False, **kwargs: Any) -> RepMLPNet:
    """RepMLPNet-T256: 58.7M parameters, 4.2G MACs; top-1 on ImageNet 77.5 % (paper), 77.44 % (released weights)."""
    shape = {"channels": (64, 128, 256, 512), "blocks": (2, 2, 6, 2), "share_sets": (1, 4, 16, 128)}
    return _create("repmlpnet_t256", pretrained, shape, **kwargs)


@register_model
def repmlpnet_b256(pretrained: bool = False, **kwargs: Any) -> RepMLPNet:
    """RepMLPNet-B256: 96.5M parameters, 9.6G MACs; top-1 on ImageNet 81.0 % (paper), 81.03 % (released weights)."""
    shape = {"channels": (96, 192, 384, 768), "blocks": (2, 2, 12, 2), "share_sets": (1, 4, 32, 128)}
    return _create("repmlpnet_b256", pretrained, shape, **kwargs)


@register_model
def repmlpnet_d256(pretrained: bool = False, **kwargs: Any) -> RepMLPNet:
    """RepMLPNet-D256: 86.9M parameters, 8.6G MACs; top-1 on ImageNet 80.8 % (paper), 80.83 % (released weights)."""
    shape = {"channels": (80, 160, 320, 640), "blocks": (2, 2, 18, 2), "share_sets": (1, 4, 16, 128)}
    return _create("repmlpnet_d256", pretrained, shape, **kwargs)


@register_model
def repmlpnet_l256(pretrained: bool = False, **kwargs: Any) -> RepMLPNet:
    """RepMLPNet-L256: 117.7M parameters, 11.6G MACs; top-1 on ImageNet 81.7 % (paper), 81.68 % (released weights)."""
    shape = {"channels": (96, 192, 384, 768), "blocks": (2, 2, 18, 2), "share_sets": (1, 4, 32, 256)}
    return _create("repmlpnet_l256", pretrained, shape, **kwargs)
