"""The form of RepMLPNet for inference: branches merged, and no batch norm left anywhere.

Paper: RepMLPNet Section 3 merges the branches; the batch norms that the published code keeps (before and inside each
unit, in the embeddings, at the head) are folded here too. What cannot be folded into a shared kernel is kept as a map,
see DeployedUnit. Biases of the residual branches are carried on as constants instead of being added to maps.
"""

from __future__ import annotations

import copy
import time

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from repmlp.deployed_ffn import ffn_with_residual
from repmlp.folding import fold_batch_norms
from repmlp.layers import CONVOLVED_FROM
from repmlp.maps import cut_into_tiles, join_tiles, sets_first
from repmlp.models.repmlpnet import ConvBNReLU, OverlappingEmbedding, RepMLPNet, RepMLPNetUnit
from repmlp.parameters import batch_norm_stats, check_parameters, is_batch_norm
from repmlp.processor import PRODUCTS
from repmlp.products import by_convolution, check_products, convolved, usual_product
from repmlp.reparam import fuse_bn
from repmlp.repmlp_block import RepMLP
from repmlp.tracing import plain, readable


def deploy(model: nn.Module, *, products: str | None = None, tune: Tensor | None = None) -> nn.Module:
    """Return a copy for inference without batch norms; the model stays as it was, train-time or merged.

    Arithmetic in float64, rounded once to the dtype of the model. The copy takes any image size that the model takes.
    Batch norms may be torch's, SyncBatchNorm, or frozen by timm (timm.layers.freeze_batch_norm_2d).

    model: a RepMLPNet, or a network with blocks of the older RepMLP, see fold_batch_norms; in evaluation mode.
    products: how a RepMLPNet multiplies on a CPU, "linear" or "convolution" (see repmlp.products; small products
    are linear in any case); None for what suits the processor. tune: images (N, in_chans, H, W) with which
    each layer is timed in both ways to take the faster; right for that many images of that size, on this machine with
    this many threads. What records the copy (export, compile, trace) gets linear layers in any case.
    Raises TypeError for another kind of model (timm.utils.reparameterize_model merges any), RuntimeError in training
    mode, ValueError for a backbone that features_only has cut, a batch norm with an activation in it (timm's
    BatchNormAct2d), weights that are computed from others (pruning, weight norm), both products and tune, or either
    for an older network, which has one way.

    >>> net = repmlp.deploy(timm.create_model("repmlpnet_t224").eval())
    >>> logits = net(images)  # (N, 3, 224, 224) -> (N, 1000)
    """
    if products is not None:
        check_products(products)
        if tune is not None:
            raise ValueError(f"products={products!r} and tune: give one of them, tune chooses the products")
    if not isinstance(model, RepMLPNet) and any(isinstance(module, RepMLP) for module in model.modules()):
        if products is not None or tune is not None:
            raise ValueError("products and tune choose how a RepMLPNet multiplies: leave them out for older networks")
        return fold_batch_norms(model)
    if not isinstance(model, RepMLPNet):
        raise TypeError(f"deploy() takes a RepMLPNet, got {type(model).__name__}: use timm.utils.reparameterize_model")
    if model.training:
        raise RuntimeError("the model is in training mode: call model.eval() before deploy()")
    if not is_batch_norm(model.norm) or not model.global_pool:
        raise ValueError("the model has no head (features_only, or global_pool=''): deploy the whole network")
    for module in model.modules():
        check_parameters(module)
    deployed = DeployedRepMLPNet(model).eval()
    for unit in _units(deployed):
        unit.fc3_products = unit.ffn_products = products or usual_product()
    if tune is not None:
        _tune(deployed, tune)
    return deployed


def _units(net: nn.Module) -> list[DeployedUnit]:
    return [module for module in net.modules() if isinstance(module, DeployedUnit)]


