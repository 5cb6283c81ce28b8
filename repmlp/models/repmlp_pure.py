"""The pure MLP of the older paper for small images, and the networks that it is compared with.

Paper: RepMLP (arXiv 2105.01883), Section 4.1 and Table 1. The sequence of layers stands in a figure there; the one here
is solved for from the printed "FLOPs", which it meets: 52,806,272 multiply-accumulates (52.8M), and with 3x3
convolutions of width 32, 64, 128 in the place of RepMLPs 65,111,296 (65.1M). Where the 1x1 layer that keeps the width
stands is not unique by the counts, and the sizes of the branches are assumed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repmlp.branches import BranchSpec
from repmlp.parameters import batch_norm_stats, check_parameters, set_parameter
from repmlp.reparam import fuse_bn
from repmlp.repmlp_block import GroupLocalPerceptron, RepMLP, check_partition_kernels
from repmlp.sizes import height_width
from repmlp.tracing import readable

SPATIAL = ("repmlp", "fc3_conv", "conv")


class PartitionConv(nn.Module):
    """What a RepMLP has in the place of its Partition Perceptron to ask what FC3 is good for: one large convolution.

    Paper: RepMLP Section 4.1, "FC3 as a 9x9 convolution". It acts on partitions with zeros round them, group by group,
    as FC3 does, with a batch norm of O channels; the branches stand beside it and merge into it.

    in_channels, out_channels, size, groups, kernels, inference_mode: as of PartitionPerceptron. side: of the kernel,
    odd. Weight (O, C/g, side, side), bias (O,). Input (N, C, h, w), output (N, O, h, w).
    Raises ValueError where the groups do not divide the channels, for an even side, a branch on a shuffled grid or one
    larger than the kernel, none of which merge into it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: tuple[int, int],
        groups: int,
        kernels: Iterable[BranchSpec | int | str],
        side: int,
        *,
        inference_mode: bool = False,
    ):
        super().__init__()
        _check_side(side)
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"groups={groups} does not divide {in_channels} input and {out_channels} output channels")
        specs = check_partition_kernels(kernels, size)
        for spec in specs:
            if spec.shuffled or max(spec.padding) > side // 2:
                raise ValueError(f"branch {spec.label} does not merge into a {side}x{side} convolution")
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, side, side))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_channels)) if inference_mode else None)
        self.norm = None if inference_mode else nn.BatchNorm2d(out_channels)
        self.local_perceptron = (
            GroupLocalPerceptron(in_channels, out_channels, groups, specs, size)
            if specs and not inference_mode
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out = F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2, groups=self.groups)
        if self.norm is not None:
            out = self.norm(out)
        return out if self.local_perceptron is None else out + self.local_perceptron(x)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Merge branches and batch norms into one convolution; see PartitionPerceptron.reparameterize."""
        if self.norm is None:
            return
        if self.training:
            raise RuntimeError("the model is in training mode: call model.eval() before reparameterize()")
        check_parameters(self)
        weight, bias = fuse_bn(self.weight, None, batch_norm_stats(self.norm), torch.float64)
        for branch in [] if self.local_perceptron is None else self.local_perceptron.branches():
            kernel, more = fuse_bn(branch.kernel, branch.bias, branch.norm, torch.float64)
            # the taps of the smaller kernel around the middle of the larger one, `dilation` cells apart
            taps = [
                slice(middle - reach, middle + reach + 1, branch.dilation)
                for middle, reach in ((weight.shape[d] // 2, branch.dilation * (kernel.shape[d] // 2)) for d in (2, 3))
            ]
            added = torch.zeros_like(weight)
            added[:, :, taps[0], taps[1]] = kernel
            weight, bias = weight + added, bias + more
        dtype = self.weight.dtype
        set_parameter(self, "weight", weight.to(dtype))
        set_parameter(self, "bias", bias.to(dtype))
        self.norm = self.local_perceptron = None


class PureMLP(nn.Module):
    """RepMLPs and 1x1 layers in turn, in stages with max pooling between them; or a network to compare it with.

    Paper: RepMLP Section 4.1. A stage of width C: RepMLP(C), 1x1 (C -> C), RepMLP(C), 1x1 (C -> the next stage's width;
    in the last stage C -> C). In front a 1x1 layer from the image, at the end global average pooling and a classifier.
    A 1x1 layer has a batch norm and a ReLU, a RepMLP a ReLU.

    img_size: side of the image in pixels, or (height, width), halved before every further stage. channels: width of
    each stage. partition: side of a partition. groups: g of the RepMLPs, or of the convolutions in their place.
    kernels: branches, see repmlp.branches; () leaves the Local Perceptron out. global_perceptron: False leaves it out.
    spatial: "repmlp"; "fc3_conv": RepMLPs whose FC3 is a convolution on the partition; "conv": convolutions on the
    whole map, with a batch norm, in the place of RepMLPs (then partition, kernels and global_perceptron say nothing).
    conv_kernel: side of those convolutions, odd. inference_mode: build the merged form (of "conv" there is none: it is
    built as it is).

    Input (N, in_chans, H, W), output (N, num_classes).
    Raises ValueError for another `spatial`, an image that cannot be halved, and as RepMLP does.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        channels: Sequence[int] = (16, 32, 64),
        partition: int = 8,
        groups: int = 2,
        kernels: Iterable[BranchSpec | int | str] = (1, 3, 5),
        *,
        global_perceptron: bool = True,
        spatial: str = "repmlp",
        conv_kernel: int = 9,
        num_classes: int = 10,
        in_chans: int = 3,
        inference_mode: bool = False,
    ):
        super().__init__()
        if spatial not in SPATIAL:
            raise ValueError(f"spatial={spatial!r}: use one of {', '.join(SPATIAL)}")
        height, width = height_width(img_size)
        halvings = 2 ** (len(channels) - 1)
        if min(height, width) < 1 or height % halvings or width % halvings:
            raise ValueError(
                f"img_size={img_size} is no multiple of {halvings}, by which {len(channels)} stages divide it"
            )
        self.img_size, self.in_chans, self.num_classes = (height, width), in_chans, num_classes

        def mix(features: int, map_size: tuple[int, int]) -> nn.Module:
            if spatial == "conv":
                _check_side(conv_kernel)
                if groups < 1 or features % groups:
                    raise ValueError(f"groups={groups} does not divide {features} channels")
                conv = nn.Conv2d(features, features, conv_kernel, padding=conv_kernel // 2, groups=groups, bias=False)
                return nn.Sequential(conv, nn.BatchNorm2d(features), nn.ReLU())
            size = (partition, partition)
            settings = {"global_perceptron": global_perceptron, "inference_mode": inference_mode}
            block = RepMLP(features, features, map_size, size, groups, kernels, **settings)
            if spatial == "fc3_conv":
                block.partition_perceptron = PartitionConv(
                    features, features, size, groups, kernels, conv_kernel, inference_mode=inference_mode
                )
            return nn.Sequential(block, nn.ReLU())

        self.stem = _pointwise(in_chans, channels[0])
        self.stages = nn.ModuleList()
        for i, features in enumerate(channels):
            map_size = (height // 2**i, width // 2**i)
            following = channels[min(i + 1, len(channels) - 1)]
            self.stages.append(
                nn.Sequential(
                    mix(features, map_size),
                    _pointwise(features, features),
                    mix(features, map_size),
                    _pointwise(features, following),
                )
            )
        self.num_features = channels[-1]
        self.head = nn.Linear(channels[-1], num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> the last stage's map, (N, C, H/2**(stages-1), W/2**(stages-1))."""
        x = self.stem(x)
        for i, stage in enumerate(self.stages):
            x = stage(F.max_pool2d(x, 2) if i > 0 else x)
        return x

    def forward_head(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, num_classes)."""
        return self.head(x.mean(dim=(2, 3)))

    @readable
    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _pointwise(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return a fully-connected layer over the channels of every pixel, with batch norm and ReLU."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU())


def _check_side(side: int) -> None:
    if side < 1 or side % 2 == 0:
        raise ValueError(f"conv_kernel={side}: use an odd number, so that the map keeps its size")
