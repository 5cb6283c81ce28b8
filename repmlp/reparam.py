"""Locality Injection as pure functions: batch-norm fusion, a convolution written as a matrix, and their sum.

Paper: RepMLPNet (arXiv 2112.11081), Section 3 and Equations 12-14. Nothing here knows a module class. A fully-connected
layer over an h x w map is a stack of matrices, one per group: (G, O/G*h*w, I/G*h*w), rows = output positions, columns =
input positions, both in the order (channel within the group, y, x). A sequence of length n is a map of size (n,).

A convolution on a shuffled grid sees the map in another order of its positions, and its output is put back into the
map's own: y = unshuffle(conv(shuffle(x))), with shuffle(x)[i] = x[permutation[i]]. Its matrix is the convolution's with
rows and columns permuted, W'[permutation[i], permutation[j]] = W[i, j].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from repmlp.tracing import recorded


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
    """One "same"-padded convolution beside a fully-connected layer.

    kernel: (O, I/groups, kh, kw) or (O, I/groups, k), odd sides. bias: (O,). norm: O channels. dilation: cells from one
    tap to the next, one number for all sides or one a side. permutation: int64 (h*w,), the order of positions in which
    it sees the map; None for the map's own.
    """

    kernel: Tensor
    bias: Tensor | None = None
    norm: BatchNormStats | None = None
    dilation: int | Sequence[int] = 1
    permutation: Tensor | None = None


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


def conv_to_fc(
    kernel: Tensor,
    size: Sequence[int],
    padding: Sequence[int] | None = None,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    permutation: Tensor | None = None,
) -> Tensor:
    """Write a stride-1 convolution on an h x w map as a block-diagonal matrix.

    Paper: RepMLPNet Eq. 12, there derived by convolving an identity matrix; here built tap by tap (each tap of the
    kernel is a constant on one diagonal of each block), which is the same matrix without the h*w images.

    kernel: (O, I/groups, kh, kw), or (O, I/groups, k) with a `size` of one number.
    size: (h, w) or (n,). padding: per side, one number a dimension; None for "same", dilation * (k // 2).
    dilation: cells from one tap to the next, one number or one a dimension. permutation: int64 (h*w,), for a shuffled
    grid (see the module); None for the map's own order.
    Returns (groups, O/groups*h*w, I/groups*h*w), rows = output positions; differentiable in `kernel`, twice too.
    Raises ValueError where the output map would not be h x w, the shapes do not fit, or `permutation` is none.
    """
    conv = _checked(kernel, size, padding, groups, dilation, permutation)
    return _ConvToFC.apply(conv.kernel, conv.offsets, conv.permutation, _as_hw(size), groups)


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
    branches: "same"-padded convolutions with G groups and O output channels, see Branch. size: (h, w) or (n,).
    groups: G, to say it explicitly; a weight with another number of groups is refused.
    out: where the merged weight goes, contiguous; may be `weight` itself, which saves the memory of a second one.
    Returns weight and bias of the merged layer, same shapes. Where gradients are wanted the result is differentiable
    in every argument; otherwise it is computed by blocks of rows, so that float64 costs little memory.
    Raises ValueError for an even kernel, shapes that do not fit, a permutation that is none, or an `out` where
    gradients are wanted.
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

    fused: list[_Conv] = []
    for branch in branches:
        kernel, conv_bias = fuse_bn(branch.kernel, branch.bias, branch.norm, wide)
        conv = _checked(kernel, size, None, groups, branch.dilation, branch.permutation)
        if kernel.shape[:2] != (groups * out_per_group, in_per_group):
            raise ValueError(
                f"a kernel of shape {tuple(branch.kernel.shape)} does not fit a layer with {groups} groups of "
                f"{in_per_group} -> {out_per_group} channels"
            )
        fused.append(conv)
        new_bias = new_bias + conv_bias.view(groups, out_per_group).repeat_interleave(positions, dim=1)

    h, w = _as_hw(size)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (weight, new_bias, *(conv.kernel for conv in fused))):
        if out is not None:
            raise ValueError("a merged weight that is to be differentiated cannot be written into out")
        new_weight = weight.to(wide) if scale is None else weight.to(wide) * scale.unsqueeze(-1)
        for conv in fused:
            new_weight = new_weight + _ConvToFC.apply(conv.kernel, conv.offsets, conv.permutation, (h, w), groups)
        return new_weight.to(weight.dtype), new_bias.to(weight.dtype)

    new_weight = torch.empty_like(weight, memory_format=torch.contiguous_format) if out is None else out.detach()
    if new_weight.shape != weight.shape or not new_weight.is_contiguous():
        raise ValueError(f"out of shape {tuple(new_weight.shape)}: needs {tuple(weight.shape)}, contiguous")
    shape = (groups, out_per_group, h, w, in_per_group, h, w)
    source, target = weight.detach().reshape(shape), new_weight.view(shape)
    step = max(1, _BLOCK_ELEMENTS // (weight.numel() // h))
    for y in range(0, h, step):
        block = source[:, :, y : y + step].to(wide, copy=True, memory_format=torch.contiguous_format)
        if scale is not None:
            block *= scale.view(groups, out_per_group, h, w)[:, :, y : y + step, :, None, None, None]
        for conv in fused:
            if conv.permutation is not None:
                _add_shuffled(block, conv.kernel, conv.offsets, conv.permutation, first_row=y)
                continue
            for diagonal, tap in _taps(block, conv.kernel, conv.offsets, first_row=y):
                diagonal += tap
        target[:, :, y : y + step] = block  # the only rows of the source that they were made of
    return new_weight, new_bias.to(weight.dtype)


_BLOCK_ELEMENTS = 2**20  # float64 elements held at once while merging: 8 MiB


class _Conv(NamedTuple):
    """A convolution whose geometry has been checked: kernel (O, I/G, kh, kw); the rest as _ConvToFC takes it."""

    kernel: Tensor
    offsets: tuple[tuple[int, int], ...]
    permutation: Tensor | None


class _ConvToFC(torch.autograd.Function):
    """Fill the diagonals in place; the gradient of a tap is the sum of its diagonal.

    A Function of its own because autograd would otherwise keep a copy of the whole matrix for every tap.

    kernel: (O, I/G, kh, kw). offsets: (dy, dx) from the output to the input of each of the kh*kw taps. permutation:
    int64 (h*w,), or None for the map's own order. size: (h, w).
    """

    @staticmethod
    def forward(
        ctx,
        kernel: Tensor,
        offsets: tuple[tuple[int, int], ...],
        permutation: Tensor | None,
        size: tuple[int, int],
        groups: int,
    ) -> Tensor:
        ctx.geometry = (kernel.shape, offsets, size, groups)
        ctx.save_for_backward(permutation)
        (out_channels, in_per_group, _, _), (h, w) = kernel.shape, size
        out_per_group = out_channels // groups
        matrix = _zeros((groups, out_per_group, h, w, in_per_group, h, w), kernel)
        if permutation is None:
            for diagonal, tap in _taps(matrix, kernel, offsets):
                diagonal.copy_(tap.expand_as(diagonal))
        else:
            _add_shuffled(matrix, kernel, offsets, permutation)
        # (G, O/G, h, w, I/G, h, w) -> (G, O/G*h*w, I/G*h*w)
        return matrix.view(groups, out_per_group * h * w, in_per_group * h * w)

    @staticmethod
    def backward(ctx, grad: Tensor):
        shape, offsets, (h, w), groups = ctx.geometry
        (permutation,) = ctx.saved_tensors
        # (G, O/G*h*w, I/G*h*w) -> (G, O/G, h, w, I/G, h, w)
        grad = grad.reshape(groups, shape[0] // groups, h, w, shape[1], h, w)
        if permutation is None:
            taps = torch.stack([_diagonal(grad, *offset).sum(dim=(-2, -1)) for offset in offsets], dim=-1)
        else:
            rows, columns, valid = _entries(permutation, (h, w), offsets)
            # (h*w, kh*kw, G, O/G, I/G) -> (G, O/G, I/G, kh*kw)
            taps = (_by_position(grad)[rows, columns] * valid[..., None, None, None]).sum(dim=0).movedim(0, -1)
        # (G, O/G, I/G, kh*kw) -> (O, I/G, kh, kw)
        return taps.reshape(shape), None, None, None, None


def _zeros(shape: Sequence[int], like: Tensor) -> Tensor:
    """Return zeros of the dtype and on the device of `like`; on a CPU without writing them.

    The system hands out memory that it has cleared. torch.zeros writes the zeros once more, which was nearly half of
    the time of conv_to_fc on a 64x64 map.
    """
    if like.device.type != "cpu" or recorded(like):
        return like.new_zeros(shape)
    # in bytes, because numpy has no bfloat16
    return torch.from_numpy(np.zeros(math.prod(shape) * like.element_size(), np.uint8)).view(like.dtype).view(*shape)


def _taps(
    matrix: Tensor, kernel: Tensor, offsets: Sequence[tuple[int, int]], first_row: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield, for each tap of the kernel, the view of `matrix` that it fills and its values, ready to broadcast.

    matrix: (G, O/G, rows, w, I/G, h, w), where rows = the output rows y from `first_row` on; kernel: (O, I/G, kh, kw).
    """
    # (O, I/G, kh, kw) -> (G, O/G, I/G, 1, 1, kh*kw)
    kernel = kernel.reshape(matrix.shape[0], -1, kernel.shape[1], 1, 1, len(offsets))
    for tap, (dy, dx) in enumerate(offsets):
        yield _diagonal(matrix, dy + first_row, dx), kernel[..., tap]


def _add_shuffled(
    matrix: Tensor, kernel: Tensor, offsets: Sequence[tuple[int, int]], permutation: Tensor, first_row: int = 0
) -> None:
    """Add a convolution on a shuffled grid into a matrix, in place; arguments as for _taps, permutation (h*w,)."""
    g, out_per_group, rows, _, in_per_group, h, w = matrix.shape
    outputs, inputs, valid = _entries(permutation, (h, w), offsets, first_row, rows)
    # (O, I/G, kh, kw) -> (G, O/G, I/G, kh*kw) -> (kh*kw, G, O/G, I/G)
    taps = kernel.reshape(g, out_per_group, in_per_group, len(offsets)).movedim(-1, 0)
    # (rows*w, kh*kw, 1, 1, 1), (kh*kw, G, O/G, I/G) -> (rows*w, kh*kw, G, O/G, I/G): 0 where a tap lies off the grid
    values = torch.where(valid[..., None, None, None], taps, taps.new_zeros(()))
    _by_position(matrix).index_put_((outputs, inputs), values, accumulate=True)


def _entries(
    permutation: Tensor, size: tuple[int, int], offsets: Sequence[tuple[int, int]], first_row: int = 0, rows: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the inputs that the outputs of some rows of the map see through each tap on the shuffled grid.

    rows: how many rows from `first_row` on; 0 for all.
    Returns the outputs (rows*w, 1), counted from the first; the inputs (rows*w, taps); and whether the tap lies on the
    grid (rows*w, taps), where it does not the input is one at the border. Shapes depend on no tensor's values.
    """
    (h, w), device = size, permutation.device
    rows = rows or h
    # where the outputs stand on the shuffled grid
    place = inverse_permutation(permutation)[first_row * w : (first_row + rows) * w].unsqueeze(1)
    steps = torch.tensor(offsets, dtype=torch.int64, device=device)
    y, x = place // w + steps[:, 0], place % w + steps[:, 1]
    valid = (y >= 0) & (y < h) & (x >= 0) & (x < w)
    inputs = permutation[y.clamp(0, h - 1) * w + x.clamp(0, w - 1)]
    return torch.arange(rows * w, device=device).unsqueeze(1), inputs, valid


def inverse_permutation(permutation: Tensor) -> Tensor:
    """Return the permutation that undoes another: (n,) -> (n,)."""
    places = torch.arange(permutation.numel(), device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, places)


def _by_position(matrix: Tensor) -> Tensor:
    """View (G, O/G, rows, w, I/G, h, w) as (rows*w, h*w, G, O/G, I/G): by output and input position."""
    return matrix.flatten(5, 6).flatten(2, 3).permute(2, 4, 0, 1, 3)


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


def _checked(
    kernel: Tensor,
    size: Sequence[int],
    padding: Sequence[int] | None,
    groups: int,
    dilation: int | Sequence[int],
    permutation: Tensor | None,
) -> _Conv:
    """Check the geometry of a convolution, give a sequence a height of 1, and say where its taps lie."""
    dims = len(size)
    positions = _positions(size)
    if kernel.ndim != dims + 2:
        raise ValueError(f"a map size of {dims} numbers needs a kernel of {dims + 2} dimensions, got {kernel.ndim}")
    if groups < 1 or kernel.shape[0] % groups:
        raise ValueError(f"{kernel.shape[0]} output channels cannot be cut into {groups} groups")
    taps = tuple(kernel.shape[2:])
    dilation = tuple(dilation) if isinstance(dilation, Sequence) else (dilation,) * dims
    if len(dilation) != dims or min(dilation) < 1:
        raise ValueError(f"dilation={dilation}: use one positive number, or one for each of the {dims} sides")
    if padding is None:
        if any(k % 2 == 0 for k in taps):
            raise ValueError(f"an even kernel {taps} has no centre, so its map is not aligned with the layer's")
        padding = [d * (k // 2) for d, k in zip(dilation, taps, strict=True)]
    if len(padding) != dims or any(2 * p != d * (k - 1) for p, d, k in zip(padding, dilation, taps, strict=True)):
        dilated = f", dilation {dilation}" if max(dilation) > 1 else ""
        raise ValueError(
            f"kernel {taps}{dilated} with padding {tuple(padding)} does not give back a map of size {tuple(size)}"
        )
    if permutation is not None:
        _check_permutation(permutation, positions)
    # one range of offsets a side
    reach = [[d * tap - p for tap in range(k)] for k, d, p in zip(taps, dilation, padding, strict=True)]
    if dims == 1:
        # (O, I/G, k) -> (O, I/G, 1, k)
        kernel, reach = kernel.unsqueeze(2), [[0], *reach]
    return _Conv(kernel, tuple((dy, dx) for dy in reach[0] for dx in reach[1]), permutation)


def _check_permutation(permutation: Tensor, positions: int) -> None:
    """Raise ValueError where it is no order of that many positions; the values of traced tensors are not known."""
    wrong = permutation.shape != (positions,) or permutation.dtype != torch.int64
    if not wrong and not permutation.is_meta and not recorded(permutation):
        wrong = not torch.equal(permutation.sort().values, torch.arange(positions, device=permutation.device))
    if wrong:
        raise ValueError(f"permutation: needs every whole number from 0 to {positions - 1} once, as int64")