@torch.inference_mode()
def _tune(net: DeployedRepMLPNet, images: Tensor) -> None:
    """Give each layer of each unit the faster of its products, by timing both on what these images are there."""
    inputs: dict[DeployedUnit, Tensor] = {}
    hooks = [
        unit.register_forward_pre_hook(lambda unit, arguments: inputs.update({unit: arguments[0]}))
        for unit in _units(net)
    ]
    net(images)
    for hook in hooks:
        hook.remove()
    for unit, x in inputs.items():
        for layer in ("fc3_products", "ffn_products"):
            seconds: dict[str, list[float]] = {way: [] for way in PRODUCTS}
            for _ in range(_ROUNDS):
                for way, so_far in seconds.items():
                    setattr(unit, layer, way)
                    start = time.perf_counter()
                    unit(x)
                    so_far.append(time.perf_counter() - start)
            # the quickest of the rounds, which other work on the machine disturbs least
            setattr(unit, layer, min(PRODUCTS, key=lambda way: min(seconds[way])))


class DeployedRepMLPNet(nn.Module):
    """What deploy() returns: (N, in_chans, H, W) -> (N, num_classes). Maps are contiguous (N, C, H, W) throughout."""

    def __init__(self, model: RepMLPNet):
        super().__init__()
        self.img_size, self.in_chans = model.img_size, model.in_chans
        self.num_classes, self.num_features = model.num_classes, model.num_features
        self.stem = Embedding(model.stem, torch.zeros_like(model.stem.conv.weight[0, :, 0, 0], dtype=torch.float64))
        self.downsamples = nn.ModuleList()
        self.stages = nn.ModuleList()
        carried = _zeros_like_channels(model.stem)
        for i, stage in enumerate(model.stages):
            if i:
                self.downsamples.append(Embedding(model.downsamples[i - 1], carried))
                carried = _zeros_like_channels(model.downsamples[i - 1])
            units = []
            for unit in stage:
                units.append(DeployedUnit(unit, carried))
                carried = carried + units[-1].carried
            self.stages.append(nn.Sequential(*units))
        # head(BN(mean(x + carried))): the batch norm is affine, so it commutes with the mean
        scale, shift = batch_norm_stats(model.norm).affine(torch.float64)
        shift = shift + scale * carried
        dtype = model.stem.conv.weight.dtype
        self.head = nn.Linear(
            model.num_features, model.num_classes or model.num_features, device=scale.device, dtype=dtype
        )
        weight, bias = (
            (model.head.weight.double(), model.head.bias.double())
            if model.num_classes
            else (torch.eye(model.num_features, dtype=torch.float64, device=scale.device), torch.zeros_like(shift))
        )
        _fill(self.head.weight, weight * scale)
        _fill(self.head.bias, bias + weight @ shift)

    @readable
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.contiguous())
        for i, stage in enumerate(self.stages):
            for j, downsample in enumerate(self.downsamples):  # TorchScript knows no self.downsamples[i - 1]
                if j + 1 == i:
                    x = downsample(x)
            x = stage(x)
        return self.head(x.mean(dim=(2, 3)))


class Embedding(nn.Module):
    """A convolution with stride and ReLU: the stem or a down-sampling, with its batch norm folded.

    An overlapping one keeps its two parts. carried: (C,) float64, what every position of the input lacks of the true
    map.
    """

    def __init__(self, embedding: ConvBNReLU | OverlappingEmbedding, carried: Tensor):
        super().__init__()
        kernel, bias = fuse_bn(embedding.conv.weight.detach(), None, batch_norm_stats(embedding.norm), torch.float64)
        self.expand = None
        if isinstance(embedding, OverlappingEmbedding):
            # what the map lacks has to be there before the depth-wise convolution puts zeros round it
            expand = embedding.expand.weight.detach().double()
            self.expand = _conv_like(embedding.expand, expand, expand.flatten(1) @ carried)
        else:
            bias = bias + kernel.sum(dim=(2, 3)) @ carried
        self.conv = _conv_like(embedding.conv, kernel, bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x if self.expand is None else self.expand(x)))


