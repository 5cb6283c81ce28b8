"""The older block, RepMLP: a dense group-wise fully-connected layer over partitions, with convolutions beside it.

Paper: "RepMLP: Re-parameterizing Convolutions into Fully-connected Layers for Image Recognition" (arXiv 2105.01883),
Section 3. Three parts: the Global Perceptron lets partitions know of each other (FC1, FC2), the Partition Perceptron
maps every partition (FC3), the Local Perceptron adds convolutions. `reparameterize()` leaves FC1, FC2 and FC3 alone.
Unlike the set-sharing FC of RepMLPNet, FC3 mixes the channels of a group with the positions of a partition.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from repmlp.branches import BranchSpec, parse_all
from repmlp.local_perceptron import reordered, shuffled_grid
from repmlp.maps import cut_into_tiles, join_tiles, tiles_of
from repmlp.parameters import batch_norm_stats, check_parameters, set_parameter
from repmlp.reparam import Branch, fuse_bn, inverse_permutation, merge_branches

for _name in ("cut_into_tiles", "join_tiles"):
    torch.fx.wrap(_name)


@torch.fx.wrap
def of_shape(x: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """Return maps (N, C, h, w) as they are; ValueError where they have other channels or another size."""
    if x.shape[1] != channels or x.shape[2] != size[0] or x.shape[3] != size[1]:
        raise ValueError(
            f"got maps of shape {(x.shape[1], x.shape[2], x.shape[3])}, this layer takes "
            f"{(channels, size[0], size[1])} (RepMLP cuts larger maps into partitions)"
        )
    return x


@torch.fx.wrap
def of_partitions(x: Tensor, size: tuple[int, int], partitions: tuple[int, int]) -> Tensor:
    """Return maps (N, C, H, W) as they are; ValueError where they have another number of h x w partitions."""
    rows, columns = tiles_of((x.shape[2], x.shape[3]), size)
    if rows != partitions[0] or columns != partitions[1]:
        raise ValueError(
            f"a {x.shape[2]}x{x.shape[3]} map has {rows}x{columns} partitions of {size[0]}x{size[1]}, this RepMLP is "
            f"built for {partitions[0]}x{partitions[1]}: FC1 and FC2 depend on it, see repmlp.resize_partitions"
        )
    return x


@torch.fx.wrap
def added_to_partitions(x: Tensor, given: Tensor, size: tuple[int, int]) -> Tensor:
    """Add what each partition is given to all of its cells: (N, C, H, W), (N, C, rows, columns) -> (N, C, H, W)."""
    n, c, height, width = x.shape
    rows, columns = given.shape[2], given.shape[3]
    # (N, C, rows, columns) -> (N, C, rows, h, columns, w) -> (N, C, rows*h, columns*w), cut to the map
    given = given[:, :, :, None, :, None].expand(-1, -1, -1, size[0], -1, size[1])
    return x + given.reshape(n, c, rows * size[0], columns * size[1])[:, :, :height, :width]


class PartitionGlobalPerceptron(nn.Module):
    """What each channel of each partition gets from all the others: pool -> BN -> FC1 -> ReLU -> FC2.

    Paper: RepMLP Section 3.2, "Global Perceptron". The numbers of an image stand in the order (channel, row of the
    partition, column of the partition). A partition that the map's border cuts is pooled over the cells that exist.

    channels: C. size: (h, w) of a partition. partitions: (rows, columns) of them. reduction: FC1 has
    C*rows*columns/reduction outputs; 1 in the paper's classifiers. inference_mode: build it without the batch norm.
    Input (N, C, H, W), output (N, C, rows, columns).
    Raises ValueError where the reduction does not divide C*rows*columns.
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        partitions: tuple[int, int],
        reduction: int = 1,
        *,
        inference_mode: bool = False,
    ):
        super().__init__()
        self.size, self.partitions, self.reduction = size, partitions, reduction
        features = channels * partitions[0] * partitions[1]
        if reduction < 1 or features % reduction:
            raise ValueError(
                f"global_reduction={reduction} does not divide the {features} numbers that the Global Perceptron pools"
            )
        self.norm = None if inference_mode else nn.BatchNorm2d(channels)
        self.fc1 = nn.Linear(features, features // reduction)
        self.fc2 = nn.Linear(features // reduction, features)

    def forward(self, x: Tensor) -> Tensor:
        # the cells beyond the border are in no mean: ceil_mode lets windows cross it, and they are not counted
        x = F.avg_pool2d(x, self.size, self.size, ceil_mode=True, count_include_pad=False)
        if self.norm is not None:
            x = self.norm(x)
        # (N, C, rows, columns) -> (N, C*rows*columns) -> (N, C, rows, columns)
        return self.fc2(F.relu(self.fc1(x.flatten(1)))).view_as(x)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold the batch norm into FC1: FC1' = FC1 diag(a), bias + FC1 b. See PartitionPerceptron.reparameterize."""
        if self.norm is None:
            return
        _check_evaluation(self)
        check_parameters(self.fc1)
        scale, shift = batch_norm_stats(self.norm).affine(torch.float64)
        # (C,) -> (C*rows*columns,): the batch norm comes before the flattening
        scale, shift = (t.repeat_interleave(self.partitions[0] * self.partitions[1]) for t in (scale, shift))
        weight = self.fc1.weight.double()
        self.fc1.bias.copy_(self.fc1.bias.double() + weight @ shift)
        self.fc1.weight.copy_(weight * scale)
        self.norm = None


class GroupLocalPerceptron(nn.Module):
    """Parallel group-wise convolutions, each followed by a batch norm, summed.

    Paper: RepMLP Section 3.3, "Local Perceptron". Shuffled branches see the partition in the order of the buffer
    `permutation`, as in repmlp.local_perceptron.LocalPerceptron.

    in_channels, out_channels: C, O. groups: divides both. kernels: branches, see repmlp.branches. size: (h, w).
    Input (N, C, h, w), output (N, O, h, w).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        groups: int,
        kernels: Iterable[BranchSpec | int | str],
        size: tuple[int, int],
    ):
        super().__init__()
        self.specs, self.size = parse_all(kernels), size
        self.shuffled = [spec.shuffled for spec in self.specs]  # apart from the specs, which TorchScript cannot read
        self.convs = nn.ModuleDict()
        for spec in self.specs:
            self.convs[str(spec.value)] = nn.Conv2d(
                in_channels,
                out_channels,
                spec.shape,
                padding=spec.padding,
                dilation=spec.dilation,
                groups=groups,
                bias=False,
            )
        self.norms = nn.ModuleDict({name: nn.BatchNorm2d(out_channels) for name in self.convs})
        shuffled = any(spec.shuffled for spec in self.specs)
        self.register_buffer("permutation", torch.empty(size[0] * size[1], dtype=torch.int64) if shuffled else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the order of the shuffled grid, the one thing here that belongs to no convolution or batch norm."""
        if self.permutation is not None:
            self.permutation.copy_(shuffled_grid(self.size))

    def forward(self, x: Tensor) -> Tensor:
        source, back = x, None
        if self.permutation is not None:
            source, back = reordered(x, self.permutation), inverse_permutation(self.permutation)
        out: Tensor | None = None
        for i, (conv, norm) in enumerate(zip(self.convs.values(), self.norms.values())):  # noqa: B905 (TorchScript)
            shuffled = self.shuffled[i]
            y = conv(source if shuffled else x)
            if shuffled and back is not None:
                y = reordered(y, back)
            y = norm(y)
            out = y if out is None else out + y
        assert out is not None  # there is a branch
        return out

    def branches(self) -> list[Branch]:
        """Return the convolutions as plain tensors, ready for `reparam.merge_branches`."""
        found = []
        for spec, (name, conv) in zip(self.specs, self.convs.items(), strict=True):
            check_parameters(conv)
            order = self.permutation if spec.shuffled else None
            found.append(Branch(conv.weight, None, batch_norm_stats(self.norms[name]), spec.dilation, order))
        return found


class PartitionPerceptron(nn.Module):
    """FC3: each group of channels of a partition mapped densely to a group of outputs, with convolutions beside it.

    Paper: RepMLP Sections 3.2 and 3.3, "Partition Perceptron" and "Local Perceptron". Initial weights are orthogonal,
    group by group. The batch norm has a feature for every output number, O*h*w.

    in_channels, out_channels: C, O. size: (h, w) of a partition. groups: g, divides both. kernels: branches, see
    repmlp.branches; () for none. inference_mode: build the merged form (weight and bias only).

    Weight (g, O/g*h*w, C/g*h*w), rows and columns in the order (channel within the group, y, x); bias (g, O/g*h*w).
    Input (N, C, h, w), output (N, O, h, w).
    Raises ValueError where g does not divide the channels, or a kernel is none or larger than a partition.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: tuple[int, int],
        groups: int = 1,
        kernels: Iterable[BranchSpec | int | str] = (1, 3, 5),
        *,
        inference_mode: bool = False,
    ):
        super().__init__()
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(f"groups={groups} does not divide {in_channels} input and {out_channels} output channels")
        self.in_channels, self.out_channels, self.groups, self.size = in_channels, out_channels, groups, size
        specs = check_partition_kernels(kernels, size)
        positions = size[0] * size[1]
        shape = (groups, out_channels // groups * positions, in_channels // groups * positions)
        self.weight = nn.Parameter(torch.empty(shape))
        self.register_parameter("bias", nn.Parameter(torch.empty(shape[:2])) if inference_mode else None)
        self.norm = None if inference_mode else nn.BatchNorm1d(out_channels * positions)
        self.local_perceptron = (
            GroupLocalPerceptron(in_channels, out_channels, groups, specs, size)
            if specs and not inference_mode
            else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw an orthogonal matrix for each group; zero the bias."""
        for matrix in self.weight.detach():
            nn.init.orthogonal_(matrix)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.jit.unused
    @property
    def kernels(self) -> tuple[int | str, ...]:
        """Return the branches that are there now, as configurations spell them: () once merged."""
        return () if self.local_perceptron is None else tuple(spec.value for spec in self.local_perceptron.specs)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, size={self.size}, groups={self.groups}"

    def forward(self, x: Tensor) -> Tensor:
        x = of_shape(x, self.in_channels, self.size)
        n = x.shape[0]  # not len(), which torch.export takes for a constant
        # (N, C, h, w) -> (g, N, C/g*h*w)
        maps = x.reshape(n, self.groups, -1).transpose(0, 1)
        if self.bias is None:
            out = torch.bmm(maps, self.weight.transpose(1, 2))
        else:
            out = torch.baddbmm(self.bias.unsqueeze(1), maps, self.weight.transpose(1, 2))
        # (g, N, O/g*h*w) -> (N, O*h*w)
        out = out.transpose(0, 1).reshape(n, -1)
        if self.norm is not None:
            out = self.norm(out)
        # (N, O*h*w) -> (N, O, h, w)
        out = out.view(n, self.out_channels, self.size[0], self.size[1])
        return out if self.local_perceptron is None else out + self.local_perceptron(x)

    def merged(self, branches: bool = True) -> tuple[Tensor, Tensor]:
        """Return weight (g, O/g*h*w, C/g*h*w) and bias (g, O/g*h*w) of the merged layer without changing this one.

        branches: False leaves the convolutions out, so that FC3 can be seen before the injection on the same scale.
        Float64 arithmetic, rounded once; differentiable in every parameter where gradients are enabled.
        """
        check_parameters(self)
        norm = None if self.norm is None else batch_norm_stats(self.norm)
        bias = None if self.bias is None else self.bias.flatten()
        # its features are the rows of all groups: (g, O/g*h*w, C/g*h*w) -> (O*h*w, C/g*h*w)
        weight, bias = fuse_bn(self.weight.flatten(0, 1), bias, norm, torch.float64)
        weight, bias = weight.view_as(self.weight), bias.view(self.groups, -1)
        if branches and self.local_perceptron is not None:
            local = self.local_perceptron.branches()
            weight, bias = merge_branches(weight, bias, local, self.size, groups=self.groups)
        return weight.to(self.weight.dtype), bias.to(self.weight.dtype)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Merge the branches and the batch norms into weight and bias, in place. Does nothing the second time.

        Paper: RepMLP Section 3.4. Float64 arithmetic, rounded once to the weight's dtype.
        Raises RuntimeError in training mode, where the batch norms' running statistics are not what forward() uses.
        """
        if self.norm is None and self.local_perceptron is None:
            return
        _check_evaluation(self)
        weight, bias = self.merged()
        set_parameter(self, "weight", weight)
        set_parameter(self, "bias", bias)
        self.norm = None
        self.local_perceptron = None


class RepMLP(nn.Module):
    """Global, Partition and Local Perceptron over the partitions of a map.

    Paper: RepMLP Section 3 and Figure 1. The Global Perceptron is there only where the map has more than one partition;
    what it gives is added to every cell of the partition. A map that is no whole number of partitions is padded with
    zeros at the bottom and right and cropped back: the padded cells are in no mean, and stay zero after the addition.

    in_channels, out_channels: C, O. map_size: (H, W) of the maps that it is built for. size: (h, w) of a partition.
    groups: g, divides both. kernels: branches, see repmlp.branches; () for none. global_perceptron: False for none,
    however many partitions there are. global_reduction: of the length between FC1 and FC2.
    inference_mode: build the merged form: FC1, FC2 and FC3, each with a bias.

    Input (N, C, H, W), output (N, O, H, W): other H and W with the same number of partitions go through too; any,
    without a Global Perceptron by choice.
    Raises ValueError where a partition is larger than the map, as PartitionPerceptron does, and in forward() for a map
    with another number of partitions.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        map_size: tuple[int, int],
        size: tuple[int, int],
        groups: int = 1,
        kernels: Iterable[BranchSpec | int | str] = (1, 3, 5),
        *,
        global_perceptron: bool = True,
        global_reduction: int = 1,
        inference_mode: bool = False,
    ):
        super().__init__()
        self.size = check_partition(size, map_size)
        self.in_channels, self.global_reduction = in_channels, global_reduction
        self.partitions = tiles_of(map_size, self.size)
        self.any_map = not global_perceptron
        self.global_perceptron = None
        if global_perceptron and self.partitions != (1, 1):
            self.global_perceptron = PartitionGlobalPerceptron(
                in_channels, self.size, self.partitions, global_reduction, inference_mode=inference_mode
            )
        self.partition_perceptron = PartitionPerceptron(
            in_channels, out_channels, self.size, groups, kernels, inference_mode=inference_mode
        )

    def forward(self, x: Tensor) -> Tensor:
        map_size = (x.shape[2], x.shape[3])
        if not self.any_map:
            x = of_partitions(x, self.size, self.partitions)
        if self.global_perceptron is not None:
            x = added_to_partitions(x, self.global_perceptron(x), self.size)
        return join_tiles(self.partition_perceptron(cut_into_tiles(x, self.size)), map_size)

    def set_map_size(self, map_size: tuple[int, int], global_reduction: int | None = None) -> str | None:
        """Build FC1 and FC2 anew for maps of another size, in place, where the number of partitions asks for it.

        global_reduction: None keeps it.
        Returns "fresh" where FC1 and FC2 are new (the batch norm before them stays, if there was one), "removed" where
        one partition needs none, None where nothing has changed.
        Raises ValueError where a partition is larger than the map, or fresh layers were needed in a merged block: they
        have to be trained.
        """
        check_partition(self.size, map_size)
        partitions = tiles_of(map_size, self.size)
        reduction = global_reduction or self.global_reduction
        if self.any_map or (partitions == self.partitions and reduction == self.global_reduction):
            self.partitions = partitions
            return None
        old, new, weight = self.global_perceptron, None, self.partition_perceptron.weight
        if partitions != (1, 1):
            if self.partition_perceptron.norm is None:
                raise ValueError(
                    "the block is merged, and other maps need fresh FC1 and FC2, which have to be trained: change the "
                    "size of the train-time model"
                )
            new = PartitionGlobalPerceptron(self.in_channels, self.size, partitions, reduction)
            new = new.to(weight.device, weight.dtype).train(self.training)
            if old is not None:
                new.norm = old.norm
        self.partitions, self.global_reduction, self.global_perceptron = partitions, reduction, new
        if new is not None:
            return "fresh"
        return None if old is None else "removed"

    def reparameterize(self) -> None:
        """Merge everything into FC1, FC2 and FC3; see PartitionPerceptron.reparameterize."""
        if self.global_perceptron is not None:
            self.global_perceptron.reparameterize()
        self.partition_perceptron.reparameterize()


def check_partition(size: Sequence[int], map_size: Sequence[int]) -> tuple[int, int]:
    """Return (h, w) of a partition; ValueError where it is none, or larger than the map."""
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"partition {tuple(size)}: use two positive numbers, (height, width)")
    if size[0] > map_size[0] or size[1] > map_size[1]:
        raise ValueError(
            f"a partition of {size[0]}x{size[1]} is larger than the {map_size[0]}x{map_size[1]} map: use a smaller "
            "partition, or larger images"
        )
    return int(size[0]), int(size[1])


def check_partition_kernels(kernels: Iterable[BranchSpec | int | str], size: tuple[int, int]) -> tuple[BranchSpec, ...]:
    """Return the branches, sorted; ValueError for one that is none, there twice, or larger than a partition."""
    specs = parse_all(kernels)
    for spec in specs:
        # from the first tap to the last
        height, width = (2 * reach + 1 for reach in spec.padding)
        if height > size[0] or width > size[1]:
            raise ValueError(
                f"branch {spec.label} covers {height}x{width} cells, a partition has {size[0]}x{size[1]}: use a "
                "smaller kernel"
            )
    return specs


def _check_evaluation(module: nn.Module) -> None:
    if module.training:
        raise RuntimeError("the model is in training mode: call model.eval() before reparameterize()")
