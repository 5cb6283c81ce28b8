"""The building blocks of Locality Injection: the set-sharing FC with its convolution branches, the Global Perceptron,
and the RepMLPNet block made of them.

Paper: RepMLPNet (arXiv 2112.11081), Sections 3.2-3.4 and 4. While training, a fully-connected layer over the map has
convolutions beside it; `reparameterize()` adds them into its weight, after which nothing of them is left.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from repmlp.branches import BranchSpec, parse_all
from repmlp.local_perceptron import LocalPerceptron
from repmlp.maps import cut_into_tiles, join_tiles, sets_first
from repmlp.parameters import batch_norm_stats, check_parameters, set_parameter
from repmlp.processor import PRODUCTS
from repmlp.products import by_convolution, convolved
from repmlp.reparam import merge_branches

for _name in ("cut_into_tiles", "join_tiles", "sets_first"):
    torch.fx.wrap(_name)
CONVOLVED_FROM = 144  # positions of a map: below, one batched product is as fast as a convolution for each share-set


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
        self.products = PRODUCTS[0]  # see products_by
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
        out = self._products(maps)
        # (S, N*C/S, h*w) -> (N*C/S, S, h, w)
        out = out.transpose(0, 1).reshape(n * c // s, s, h, w)
        if self.norm is not None:
            out = self.norm(out)
        # (N*C/S, S, h, w) -> (N, C, h, w)
        out = out.reshape(n, c, h, w)
        return out if self.local_perceptron is None else out + self.local_perceptron(x)

    def _products(self, maps: Tensor) -> Tensor:
        """Multiply the maps of each share-set with its matrix: (S, M, h*w) -> (S, M, h*w)."""
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript skips what stands below this condition alone)
            if by_convolution(self.products, maps) and maps.shape[2] >= CONVOLVED_FROM:
                # stacked as (M, S, h*w), the order that a map has in memory
                out = torch.stack([convolved(maps[i], self.weight[i]) for i in range(self.share_sets)], dim=1)
                return (out if self.bias is None else out + self.bias).transpose(0, 1)
        if self.bias is None:
            return torch.bmm(maps, self.weight.transpose(1, 2))
        return torch.baddbmm(self.bias.unsqueeze(1), maps, self.weight.transpose(1, 2))

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
