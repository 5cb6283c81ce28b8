"""The building blocks of Locality Injection: the set-sharing FC with its convolution branches, the Global Perceptron,
and the RepMLPNet block made of them.

Paper: RepMLPNet (arXiv 2112.11081), Sections 3.2-3.4 and 4. While training, a fully-connected layer over the map has
convolutions beside it; `reparameterize()` adds them into its weight, after which nothing of them is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from repmlp.branches import WAYS, BranchSpec, parse_all
from repmlp.randomness import derive_seed
from repmlp.reparam import BatchNormStats, Branch, inverse_permutation, merge_branches
from repmlp.tracing import fixed, of_size


def is_batch_norm(module: nn.Module) -> bool:
    """Say whether a module is a batch norm: torch's, for one process or several, or timm's frozen one."""
    frozen = all(hasattr(module, name) for name in ("running_mean", "running_var", "eps"))
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or frozen


def batch_norm_stats(norm: nn.Module) -> BatchNormStats:
    """Read the evaluation-time numbers of a batch norm, see is_batch_norm.

    Raises ValueError where it keeps none, or has an activation in it, as timm's BatchNormAct2d may.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a batch norm without running statistics cannot be merged")
    act = getattr(norm, "act", None)
    if act is not None and not isinstance(act, nn.Identity):
        raise ValueError(f"a {type(norm).__name__} with {type(act).__name__} in it is not linear and cannot be merged")
    check_parameters(norm)
    return BatchNormStats(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


def check_parameters(module: nn.Module) -> None:
    """Raise ValueError where weight or bias of a layer are computed from other parameters.

    So they are under torch.nn.utils.prune, weight_norm, spectral_norm and parametrize: written over, they would be
    computed anew in the next forward(), and what stands there now may be stale.
    """
    for name in ("weight", "bias"):
        if hasattr(module, name) and name not in module._parameters and name not in module._buffers:
            raise ValueError(
                f"{name} of {type(module).__name__} is computed from other parameters (pruning, weight norm, a "
                "parametrization): make it permanent first, by torch.nn.utils.prune.remove, remove_weight_norm or "
                "parametrize.remove_parametrizations"
            )


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Write a merged weight or bias into the Parameter that is there, which optimizers hold; a new one where none is.

    A new bias asks for gradients where the weight does.
    """
    parameter = getattr(module, name)
    if parameter is None:
        module.register_parameter(name, nn.Parameter(value, requires_grad=module.weight.requires_grad))
    elif parameter.data_ptr() != value.data_ptr():
        parameter.copy_(value)


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
                kernel = copies(conv.weight, c // self.share_sets)
                y = F.conv2d(y, kernel, None, conv.stride, conv.padding, conv.dilation, c)
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


class SetSharingFC(nn.Module):
    """A fully-connected layer over an h x w map, shared by the channels of a set, with convolutions beside it.

    Paper: RepMLPNet Section 4, "Channel Perceptron" (FC3 and its batch norm) and "Local Perceptron". Channel c uses
    share-set c mod S: channels are interleaved, which published checkpoints rely on.

    size: (h, w). share_sets: S, has to divide the channels. kernels: the branches, see LocalPerceptron; () for none.
    bias: an FC bias of its own (ResMLP has one). norm: a batch norm with S channels after the FC (RepMLPNet has one).
    inference_mode: build the merged form (weight and bias only), to load merged weights into.

    Weight (S, h*w, h*w), rows = output positions; bias (S, h*w). Input and output (N, C, h, w).
    Raises ValueError in the constructor for kernels that are no branches, there twice, or do not fit the map (see
    LocalPerceptron), in forward() for channels that S does not divide or maps of another size.
    """

    def __init__(
        self,
        size: tuple[int, int],
        share_sets: int = 1,
        kernels: Iterable[BranchSpec | int | str] = (),
        *,
        bias: bool = False,
        norm: bool = True,
        inference_mode: bool = False,
    ):
        super().__init__()
        if share_sets < 1:
            raise ValueError(f"share_sets={share_sets}: there has to be at least one share-set")
        self.size = (int(size[0]), int(size[1]))
        specs = parse_all(kernels, self.size)
        self.share_sets = share_sets
        positions = self.size[0] * self.size[1]
        self.weight = nn.Parameter(torch.empty(share_sets, positions, positions))
        if bias or inference_mode:
            self.bias = nn.Parameter(torch.empty(share_sets, positions))
        else:
            self.register_parameter("bias", None)
        self.norm = nn.BatchNorm2d(share_sets) if norm and not inference_mode else None
        self.local_perceptron = LocalPerceptron(share_sets, specs, self.size) if specs and not inference_mode else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias uniformly from +-1/sqrt(h*w), torch's default for a layer with h*w inputs."""
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @torch.jit.unused
    @property
    def kernels(self) -> tuple[int | str, ...]:
        """Return the branches that are there now, as configurations spell them: () once merged."""
        return () if self.local_perceptron is None else self.local_perceptron.kernels

    def extra_repr(self) -> str:
        return f"size={self.size}, share_sets={self.share_sets}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        s = self.share_sets
        maps = sets_first(x, s, self.size)
        if self.bias is None:
            out = torch.bmm(maps, self.weight.transpose(1, 2))
        else:
            out = torch.baddbmm(self.bias.unsqueeze(1), maps, self.weight.transpose(1, 2))
        # (S, N*C/S, h*w) -> (N*C/S, S, h, w)
        out = out.transpose(0, 1).reshape(n * c // s, s, h, w)
        if self.norm is not None:
            out = self.norm(out)
        # (N*C/S, S, h, w) -> (N, C, h, w)
        out = out.reshape(n, c, h, w)
        return out if self.local_perceptron is None else out + self.local_perceptron(x)

    def merged(self, branches: bool = True, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return weight (S, h*w, h*w) and bias (S, h*w) of the merged layer without changing this one.

        branches: False leaves the convolutions out, so that the FC can be seen before the injection on the same scale.
        out: where the weight goes, see merge_branches.
        Differentiable in every parameter where gradients are enabled.
        """
        check_parameters(self)
        norm = None if self.norm is None else batch_norm_stats(self.norm)
        local = self.local_perceptron.branches() if branches and self.local_perceptron is not None else []
        return merge_branches(self.weight, self.bias, local, self.size, norm, groups=self.share_sets, out=out)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Merge the branches and the batch norms into weight and bias, in place. Does nothing the second time.

        Paper: RepMLPNet Eq. 12-14. Float64 arithmetic, rounded once to the weight's dtype. The weight's own memory is
        overwritten, so that merging needs a few MiB however large the layer: clone a state_dict() that is to be kept.
        The weight stays the same Parameter, so an optimizer made before trains it on; a bias that was not there is a
        new one, which has to be added to the optimizer: optimizer.add_param_group({"params": [layer.bias]}).
        Raises RuntimeError in training mode, where the batch norms' running statistics are not what forward() uses;
        ValueError for weights that are computed from others, see check_parameters.
        """
        if self.norm is None and self.local_perceptron is None:
            return
        if self.training:
            raise RuntimeError("the model is in training mode: call model.eval() before reparameterize()")
        check_parameters(self)
        weight, bias = self.merged(out=self.weight if self.weight.is_contiguous() else None)
        set_parameter(self, "weight", weight)
        set_parameter(self, "bias", bias)
        self.norm = None
        self.local_perceptron = None


class GlobalPerceptron(nn.Module):
    """Channel weights from the pooled map: average pool -> FC1 -> ReLU -> FC2 -> sigmoid.

    Paper: RepMLPNet Section 4, "Global Perceptron"; both layers have biases.

    channels: C. reduction: C/reduction inner features (4 in the paper).
    Input (N, C, H, W), output (N, C, 1, 1) in (0, 1).
    """

    def __init__(self, channels: int, reduction: int = 4):
        super().__init__()
        if channels % reduction:
            raise ValueError(f"{channels} channels cannot be divided by the Global Perceptron's reduction {reduction}")
        self.fc1 = nn.Linear(channels, channels // reduction)
        self.fc2 = nn.Linear(channels // reduction, channels)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(dim=(2, 3))
        gate = torch.sigmoid(self.fc2(F.relu(self.fc1(pooled))))
        # (N, C) -> (N, C, 1, 1)
        return gate[:, :, None, None]


# What decides by the size of a map stands in functions of its own, which torch.fx keeps as calls: so its graph decides
# anew for each input, as the layer does.


@torch.fx.wrap
def sets_first(x: Tensor, share_sets: int, size: tuple[int, int]) -> Tensor:
    """Sort maps by share-set: (N, C, h, w) -> (S, N*C/S, h*w), a view where it can be.

    Channel c is member c // S of set c mod S.
    Raises ValueError where S does not divide the channels, or the maps have another size.
    """
    n, c, h, w = x.shape
    if c % share_sets != 0 or h != size[0] or w != size[1]:
        raise ValueError(
            f"got maps of {c} channels and size ({h}, {w}); {share_sets} share-sets have to divide the channels, and "
            f"the size has to be ({size[0]}, {size[1]}) (RepMLPBlock cuts other sizes into partitions)"
        )
    return x.reshape(n * (c // share_sets), share_sets, h * w).transpose(0, 1)


@torch.fx.wrap
def copies(kernel: Tensor, number: int) -> Tensor:
    """Repeat the kernels of S sets for all channels: (S, 1, kh, kw) -> (number*S, 1, kh, kw)."""
    return kernel.repeat(fixed(number), 1, 1, 1)


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


@torch.fx.wrap
def cut_into_tiles(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut maps into h x w partitions, padded with zeros at the bottom and right: (N, C, H, W) -> (N*tiles, C, h, w).

    A map of that size is returned as it is.
    """
    n, c, height, width = x.shape
    h, w = size
    if height == h and width == w:
        return of_size(x, h, w)
    rows, columns = tiles_of((height, width), size)
    x = F.pad(x, (0, columns * w - width, 0, rows * h - height))
    # (N, C, rows*h, columns*w) -> (N*rows*columns, C, h, w): tiles join the batch, never the channels
    return x.view(n, c, rows, h, columns, w).permute(0, 2, 4, 1, 3, 5).reshape(n * rows * columns, c, h, w)


@torch.fx.wrap
def join_tiles(tiles: Tensor, map_size: tuple[int, int]) -> Tensor:
    """Put partitions together again and crop the padding: (N*tiles, C, h, w) -> (N, C, H, W)."""
    m, c, h, w = tiles.shape
    height, width = map_size
    if height == h and width == w:
        return tiles
    rows, columns = tiles_of(map_size, (h, w))
    # (N*rows*columns, C, h, w) -> (N, C, rows*h, columns*w)
    x = tiles.view(m // (rows * columns), rows, columns, c, h, w).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(m // (rows * columns), c, rows * h, columns * w)[:, :, :height, :width]


def tiles_of(map_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return how many rows and columns of h x w partitions cover an H x W map."""
    # no division of negative numbers, which ONNX rounds towards zero
    return (map_size[0] + size[0] - 1) // size[0], (map_size[1] + size[1] - 1) // size[1]


class RepMLPBlock(nn.Module):
    """Global Perceptron, Channel Perceptron and Local Perceptron over partitions of the trained size.

    Paper: RepMLPNet Section 4 and Figure 2. A map larger than `size` is cut into h x w tiles that share the FC; the
    Global Perceptron pools over the whole map. A map that is no whole number of tiles is padded with zeros at the
    bottom and right, and cropped back; the Global Perceptron never sees the padding.

    channels: C. size: (h, w) of a partition. share_sets: S, divides C. kernels: the branches, see LocalPerceptron; ()
    for none. A shuffled one permutes the positions of each partition.
    global_perceptron: whether there is one. inference_mode: build the merged form.
    Input and output (N, C, H, W), any H and W.
    Raises ValueError where S does not divide C, and for kernels that are no branches, there twice or do not fit.
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        share_sets: int = 1,
        kernels: Iterable[BranchSpec | int | str] = (1, 3),
        *,
        global_perceptron: bool = True,
        inference_mode: bool = False,
    ):
        super().__init__()
        if share_sets < 1 or channels % share_sets:
            raise ValueError(f"share_sets={share_sets} does not divide channels={channels}")
        self.channel_perceptron = SetSharingFC(size, share_sets, kernels, inference_mode=inference_mode)
        self.global_perceptron = GlobalPerceptron(channels) if global_perceptron else None

    def forward(self, x: Tensor) -> Tensor:
        gate = None if self.global_perceptron is None else self.global_perceptron(x)
        out = self._tiled(x)
        return out if gate is None else out * gate

    def _tiled(self, x: Tensor) -> Tensor:
        """Apply the Channel Perceptron to every tile: (N, C, H, W) -> (N, C, H, W)."""
        return join_tiles(
            self.channel_perceptron(cut_into_tiles(x, self.channel_perceptron.size)), (x.shape[2], x.shape[3])
        )

    def reparameterize(self) -> None:
        """Merge the Channel and the Local Perceptron into one FC with bias; see SetSharingFC.reparameterize."""
        self.channel_perceptron.reparameterize()
