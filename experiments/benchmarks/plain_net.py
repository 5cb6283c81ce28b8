"""RepMLPNet written straightforwardly, as a published implementation would: the baseline of benchmark.py.

Every layer is a convolution: the set-sharing FC a grouped 1x1 one over h*w*S channels, the FFN and the Global
Perceptron 1x1 ones; branches are convolutions on the interleaved view; merging convolves an identity. Same function as
repmlp.RepMLPNet at its trained size (tests/test_benchmark.py), layers named as in published checkpoints so that
`checkpoints.to_official` loads it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repmlp import RepMLPNet
from repmlp.checkpoints import to_official


def conv_bn(in_channels: int, out_channels: int, kernel: int, **kwargs) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel, bias=False, **kwargs)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels)))


class PlainGlobalPerceptron(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 4, 1)
        self.fc2 = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


class PlainBlock(nn.Module):
    """(N, C, h, w) -> (N, C, h, w); kernels: () for the merged form."""

    def __init__(self, channels: int, size: tuple[int, int], sets: int, kernels: Sequence[int], merged: bool):
        super().__init__()
        self.size, self.sets, self.kernels, self.merged = size, sets, tuple(kernels), merged
        positions = sets * size[0] * size[1]
        self.gp = PlainGlobalPerceptron(channels)
        self.fc3 = nn.Conv2d(positions, positions, 1, groups=sets, bias=merged)
        if not merged:
            self.fc3_bn = nn.BatchNorm2d(sets)
            for k in self.kernels:
                self.add_module(f"repconv{k}", conv_bn(sets, sets, k, padding=k // 2, groups=sets))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        # (N, C, h, w) -> (N*C/S, S*h*w, 1, 1) -> (N*C/S, S, h, w)
        out = self.fc3(x.reshape(-1, self.sets * h * w, 1, 1)).reshape(-1, self.sets, h, w)
        if not self.merged:
            out = self.fc3_bn(out)
            view = x.reshape(-1, self.sets, h, w)
            for k in self.kernels:
                out = out + self.get_submodule(f"repconv{k}")(view)
        # (N*C/S, S, h, w) -> (N, C, h, w)
        return out.reshape(n, c, h, w) * self.gp(x)


class PlainFFN(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.ffn_fc1 = conv_bn(channels, 4 * channels, 1)
        self.ffn_fc2 = conv_bn(4 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.ffn_fc2(F.gelu(self.ffn_fc1(x)))


class PlainUnit(nn.Module):
    def __init__(self, channels: int, size: tuple[int, int], sets: int, kernels: Sequence[int], merged: bool):
        super().__init__()
        self.repmlp_block = PlainBlock(channels, size, sets, kernels, merged)
        self.ffn_block = PlainFFN(channels)
        self.prebn1, self.prebn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.repmlp_block(self.prebn1(x))
        return x + self.ffn_block(self.prebn2(x))


class PlainRepMLPNet(nn.Module):
    """The network that `model` is, with its weights: (N, 3, H, W) at the trained size -> (N, num_classes)."""

    def __init__(self, model: RepMLPNet):
        super().__init__()
        first, stride = model.stem.conv, model.stem.conv.stride[0]
        self.conv_embedding = conv_bn(first.in_channels, first.out_channels, stride, stride=stride)
        self.stages, self.embeds = nn.ModuleList(), nn.ModuleList()
        for stage, info in zip(model.stages, model.feature_info, strict=True):
            fc = stage[0].block.channel_perceptron
            merged = fc.norm is None
            units = (PlainUnit(info["num_chs"], fc.size, fc.share_sets, fc.kernels, merged) for _ in stage)
            self.stages.append(nn.ModuleList(units))
        for down in model.downsamples:
            self.embeds.append(conv_bn(down.conv.in_channels, down.conv.out_channels, 2, stride=2))
        self.head_norm = nn.BatchNorm2d(model.num_features)
        self.head = nn.Linear(model.num_features, model.num_classes)
        self.to(model.head.weight.dtype).load_state_dict(to_official(model.state_dict()))
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv_embedding(x))
        for i, stage in enumerate(self.stages):
            if i:
                x = F.relu(self.embeds[i - 1](x))
            for unit in stage:
                x = unit(x)
        return self.head(F.adaptive_avg_pool2d(self.head_norm(x), 1).flatten(1))


def conv_to_fc_by_identity(kernel: Tensor, size: tuple[int, int]) -> Tensor:
    """Write a depth-wise convolution as a matrix by convolving an identity (Eq. 12 literally).

    kernel: (S, 1, k, k). Returns (S*h*w, h*w), rows = output positions.
    """
    sets, (h, w) = kernel.shape[0], size
    # (h*w, h*w) -> (h*w, S*h*w) -> (h*w, S, h, w)
    identity = torch.eye(h * w, dtype=kernel.dtype).repeat(1, sets).reshape(h * w, sets, h, w)
    images = F.conv2d(identity, kernel, padding=kernel.shape[-1] // 2, groups=sets)
    # (h*w, S, h, w) -> (S*h*w, h*w)
    return images.reshape(h * w, sets * h * w).t()


@torch.no_grad()
def merge_by_identity(block: PlainBlock) -> tuple[Tensor, Tensor]:
    """Merge a block as published code does, in its own dtype: weight (S*h*w, h*w), bias (S*h*w,)."""

    def affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        return scale, norm.bias - norm.running_mean * scale

    positions = block.size[0] * block.size[1]
    scale, shift = affine(block.fc3_bn)
    weight = block.fc3.weight[:, :, 0, 0] * scale.repeat_interleave(positions)[:, None]
    if block.kernels:
        largest = max(block.kernels)
        kernel = torch.zeros(block.sets, 1, largest, largest)
        for k in block.kernels:
            branch = block.get_submodule(f"repconv{k}")
            k_scale, k_shift = affine(branch.bn)
            kernel += F.pad(branch.conv.weight * k_scale[:, None, None, None], [(largest - k) // 2] * 4)
            shift = shift + k_shift
        weight = weight + conv_to_fc_by_identity(kernel, block.size)
    return weight, shift.repeat_interleave(positions)