class DeployedUnit(nn.Module):
    """A unit of RepMLPNet without batch norms: maps (N, C, H, W) -> (N, C, H, W), any size.

    The batch norm before the block, BN(x) = a x + b, cannot enter an FC that many channels share. With W and beta the
    merged FC and g the gate of the Global Perceptron, the block is (g a)(W x) + g B, where B = b (W 1) + beta is a map
    for each channel that is computed once. On a padded tile the vector 1 becomes 1 on valid cells and 0 elsewhere.
    Nothing is divided by a, which may be 0.

    The last bias of the FFN is not added: `carried` (C,) float64 holds it, and whoever comes next takes it into
    account. So x stands for x + carried_in here, b for a * carried_in + b.

    unit: of a RepMLPNet. carried: (C,) float64, what every position of the input lacks of the true map.
    """

    def __init__(self, unit: RepMLPNetUnit, carried: Tensor):
        super().__init__()
        fc = unit.block.channel_perceptron
        self.size, self.share_sets = fc.size, fc.share_sets
        self.fc3_products = self.ffn_products = PRODUCTS[0]  # see deploy
        dtype = fc.weight.dtype
        weight, bias = (tensor.detach() for tensor in fc.merged())
        scale, shift = batch_norm_stats(unit.norm1).affine(torch.float64)
        shift = shift + scale * carried
        self.weight = _frozen(weight, dtype)  # (S, h*w, h*w)
        self.bias = _frozen(bias, dtype)  # (S, h*w)
        self.scale = _frozen(scale, dtype)  # (C,)
        self.shift = _frozen(shift, dtype)  # (C,)
        # row sums in float64, set by set, then (C/S, S, 1) * (S, h*w) -> (C/S, S, h*w)
        sums = torch.stack([matrix.sum(dim=1, dtype=torch.float64) for matrix in weight])
        offset = shift.view(-1, self.share_sets, 1) * sums + bias.double()
        self.offset = _frozen(offset, dtype)

        gate = unit.block.global_perceptron
        self.gate1 = self.gate2 = None
        if gate is not None:
            self.gate1, self.gate2 = copy.deepcopy(gate.fc1), copy.deepcopy(gate.fc2).requires_grad_(False)
            inner = gate.fc1.weight.double()
            _fill(self.gate1.weight, inner * scale)
            _fill(self.gate1.bias, gate.fc1.bias.double() + inner @ shift)

        scale, shift = batch_norm_stats(unit.norm2).affine(torch.float64)
        shift = shift + scale * carried
        first, first_bias = fuse_bn(unit.ffn.fc1.weight, None, batch_norm_stats(unit.ffn.norm1), torch.float64)
        second, second_bias = fuse_bn(unit.ffn.fc2.weight, None, batch_norm_stats(unit.ffn.norm2), torch.float64)
        self.ffn1 = _frozen(first * scale, dtype)  # (4C, C)
        self.ffn1_bias = _frozen((first_bias + first @ shift).unsqueeze(1), dtype)  # (4C, 1)
        self.ffn2 = _frozen(second, dtype)  # (C, 4C)
        self.carried = second_bias.detach()

    def extra_repr(self) -> str:
        return f"channels={self.scale.numel()}, size={self.size}, share_sets={self.share_sets}"

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        gate: Tensor | None = None
        if self.gate1 is not None:
            gate = torch.sigmoid(self.gate2(F.relu(self.gate1(x.mean(dim=(2, 3))))))
        tiles = cut_into_tiles(x, self.size)
        offset = offset_of_tiles(self.offset, self.weight, self.bias, self.shift, n, (height, width), self.size)
        # (N', C/S, S, h*w) -> (N', C, h, w) -> (N, C, H, W) -> (N, C, H*W)
        block = self._mix(tiles, offset).reshape(tiles.shape)
        block = join_tiles(block, (height, width)).reshape(n, c, height * width)
        x = x.reshape(n, c, height * width)
        x = x + block if gate is None else torch.addcmul(x, gate.unsqueeze(2), block)
        x = ffn_with_residual(x, self.ffn1, self.ffn1_bias, self.ffn2, self.ffn_products)
        return x.view(n, c, height, width)

    def _mix(self, x: Tensor, offset: Tensor) -> Tensor:
        """Return a (W x) + B: (N, C, h, w) -> (N, C/S, S, h*w); offset: B, broadcastable to that."""
        n, c, h, w = x.shape
        s = self.share_sets
        # a view: channel c is member c // S of set c mod S
        maps = sets_first(x, s, self.size)
        scale = self.scale.view(c // s, s, 1)
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript skips what stands below this condition alone)
            if by_convolution(self.fc3_products, x) and plain(x, offset, scale) and _worth_it(maps):
                mixed = x.new_empty(n, c // s, s, h * w)
                for i in range(s):
                    # (N*C/S, h*w) -> (N, C/S, h*w)
                    one = convolved(maps[i], self.weight[i]).view(n, c // s, h * w)
                    torch.addcmul(offset[..., i, :], scale[:, i], one, out=mixed[:, :, i])
                return mixed
        out = torch.bmm(maps, self.weight.transpose(1, 2))
        # (S, N*C/S, h*w) -> (N, C/S, S, h*w), a view
        out = out.view(s, n, c // s, h * w).permute(1, 2, 0, 3)
        return torch.addcmul(offset, scale, out)


@torch.fx.wrap
def offset_of_tiles(
    offset: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    n: int,
    map_size: tuple[int, int],
    size: tuple[int, int],
) -> Tensor:
    """Return B for every tile of a map, broadcastable to (N*tiles, C/S, S, h*w); see DeployedUnit.

    offset: B of a whole tile, (C/S, S, h*w), which is what comes back where there are no others. weight (S, h*w, h*w),
    bias (S, h*w), shift (C,): of the unit. n: N. map_size: (H, W). size: (h, w).
    """
    height, width = map_size
    h, w = size
    whole = height % h == 0 and width % w == 0
    if not torch.jit.is_scripting():
        # a trace may see maps of other sizes later; of a single tile it may not, see cut_into_tiles
        whole = whole and (not torch.jit.is_tracing() or (height == h and width == w))
    if whole:
        return offset
    share_sets = bias.shape[0]
    # (1, 1, H, W) -> (tiles, 1, h, w) -> (tiles, h*w): 1 on valid cells
    valid = cut_into_tiles(torch.ones(1, 1, height, width, dtype=weight.dtype, device=weight.device), size).flatten(1)
    # (S, h*w, h*w) x (h*w, tiles) -> (S, h*w, tiles) -> (tiles, 1, S, h*w)
    sums = torch.matmul(weight, valid.t()).permute(2, 0, 1).unsqueeze(1)
    # (C/S, S, 1) * (tiles, 1, S, h*w) -> (tiles, C/S, S, h*w) -> (N*tiles, C/S, S, h*w)
    return (shift.view(-1, share_sets, 1) * sums + bias).repeat(n, 1, 1, 1)


def _worth_it(maps: Tensor) -> bool:
    """Say whether share-sets can gain by a convolution each, which lays out its matrix anew each time."""
    return maps.shape[1] >= 256 and maps.shape[2] >= CONVOLVED_FROM


# torch.fx looks for what it is to keep as a call in the module that calls it
for _name in ("cut_into_tiles", "ffn_with_residual", "join_tiles", "sets_first"):
    torch.fx.wrap(_name)
_ROUNDS = 5  # in which _tune times the two products in turn


def _frozen(tensor: Tensor, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(tensor.detach().to(dtype).contiguous(), requires_grad=False)


def _conv_like(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """Return a frozen convolution of the same kind with other numbers, rounded once."""
    new = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        groups=conv.groups,
        device=weight.device,
        dtype=conv.weight.dtype,
    )
    _fill(new.weight, weight)
    _fill(new.bias, bias)
    return new


def _zeros_like_channels(embedding: ConvBNReLU | OverlappingEmbedding) -> Tensor:
    """Return (C,) float64 zeros: after a ReLU nothing is carried."""
    return torch.zeros(embedding.conv.out_channels, dtype=torch.float64, device=embedding.conv.weight.device)


@torch.no_grad()
def _fill(parameter: nn.Parameter, values: Tensor) -> None:
    """Round values once into a parameter, and freeze it."""
    parameter.copy_(values)
    parameter.requires_grad_(False)
