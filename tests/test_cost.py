"""Multiply-accumulates against torch's own counter, for the layers that networks here are made of."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from repmlp import RepMLPNet, RepMLPResNet
from repmlp.cost import count_macs

NARROW = {"layers": (2, 2, 2, 2), "channels": (16, 16, 16, 32), "num_classes": 5, "img_size": 64, "partition": 2}
NETS = {
    "repmlpnet": lambda: RepMLPNet(channels=(8, 16), blocks=(1, 1), share_sets=(2, 4), kernels=(1, "3s", "3d2")),
    "repmlp_resnet": lambda: RepMLPResNet(**NARROW, kernels=(1,), groups=2),
    **{
        name: lambda name=name, more=more: timm.create_model(name, **more)
        for name, more in {
            "resnet10t": {},  # batch norms
            "convnext_atto": {},  # depth-wise convolutions, layer norms
            "vit_tiny_patch16_224": {"img_size": 64, "depth": 1},  # attention
            "gmlp_12_patch4_32": {"num_blocks": 1},  # gates over positions
        }.items()
    },
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", NETS)
def test_macs_are_half_of_what_torch_counts(name, device):
    """Where torch computes, and where it computes nothing; the network is left in its mode, on its device."""
    side = 32 if name in ("repmlpnet", "gmlp_12_patch4_32") else 64
    with torch.device(device):
        net = NETS[name]().train()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        copy.deepcopy(net).eval()(torch.zeros(1, 3, side, side, device=device))
    assert count_macs(net, side) == counter.get_total_flops() // 2 > 10_000
    assert net.training and {p.device.type for p in net.parameters()} == {device}


def test_other_layers_are_counted_by_hand():
    """Norms and activations are free; a batch norm without statistics of its own is one too."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, groups=1), nn.BatchNorm2d(4, track_running_stats=False))
    net.extend([nn.GELU(), nn.Conv2d(4, 4, 1, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)])
    assert count_macs(net, (6, 10)) == 6 * 10 * (3 * 4 * 9 + 4 * 2) + 4 * 5
