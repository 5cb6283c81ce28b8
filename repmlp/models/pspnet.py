"""PSPNet on a ResNet whose last maps are an eighth of the image: the network of the older paper's Cityscapes rows.

Paper: RepMLP (arXiv 2105.01883), Section 4.4 and Table 5. The head is solved for from the printed "FLOPs": with
ResNet-50 at 713x713 it comes to the printed 350,004M (350,004,969,152) multiply-accumulates, and with the body's batch
norms folded to the printed 46.56M parameters. segmentation_models.pytorch's PSPNet is another network: it cuts the
encoder at an eighth of the image and has a 1x1 bottleneck.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repmlp.branches import BranchSpec
from repmlp.models.from_timm import build_timm
from repmlp.tracing import readable


class PyramidPooling(nn.Module):
    """The map, and beside it what averages over grids of a few cells say, brought to fewer channels and back in size.

    Paper: RepMLP Section 4.4, of PSPNet: for each grid average pooling -> 1x1 convolution to C/len(bins) channels -> BN
    -> ReLU -> bilinear interpolation.

    channels: C, a multiple of the number of grids. bins: cells of a grid's side.
    Input (N, C, H, W), output (N, 2C, H, W).
    Raises ValueError where the grids do not divide the channels.
    """

    def __init__(self, channels: int, bins: Sequence[int] = (1, 2, 3, 6)):
        super().__init__()
        if not bins or channels % len(bins):
            raise ValueError(f"bins={list(bins)}: {len(bins)} grids do not divide {channels} channels")
        self.bins = tuple(bins)
        self.convs = nn.ModuleList(_conv_bn_relu(channels, channels // len(bins), 1) for _ in bins)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for i, conv in enumerate(self.convs):
            pooled = conv(F.adaptive_avg_pool2d(x, self.bins[i]))
            maps.append(F.interpolate(pooled, size=x.shape[2:], mode="bilinear", align_corners=False))
        return torch.cat(maps, dim=1)


class PSPNet(nn.Module):
    """Backbone -> pyramid pooling -> 3x3 convolution to 512 channels + BN + ReLU -> 1x1 convolution to the classes.

    Paper: RepMLP Section 4.4. No auxiliary head. The result is interpolated bilinearly to the size of the image.

    backbone: a timm network with forward_features() and num_features, without a classifier. num_classes: of the pixels.
    bins: see PyramidPooling. channels: between the last two convolutions. drop_rate: dropout of whole channels there.
    Input (N, in_chans, H, W), output (N, num_classes, H, W).
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int = 19,
        *,
        bins: Sequence[int] = (1, 2, 3, 6),
        channels: int = 512,
        drop_rate: float = 0.0,
    ):
        super().__init__()
        self.num_classes, self.backbone = num_classes, backbone
        self.pooling = PyramidPooling(backbone.num_features, bins)
        self.bottleneck = _conv_bn_relu(2 * backbone.num_features, channels, 3)
        self.drop = nn.Dropout2d(drop_rate)
        self.head = nn.Conv2d(channels, num_classes, 1)

    @readable
    def forward(self, x: Tensor) -> Tensor:
        maps = self.head(self.drop(self.bottleneck(self.pooling(self.backbone.forward_features(x)))))
        return F.interpolate(maps, size=x.shape[2:], mode="bilinear", align_corners=False)

    def with_auxiliary(self, images: Tensor) -> tuple[Tensor, None]:
        """Return the logits, and None for those of an auxiliary head, as a segmentation network is trained here."""
        return self(images), None


def build_pspnet(
    encoder: str = "resnet50",
    img_size: int | tuple[int, int] = 713,
    kernels: Iterable[BranchSpec | int | str] = (),
    *,
    num_classes: int = 19,
    output_stride: int = 8,
    decoder_channels: int = 512,
    arguments: Mapping[str, Any] | None = None,
    inference_mode: bool = False,
) -> PSPNet:
    """Build PSPNet on a timm ResNet by its name, untrained.

    Paper: RepMLP Section 4.4: "resnet50", or "repmlp_res50_g4_8_320" with kernels (1, 3, 5, 7) and arguments
    {"global_reductions": (4, 8)}, whose dilation is in c5 alone; `repmlp.load_older_backbone` puts weights for 320
    pixels into it.

    encoder: timm name. img_size: pixels; a ResNet with RepMLP blocks takes images of this size alone. kernels: branches
    of its RepMLPs, () for none. num_classes: of the pixels. output_stride: of the last map, 8 or 16. decoder_channels:
    between the last two convolutions. arguments: more of the encoder's. inference_mode: build the merged form.
    Raises ValueError as `build_timm` and the encoder do.
    """
    more = {"output_stride": output_stride, "global_pool": "", **(arguments or {})}
    backbone = build_timm(
        encoder, kernels, img_size=img_size, num_classes=0, inference_mode=inference_mode, arguments=more
    )
    return PSPNet(backbone, num_classes, channels=decoder_channels)


def _conv_bn_relu(in_channels: int, out_channels: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )
