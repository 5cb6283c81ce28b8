"""The Local Perceptron: depth-wise convolutions beside the set-sharing FC, on the map as it is or on a shuffled grid.

Paper: RepMLPNet (arXiv 2112.11081), Section 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from repmlp.branches import WAYS, BranchSpec, parse_all
from repmlp.maps import sets_first
from repmlp.parameters import batch_norm_stats, check_parameters
from repmlp.randomness import derive_seed
from repmlp.reparam import Branch, inverse_permutation
from repmlp.tracing import fixed


def shuffled_grid(size: tuple[int, int]) -> Tensor:
    """Draw the order of positions of a shuffled h x w grid, int64 (h*w,), from the seed that torch was given last.

    It is one for all layers of a net with maps of this size, and takes nothing from the random numbers that weights
    start from, which are those of the same net with plain branches.
    """
    generator = torch.Generator().manual_seed(derive_seed(torch.initial_seed(), "shuffled grid", *size))
    return torch.randperm(size[0] * size[1], generator=generator, device="cpu")


def reordered(x: Tensor, order: Tensor) -> Tensor:
    """Put the positions of maps in another order: (N, C, h, w) -> (N, C, h, w), channels-last in memory."""
    # (N, C, h, w) -> (N, h*w, C), a view of a channels-last map -> (N, C, h, w)
    return x.flatten(2).transpose(1, 2).index_select(1, order).transpose(1, 2).unflatten(2, x.shape[2:])


class LocalPerceptron(nn.Module):
    """Parallel depth-wise convolutions, each followed by a batch norm, summed.

    Paper: RepMLPNet Section 4, "Local Perceptron"; dilated, one-row and shuffled branches (see repmlp.branches) are
    ours. S channels each, on the interleaved view of the map: channel c of the map is convolved with kernel c mod S,
    and the batch norm pools over the channels of a set.

    Shuffled branches see the map in the order of the buffer `permutation` (h*w,), int64, and put their output back. It
    is drawn by `shuffled_grid`, saved and loaded with the weights.

    share_sets: S, has to divide the channels. kernels: branches, e.g. (1, 3, "1x3", "3d2", "3s").
    size: (h, w) of the map, or (n,) for a sequence, where a branch k or "1xk" has k taps along it; afterwards the
    attribute `size` is (h, w), or (1, n). None lets maps of any size through, but takes no shuffled branch.
    Input and output (N, C, h, w), of a sequence (N, C, 1, n).
    Raises ValueError for what is no branch, there twice, of no use on the map (BranchSpec.fits) or shuffled without a
    size, and in forward() for shuffled branches on a map of another size.
    """

    def __init__(
        self,
        share_sets: int,
        kernels: Iterable[BranchSpec | int | str] = (1, 3),
        size: Sequence[int] | None = None,
    ):
        super().__init__()
        self.share_sets = share_sets
        self.way = WAYS[0]  # see branches_by
        self.specs = parse_all(kernels, size)
        sequence = size is not None and len(size) == 1
        self.size = None if size is None else (1, int(size[0])) if sequence else (int(size[0]), int(size[1]))
        self.shuffled = [spec.shuffled for spec in self.specs]  # apart from the specs, which TorchScript cannot read
        shuffled = [spec for spec in self.specs if spec.shuffled]
        if shuffled and size is None:
            raise ValueError(f"branch {shuffled[0].label}: a shuffled grid needs the size of the map, size=(h, w)")
        # Drawn as if nothing were shuffled, so that "3s" starts from the values that 3 would have.
        convs = {}
        for spec in sorted(self.specs, key=lambda spec: (spec.order[1:], spec.shuffled)):
            # a sequence is a map one cell high
            shape, padding = ((1, spec.shape[1]), (0, spec.padding[1])) if sequence else (spec.shape, spec.padding)
            convs[spec] = nn.Conv2d(
                share_sets, share_sets, shape, padding=padding, dilation=spec.dilation, groups=share_sets, bias=False
            )
        self.convs = nn.ModuleDict({str(spec.value): convs[spec] for spec in self.specs})
        self.norms = nn.ModuleDict({key: nn.BatchNorm2d(share_sets) for key in self.convs})
        order = torch.empty(self.size[0] * self.size[1], dtype=torch.int64) if shuffled else None
        self.register_buffer("permutation", order)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the order of the shuffled grid, the one thing here that belongs to no convolution or batch norm."""
        if self.permutation is not None:
            self.permutation.copy_(shuffled_grid(self.size))

    @torch.jit.unused
    @property
    def kernels(self) -> tuple[int | str, ...]:
        """Return the branches as configurations spell them, sorted."""
        return tuple(spec.value for spec in self.specs)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript skips what stands below this condition alone)
            if self.way == "matrix":
                return self._by_matrix(x)
        n, c, h, w = x.shape
        source, back = x, None
        if self.permutation is not None:
            source, back = onto_shuffled_grid(x, self.permutation, self.size), inverse_permutation(self.permutation)
        # Convolving C channels with repeated kernels is the same as S channels with a C/S times larger batch. On a CPU
        # it took 24 ms where one channel and a batch of 32768 took 1700 ms (forward and backward).
        out: Tensor | None = None
        for i, (conv, norm) in enumerate(zip(self.convs.values(), self.norms.values())):  # noqa: B905 (TorchScript)
            shuffled = self.shuffled[i]
            y = source if shuffled else x
            if self.way == "sets":
                # (N, C, h, w) -> (N*C/S, S, h, w) -> (N, C, h, w)
                y = conv(y.reshape(n * (c // self.share_sets), self.share_sets, h, w)).reshape(n, c, h, w)
            else:
                y = depthwise(y, conv.weight, self.share_sets, conv.padding, conv.dilation)
            if shuffled and back is not None:
                y = reordered(y, back)
            # (N, C, h, w) -> (N*C/S, S, h, w)
            y = norm(y.reshape(n * (c // self.share_sets), self.share_sets, h, w))
            out = y if out is None else out + y
        assert out is not None  # there is a branch at least
        # (N*C/S, S, h, w) -> (N, C, h, w)
        return out.reshape(n, c, h, w)

    def _by_matrix(self, x: Tensor) -> Tensor:
        """Do what forward() does with all branches as one batched product with their matrices."""
        kernels = [conv.weight for conv in self.convs.values()]
        dilations = [spec.dilation for spec in self.specs]
        orders = [self.permutation if shuffled else None for shuffled in self.shuffled]
        maps = products(x, kernels, dilations, orders, self.share_sets, self.size)
        first, *rest = (norm(maps[i]) for i, norm in enumerate(self.norms.values()))
        out = sum(rest, start=first)
        # (N*C/S, S, h, w) -> (N, C, h, w)
        return out.reshape(x.shape)

    def branches(self) -> list[Branch]:
        """Return the convolutions as plain tensors, ready for `merge_branches`."""
        found = []
        for spec in self.specs:
            conv, norm = self.convs[str(spec.value)], self.norms[str(spec.value)]
            check_parameters(conv)
            order = self.permutation if spec.shuffled else None
            found.append(Branch(conv.weight, None, batch_norm_stats(norm), spec.dilation, order))
        return found

    @torch.no_grad()
    def taps(self, point: tuple[int, int]) -> Tensor:
        """Say which cells of the input map the branches see from one output point: bool (h, w), on the CPU.

        point: (y, x), counted from 0.
        Raises ValueError where the point lies outside the map, or the map's size was not given.
        """
        if self.size is None or not all(0 <= at < length for at, length in zip(point, self.size, strict=True)):
            raise ValueError(f"point {tuple(point)} lies outside the map of size {self.size} (counted from 0)")
        spot = torch.zeros(1, 1, *self.size, device="cpu")
        spot[0, 0, point[0], point[1]] = 1
        order = None if self.permutation is None else self.permutation.cpu()
        seen = torch.zeros_like(spot, dtype=torch.bool)
        for spec in self.specs:
            conv = self.convs[str(spec.value)]
            # the taps lie symmetrically, so a kernel of ones spreads the point to the cells that it sees
            ones = torch.ones(1, 1, *conv.kernel_size, device="cpu")
            x = reordered(spot, order) if spec.shuffled else spot
            y = F.conv2d(x, ones, padding=conv.padding, dilation=conv.dilation)
            seen |= (reordered(y, inverse_permutation(order)) if spec.shuffled else y) > 0
        # (1, 1, h, w) -> (h, w)
        return seen[0, 0]


def branches_by(model: nn.Module, way: str) -> nn.Module:
    """Choose how the depth-wise branches of a whole model are computed while it is trained; returns the model.

    The outputs, gradients and statistics are the same but for rounding, and so are the state dict and the merged form;
    which way is fastest depends on the device. TorchScript computes "matrix" as "channels". Models without such
    branches are left as they are.

    way: "channels", the default: a convolution of C channels, with the kernels repeated for the channels of a set;
    "sets": a convolution of S channels with a C/S times larger batch; "matrix": all branches of a layer as one batched
    product with (h*w, h*w) matrices, built of their taps, for devices that multiply matrices much faster than they
    convolve depth-wise.
    Raises ValueError for another way.
    """
    if way not in WAYS:
        raise ValueError(f"branches by {way!r}: use one of {', '.join(WAYS)}")
    for module in model.modules():
        if isinstance(module, LocalPerceptron):
            module.way = way
    return model


@torch.fx.wrap
def depthwise(
    x: Tensor, kernel: Tensor, share_sets: int, padding: tuple[int, int], dilation: tuple[int, int]
) -> Tensor:
    """Convolve each of C channels with the kernel of its share-set: (N, C, h, w) -> (N, C, h, w).

    kernel: (S, 1, kh, kw), repeated for all channels, interleaved as these are.
    """
    channels = x.shape[1]
    # (S, 1, kh, kw) -> (C, 1, kh, kw)
    repeated = kernel.repeat(fixed(channels // share_sets), 1, 1, 1)
    return F.conv2d(x, repeated, None, 1, padding, dilation, channels)


def tap_places(taps: tuple[int, int], dilation: int, size: tuple[int, int], like: Tensor) -> Tensor:
    """Say which input each output of a "same"-padded convolution sees through which tap.

    Returns (kh*kw, h*w, h*w) in the dtype and on the device of `like`: 1 where it does, else 0.
    """
    sides = []
    for number, length in zip(taps, size, strict=True):
        at = torch.arange(length, device=like.device)
        offset = dilation * (torch.arange(number, device=like.device) - number // 2)
        sides.append(at == at[:, None] + offset[:, None, None])  # (taps of this side, outputs, inputs)
    rows, columns = sides
    # (kh, 1, h, 1, h, 1) and (1, kw, 1, w, 1, w) -> (kh, kw, h, w, h, w) -> (kh*kw, h*w, h*w)
    both = rows[:, None, :, None, :, None] & columns[None, :, None, :, None, :]
    positions = size[0] * size[1]
    return both.view(taps[0] * taps[1], positions, positions).to(like.dtype)


@torch.fx.wrap
def products(
    x: Tensor,
    kernels: list[Tensor],
    dilations: list[int],
    orders: list[Tensor | None],
    share_sets: int,
    size: tuple[int, int] | None,
) -> Tensor:
    """Convolve maps with K depth-wise branches in one batched product: (N, C, h, w) -> (K, N*C/S, S, h, w).

    kernels: (S, 1, kh, kw) each. orders: int64 (h*w,) of a shuffled grid, or None. size: (h, w) of the layer, None for
    any. The matrices are reparam.conv_to_fc's; built as a product with 0 and 1, they and the gradients of the taps take
    two operations a branch where diagonals take two a tap, which is what counts where each is launched on its own.
    Raises ValueError as sets_first and onto_shuffled_grid do.
    """
    (n, c, h, w), s, matrices = x.shape, share_sets, []
    for kernel, dilation, order in zip(kernels, dilations, orders, strict=True):
        # (S, kh*kw) @ (kh*kw, h*w*h*w) -> (S, h*w, h*w)
        matrix = kernel.flatten(1) @ tap_places(kernel.shape[2:], dilation, (h, w), kernel).flatten(1)
        matrix = matrix.view(s, h * w, h * w)
        if order is not None:
            check_grid(x, size)
            back = inverse_permutation(order)
            matrix = matrix.index_select(1, back).index_select(2, back)
        matrices.append(matrix)
    # (S, N*C/S, h*w) @ (S, h*w, K*h*w) -> (S, N*C/S, K*h*w)
    out = torch.bmm(sets_first(x, s, (h, w)), torch.cat(matrices, dim=1).transpose(1, 2))
    # (S, N*C/S, K*h*w) -> (K, N*C/S, S, h, w)
    return out.view(s, n * (c // s), len(kernels), h, w).permute(2, 1, 0, 3, 4)


def check_grid(x: Tensor, size: tuple[int, int]) -> None:
    """Raise ValueError where maps (N, C, h, w) have not the size of a layer's shuffled grid."""
    if x.shape[2] != size[0] or x.shape[3] != size[1]:
        raise ValueError(
            f"got maps of size ({x.shape[2]}, {x.shape[3]}): the shuffled grid of these branches has size "
            f"({size[0]}, {size[1]})"
        )


@torch.fx.wrap
def onto_shuffled_grid(x: Tensor, order: Tensor, size: tuple[int, int]) -> Tensor:
    """Put the positions of maps (N, C, h, w) in the order of a shuffled grid; ValueError for maps of another size."""
    check_grid(x, size)
    return reordered(x, order)
