"""Merge the branches in the middle of training, and go on with the bare fully-connected layers.

Not in the papers, which merge after training. What it asks: for how long does training need the convolutions? That a
convolution is relaxed into a fully-connected layer midway: d'Ascoli et al., "Transformed CNNs", 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import lightning as L
import torch
from torch import Tensor, nn

from repmlp.injection import InjectedLinear
from repmlp.layers import SetSharingFC

BATCHES = 20  # what the batch norms are measured on


@torch.no_grad()
def merge_midway(
    net: nn.Module, batches: Callable[[], Iterable[Tensor]], calibrate: bool = False
) -> list[nn.Parameter]:
    """Merge all branches into their FC so that the FC can be trained on, in place.

    Every weight becomes the merged one, W*. Where a batch norm stood behind the FC, a fresh one stands behind W*: its
    running statistics are the mean and variance of W* x over `batches`, its scale and shift such that the network
    computes what it computed in evaluation mode. An FC without a batch norm gets the merged bias.

    net: RepMLPNet, or any network with InjectedLinear layers; a net without branches gets fresh batch norms alone.
    batches: called for each pass, gives images (N, 3, H, W). calibrate: first set the statistics of all batch norms to
    the averages over `batches`; for a net that has not been trained, whose running statistics say nothing.
    Returns the parameters whose moments an optimiser has to forget: W*, its bias and its batch norm's.
    Raises ValueError for a net without such layers, or one that is merged for good, by reparameterize().
    """
    layers = [module for module in net.modules() if isinstance(module, (SetSharingFC, InjectedLinear))]
    if not layers:
        raise ValueError(f"merge_after: {type(net).__name__} has no fully-connected layers that branches merge into")
    training = {module: module.training for module in net.modules()}
    net.eval()
    if calibrate:
        _calibrate(net, batches)
    changed = [parameter for layer in layers for parameter in _merge(layer)]
    _measure([layer.norm for layer in layers if getattr(layer, "norm", None) is not None], net, batches)
    for module, mode in training.items():
        module.training = mode
    return changed


def drop_branches(net: nn.Module) -> None:
    """Take the branches away, as `merge_midway` leaves a net, to load such a net's weights into it."""
    for module in net.modules():
        if isinstance(module, (SetSharingFC, InjectedLinear)):
            module.local_perceptron = None


def _calibrate(net: nn.Module, batches: Callable[[], Iterable[Tensor]]) -> None:
    """Set the running statistics of all batch norms to their averages over some batches."""
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the average of all batches
        norm.train()
    for images in batches():
        net(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def _merge(layer: SetSharingFC | InjectedLinear) -> list[nn.Parameter]:
    """Merge one layer; a batch norm behind it only adds the merged bias until it is measured."""
    weight, bias = layer.merged()
    layer.weight.copy_(weight.view_as(layer.weight))
    layer.local_perceptron = None
    norm = getattr(layer, "norm", None)
    if norm is None:
        if layer.bias is None:
            raise ValueError("merge_after: a layer without batch norm and bias cannot take the bias of its branches")
        layer.bias.copy_(bias.view_as(layer.bias))
        return [layer.weight, layer.bias]
    # Convolutions and the batch norm add the same at all positions: (S, h*w) -> (S,)
    norm.bias.copy_(bias.mean(dim=1))
    norm.weight.fill_(1)
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)
    return [layer.weight, norm.weight, norm.bias]


def _measure(norms: list[nn.BatchNorm2d], net: nn.Module, batches: Callable[[], Iterable[Tensor]]) -> None:
    """Give batch norms that only add their bias the statistics of their input, without changing what they compute."""
    sums = {norm: torch.zeros(3, norm.num_features, dtype=torch.float64, device=norm.weight.device) for norm in norms}

    def add(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        x = inputs[0].double()  # (N*C/S, S, h, w)
        count = torch.full_like(sums[norm][0], x.numel() // x.shape[1])
        sums[norm] += torch.stack([count, x.sum(dim=(0, 2, 3)), x.square().sum(dim=(0, 2, 3))])

    handles = [norm.register_forward_pre_hook(add) for norm in norms]
    for images in batches() if norms else ():
        net(images)
    for handle in handles:
        handle.remove()
    for norm, (count, total, squares) in sums.items():
        mean = total / count
        variance = squares / count - mean.square()
        # y = x + bias = (x - mean) / root * root + (mean + bias)
        norm.bias.copy_(norm.bias + mean)
        norm.weight.copy_((variance + norm.eps).sqrt())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.num_batches_tracked.zero_()


class MergeMidway(L.Callback):
    """Merge the branches before an epoch of training and go on with the bare FCs; kept in checkpoints.

    The moments of W* and of its new batch norm start anew in the optimiser; all others, the schedule and the groups of
    weight decay go on. epoch: the first one without branches, 0 for all. batches: of images, see merge_midway.
    """

    def __init__(self, epoch: int, batches: Callable[[], Iterable[Tensor]]):
        self.epoch, self.batches = epoch, batches
        self.merged = False

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.merged or trainer.current_epoch < self.epoch:
            return
        before = set(module.net.parameters())
        changed = merge_midway(
            module.net, lambda: (images.to(module.device) for images in self.batches()), calibrate=self.epoch == 0
        )
        gone = before - set(module.net.parameters())
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["params"] = [parameter for parameter in group["params"] if parameter not in gone]
            for parameter in (*gone, *changed):
                optimizer.state.pop(parameter, None)
        self.merged = True

    def state_dict(self) -> dict[str, bool]:
        return {"merged": self.merged}

    def load_state_dict(self, state: dict[str, bool]) -> None:
        self.merged = state["merged"]
