"""RepMLPNet: a hierarchical vision MLP whose spatial layers train with convolution branches.

Paper: "RepMLPNet: Hierarchical Vision MLP with Re-parameterized Locality" (CVPR 2022, arXiv 2112.11081), Section 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repmlp.layers import RepMLPBlock


class ConvBNReLU(nn.Module):
    """A k x k convolution with stride k, batch norm and ReLU: the stem and the down-sampling between stages."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, stride, stride, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class FFN(nn.Module):
    """1x1 convolution + BN -> GELU -> 1x1 convolution + BN, written as linear layers over pixels.

    Paper: RepMLPNet Section 4; expansion 4. A 1x1 convolution is a linear layer on each pixel; as one it runs about
    1.5 times faster on a CPU. Input and output (N, C, H, W), channels-last in memory.
    """

    def __init__(self, channels: int, expansion: int = 4):
        super().__init__()
        self.fc1 = nn.Linear(channels, channels * expansion, bias=False)
        self.norm1 = nn.BatchNorm1d(channels * expansion)
        self.fc2 = nn.Linear(channels * expansion, channels, bias=False)
        self.norm2 = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        # (N, C, H, W) -> (N*H*W, C): a view where the map is channels-last
        x = x.permute(0, 2, 3, 1).reshape(-1, c)
        x = F.gelu(self.norm1(self.fc1(x)))
        x = self.norm2(self.fc2(x))
        # (N*H*W, C) -> (N, C, H, W)
        return x.view(n, h, w, c).permute(0, 3, 1, 2)


class RepMLPNetUnit(nn.Module):
    """y = x + RepMLPBlock(BN(x)); z = y + FFN(BN(y)). Paper: RepMLPNet Figure 2. Input and output (N, C, H, W)."""

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        share_sets: int,
        kernels: Sequence[int],
        *,
        global_perceptron: bool = True,
        inference_mode: bool = False,
    ):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.block = RepMLPBlock(
            channels, size, share_sets, kernels, global_perceptron=global_perceptron, inference_mode=inference_mode
        )
        self.norm2 = nn.BatchNorm2d(channels)
        self.ffn = FFN(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.block(self.norm1(x)).contiguous(memory_format=torch.channels_last)
        return x + self.ffn(self.norm2(x))


class RepMLPNet(nn.Module):
    """The hierarchical vision MLP of the paper, for any number of stages.

    Paper: RepMLPNet Section 4, Table 1. Defaults are the CIFAR-100 net of Table 5: 8,305,284 parameters and
    468,329,472 multiply-accumulates without branches.

    img_size: side of the square image it is trained on, in pixels; a multiple of stem_stride * 2**(stages - 1).
    stem_stride: patch size of the stem. channels, blocks, share_sets: one number a stage; share_sets[i] divides
    channels[i]. kernels: branch sizes, () for none. global_perceptron: whether every block has one.
    inference_mode: build the merged form, to load merged weights into.

    Input (N, in_chans, H, W), output (N, num_classes). Other image sizes than img_size go through as partitions.
    Raises ValueError where the lengths differ, a map has no whole size, or share_sets do not divide the channels.
    """

    def __init__(
        self,
        img_size: int = 32,
        stem_stride: int = 2,
        channels: Sequence[int] = (128, 256),
        blocks: Sequence[int] = (6, 6),
        share_sets: Sequence[int] = (8, 32),
        kernels: Sequence[int] = (1, 3),
        *,
        global_perceptron: bool = True,
        num_classes: int = 100,
        in_chans: int = 3,
        inference_mode: bool = False,
    ):
        super().__init__()
        if not len(channels) == len(blocks) == len(share_sets):
            raise ValueError(
                f"channels={list(channels)}, blocks={list(blocks)} and share_sets={list(share_sets)} "
                "need one number a stage"
            )
        smallest = stem_stride * 2 ** (len(channels) - 1)
        if img_size % smallest:
            raise ValueError(f"img_size={img_size} is no multiple of {smallest}, the stride of the last stage")
        self.num_classes = num_classes
        self.stem = ConvBNReLU(in_chans, channels[0], stem_stride)
        self.stages = nn.ModuleList()
        self.downsamples = nn.ModuleList()
        side = img_size // stem_stride
        for i, (width, depth, sets) in enumerate(zip(channels, blocks, share_sets, strict=True)):
            if i:
                self.downsamples.append(ConvBNReLU(channels[i - 1], width, 2))
                side //= 2
            units = (
                RepMLPNetUnit(
                    width,
                    (side, side),
                    sets,
                    kernels,
                    global_perceptron=global_perceptron,
                    inference_mode=inference_mode,
                )
                for _ in range(depth)
            )
            self.stages.append(nn.Sequential(*units))
        self.norm = nn.BatchNorm2d(channels[-1])
        self.head = nn.Linear(channels[-1], num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> the last stage's map after its batch norm, (N, C, H/stride, W/stride)."""
        x = self.stem(x.contiguous(memory_format=torch.channels_last))
        for i, stage in enumerate(self.stages):
            if i:
                x = self.downsamples[i - 1](x)
            x = stage(x)
        return self.norm(x)

    def forward_head(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, num_classes)."""
        return self.head(x.mean(dim=(2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def reparameterize(self) -> None:
        """Merge every block; see SetSharingFC.reparameterize. Does nothing the second time."""
        for module in self.modules():
            if isinstance(module, RepMLPBlock):
                module.reparameterize()
