"""Locality Injection as pure functions: batch-norm fusion, a convolution written as a matrix, and their sum.

Paper: RepMLPNet (arXiv 2112.11081), Section 3 and Equations 12-14. Nothing here knows a module class. A fully-connected
layer over an h x w map is a stack of matrices, one per group: (G, O/G*h*w, I/G*h*w), rows = output positions, columns =
input positions, both in the order (channel within the group, y, x). A sequence of length n is a map of size (n,).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn


class BatchNormStats(NamedTuple):
    """What a batch-norm layer does in evaluation: y = (x - mean) / sqrt(var + eps) * weight + bias; all (C,)."""

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    def affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return (scale, shift), each (C,), with y = scale * x + shift, computed in `dtype`."""
        scale = (self.var.to(dtype) + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight.to(dtype)
        shift = -self.mean.to(dtype) * scale
        if self.bias is not None:
            shift = shift + self.bias.to(dtype)
        return scale, shift


class Branch(NamedTuple):
    """One convolution beside a fully-connected layer: kernel (O, I/groups, kh, kw) or (O, I/groups, k), bias (O,)."""

    kernel: Tensor
    bias: Tensor | None = None
    norm: BatchNormStats | None = None


def fuse_bn(
    kernel: Tensor, bias: Tensor | None, norm: BatchNormStats | None, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Fold a batch norm into the convolution (or linear layer) before it.

    Paper: RepMLPNet Eq. 13-14, F' = F * gamma/sigma and b' = beta - mu * gamma/sigma per output channel.

    kernel: (O, ...); bias: (O,) or None; norm: O channels, or None for no batch norm.
    Returns kernel (O, ...) and bias (O,) in `dtype` (the kernel's own where None).
    Raises ValueError where the batch norm has another number of channels.
    """
    dtype = dtype or kernel.dtype
    out_channels = kernel.shape[0]
    kernel = kernel.to(dtype)
    bias = kernel.new_zeros(out_channels) if bias is None else bias.to(dtype)
    if norm is None:
        return kernel, bias
    if norm.mean.shape != (out_channels,):
        raise ValueError(f"the batch norm has {norm.mean.numel()} channels, the layer before it has {out_channels}")
    scale, shift = norm.affine(dtype)
    return kernel * scale.reshape(-1, *[1] * (kernel.ndim - 1)), bias * scale + shift


def conv_to_fc(kernel: Tensor, size: Sequence[int], padding: Sequence[int] | None = None, groups: int = 1) -> Tensor:
    """Write a stride-1 convolution on an h x w map as a block-diagonal matrix.

    Paper: RepMLPNet Eq. 12, there derived by convolving an identity matrix; here built tap by tap (each tap of the
    kernel is a constant on one diagonal of each block), which is the same matrix without the h*w images.

    kernel: (O, I/groups, kh, kw), or (O, I/groups, k) with a `size` of one number.
    size: (h, w) or (n,). padding: per side, one number a dimension; None for "same".
    Returns (groups, O/groups*h*w, I/groups*h*w), rows = output positions; differentiable in `kernel`, twice too.
    Raises ValueError where the output map would not be h x w, or the shapes do not fit.
    """
    kernel, (h, w), padding = _as_2d(kernel, size, padding, groups)
    return _ConvToFC.apply(kernel, (h, w), padding, groups)


def merge_branches(
    weight: Tensor,
    bias: Tensor | None,
    branches: Sequence[Branch],
    size: Sequence[int],
    norm: BatchNormStats | None = None,
    groups: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add convolutions (and every batch norm) into the fully-connected layer that they run beside.

    Paper: RepMLPNet Section 3.2-3.3: W' = W * gamma/sigma + sum_k W(F'_k, p_k), the biases of the convolutions
    repeated h*w times onto the bias. Arithmetic in float64, rounded once to the dtype of `weight`.

    weight: (G, O/G*h*w, I/G*h*w); bias: (G, O/G*h*w) or None. norm: the layer's own batch norm, O channels, or None.
    branches: "same"-padded convolutions with G groups and O output channels. size: (h, w) or (n,).
    groups: G, to say it explicitly; a weight with another number of groups is refused.
    out: where the merged weight goes, contiguous; may be `weight` itself, which saves the memory of a second one.
    Returns weight and bias of the merged layer, same shapes. Where gradients are wanted the result is differentiable
    in every argument; otherwise it is computed by blocks of rows, so that float64 costs little memory.
    Raises ValueError for an even kernel, shapes that do not fit, or an `out` where gradients are wanted.
    """
    positions = _positions(size)
    if groups is not None and weight.shape[0] != groups:
        raise ValueError(f"the fully-connected layer has {weight.shape[0]} groups, expected {groups}")
    groups, rows, columns = weight.shape
    if rows % positions or columns % positions:
        raise ValueError(f"a weight of shape {tuple(weight.shape)} is no layer over maps of {positions} positions")
    out_per_group, in_per_group = rows // positions, columns // positions
    wide = torch.float64

    scale, shift = (None, None) if norm is None else norm.affine(wide)
    if scale is not None and scale.numel() != groups * out_per_group:
        raise ValueError(f"the batch norm has {scale.numel()} channels, the layer has {groups * out_per_group}")
    new_bias = weight.new_zeros(groups, rows, dtype=wide) if bias is None else bias.to(wide)
    if scale is not None:
        # (O,) -> (G, O/G*h*w): one value per output channel, repeated over the map
        scale = scale.view(groups, out_per_group).repeat_interleave(positions, dim=1)
        new_bias = new_bias * scale + shift.view(groups, out_per_group).repeat_interleave(positions, dim=1)

    fused: list[tuple[Tensor, tuple[int, int]]] = []
    for branch in branches:
        kernel, conv_bias = fuse_bn(branch.kernel, branch.bias, branch.norm, wide)
        kernel, (h, w), padding = _as_2d(kernel, size, None, groups)
        if kernel.shape[:2] != (groups * out_per_group, in_per_group):
            raise ValueError(
                f"a kernel of shape {tuple(branch.kernel.shape)} does not fit a layer with {groups} groups of "
                f"{in_per_group} -> {out_per_group} channels"
            )
        fused.append((kernel, padding))
        new_bias = new_bias + conv_bias.view(groups, out_per_group).repeat_interleave(positions, dim=1)

    h, w = _as_hw(size)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (weight, new_bias, *(k for k, _ in fused))):
        if out is not None:
            raise ValueError("a merged weight that is to be differentiated cannot be written into out")
        new_weight = weight.to(wide) if scale is None else weight.to(wide) * scale.unsqueeze(-1)
        for kernel, padding in fused:
            new_weight = new_weight + _ConvToFC.apply(kernel, (h, w), padding, groups)
        return new_weight.to(weight.dtype), new_bias.to(weight.dtype)

    new_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if out is None else out.detach()
    if new_weight.shape != weight.shape or not new_weight.is_contiguous():
        raise ValueError(f"out of shape {tuple(new_weight.shape)}: needs {tuple(weight.shape)}, contiguous")
    shape = (groups, out_per_group, h, w, in_per_group, h, w)
    source, target = weight.detach().reshape(shape), new_weight.view(shape)
    step = max(1, _BLOCK_ELEMENTS // (weight.numel() // h))
    for y in range(0, h, step):
        block = source[:, :, y : y + step].to(wide, copy=True)
        if scale is not None:
            block *= scale.view(groups, out_per_group, h, w)[:, :, y : y + step, :, None, None, None]
        for kernel, padding in fused:
            for diagonal, tap in _taps(block, kernel, padding, groups, first_row=y):
                diagonal += tap
        target[:, :, y : y + step] = block  # the only rows of the source that they were made of
    return new_weight, new_bias.to(weight.dtype)


_BLOCK_ELEMENTS = 2**20  # float64 elements held at once while merging: 8 MiB


class _ConvToFC(torch.autograd.Function):
    """Fill the diagonals in place; the gradient of a tap is the sum of its diagonal.

    A Function of its own because autograd would otherwise keep a copy of the whole matrix for every tap.
    """

    @staticmethod
    def forward(ctx, kernel: Tensor, size: tuple[int, int], padding: tuple[int, int], groups: int) -> Tensor:
        ctx.geometry = (kernel.shape, size, padding, groups)
        (out_channels, in_per_group, _, _), (h, w) = kernel.shape, size
        out_per_group = out_channels // groups
        matrix = _zeros((groups, out_per_group, h, w, in_per_group, h, w), kernel)
        for diagonal, tap in _taps(matrix, kernel, padding, groups):
            diagonal.copy_(tap.expand_as(diagonal))
        # (G, O/G, h, w, I/G, h, w) -> (G, O/G*h*w, I/G*h*w)
        return matrix.view(groups, out_per_group * h * w, in_per_group * h * w)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (out_channels, in_per_group, kh, kw), (h, w), padding, groups = ctx.geometry
        # (G, O/G*h*w, I/G*h*w) -> (G, O/G, h, w, I/G, h, w)
        grad = grad.reshape(groups, out_channels // groups, h, w, in_per_group, h, w)
        taps = [_diagonal(grad, a - padding[0], b - padding[1]).sum(dim=(-2, -1)) for a in range(kh) for b in range(kw)]
        # kh*kw of (G, O/G, I/G) -> (O, I/G, kh, kw)
        return torch.stack(taps, dim=-1).reshape(out_channels, in_per_group, kh, kw), None, None, None


def _zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return zeros of the dtype and on the device of `like`; on a CPU without writing them.

    The system hands out memory that it has cleared. torch.zeros writes the zeros once more, which was nearly half of
    the time of conv_to_fc on a 64x64 map.
    """
    traced = type(like) not in (Tensor, nn.Parameter) or torch.compiler.is_compiling() or torch.jit.is_tracing()
    if like.device.type != "cpu" or traced:
        return like.new_zeros(shape)
    # in bytes, because numpy has no bfloat16
    return torch.from_numpy(np.zeros(math.prod(shape) * like.element_size(), np.uint8)).view(like.dtype).view(*shape)


def _taps(
    matrix: Tensor, kernel: Tensor, padding: tuple[int, int], groups: int, first_row: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for each tap of the kernel, the view of `matrix` that it fills and its values, ready to broadcast.

    matrix: (G, O/G, rows, w, I/G, h, w), where rows = the output rows y from `first_row` on; kernel: (O, I/G, kh, kw).
    """
    _, _, kh, kw = kernel.shape
    # (O, I/G, kh, kw) -> (G, O/G, I/G, 1, 1, kh, kw)
    kernel = kernel.reshape(groups, -1, kernel.shape[1], 1, 1, kh, kw)
    for a in range(kh):
        for b in range(kw):
            yield _diagonal(matrix, a - padding[0] + first_row, b - padding[1]), kernel[..., a, b]


def _diagonal(matrix: Tensor, dy: int, dx: int) -> Tensor:
    """View the entries that tie output (y, x) to input (y + dy, x + dx): (G, O/G, I/G, valid rows, valid columns)."""
    return matrix.diagonal(dy, dim1=2, dim2=5).diagonal(dx, dim1=2, dim2=4)


def _positions(size: Sequence[int]) -> int:
    h, w = _as_hw(size)
    return h * w


def _as_hw(size: Sequence[int]) -> tuple[int, int]:
    if len(size) not in (1, 2) or min(size) < 1:
        raise ValueError(f"a map size is (h, w), or (n,) for a sequence, all positive; got {tuple(size)}")
    return (1, size[0]) if len(size) == 1 else (size[0], size[1])


def _as_2d(
    kernel: Tensor, size: Sequence[int], padding: Sequence[int] | None, groups: int
) -> tuple[Tensor, tuple[int, int], tuple[int, int]]:
    """Check the geometry and give a sequence a height of 1."""
    dims = len(size)
    h, w = _as_hw(size)
    if kernel.ndim != dims + 2:
        raise ValueError(f"a map size of {dims} numbers needs a kernel of {dims + 2} dimensions, got {kernel.ndim}")
    if groups < 1 or kernel.shape[0] % groups:
        raise ValueError(f"{kernel.shape[0]} output channels cannot be cut into {groups} groups")
    taps = tuple(kernel.shape[2:])
    if padding is None:
        if any(k % 2 == 0 for k in taps):
            raise ValueError(f"an even kernel {taps} has no centre, so its map is not aligned with the layer's")
        padding = [k // 2 for k in taps]
    if len(padding) != dims or any(2 * p != k - 1 for p, k in zip(padding, taps, strict=True)):
        raise ValueError(f"kernel {taps} with padding {tuple(padding)} does not give back a map of size {tuple(size)}")
    if dims == 1:
        # (O, I/G, k) -> (O, I/G, 1, k)
        return kernel.unsqueeze(2), (h, w), (0, padding[0])
    return kernel, (h, w), (padding[0], padding[1])
