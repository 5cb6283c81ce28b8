"""The face networks: counts as measured on the older code, shapes, merging."""

import pytest
import timm
import torch
from conftest import randomise_norms
from torch import nn

from repmlp import RepMLP, fold_batch_norms
from repmlp.cost import count_macs, count_params
from repmlp.models.face import InvertedResidual, MobileFaceNet

# of the folded body without an embedding: parameters in M, MACs in G
COUNTS = {"faceresnet_96": (30.84, 0.998), "repmlp_faceres_96": (64.78, 1.088)}


def on_meta(name: str, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs).eval()


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_the_measured_ones(name):
    model = on_meta(name)
    folded = fold_batch_norms(model)
    assert (round(count_params(folded) / 1e6, 2), round(count_macs(folded, 96) / 1e9, 3)) == COUNTS[name]
    with torch.device("meta"):
        maps = on_meta(name, features_only=True)(torch.empty(1, 3, 96, 96))
        assert [tuple(m.shape[1:]) for m in maps[1:]] == [(128, 24, 24), (256, 12, 12), (512, 6, 6), (1024, 3, 3)]
        assert tuple(on_meta(name, num_classes=256)(torch.empty(2, 3, 96, 96)).shape) == (2, 256)


def test_blocks_of_repmlp_faceres():
    """Every stride-1 bottleneck of c2, c3 and c4: 2 + 1 + 1, with 16, 4 and 1 partitions."""
    blocks = [m for m in on_meta("repmlp_faceres_96").modules() if isinstance(m, RepMLP)]
    assert [b.partitions for b in blocks] == [(4, 4), (4, 4), (2, 2), (1, 1)]
    assert [b.in_channels for b in blocks] == [64, 64, 128, 256]
    assert {b.partition_perceptron.groups for b in blocks} == {4}


@torch.no_grad()
def test_mobilefacenet():
    model = randomise_norms(timm.create_model("mobilefacenet_96")).double().eval()
    x = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    expected = model(x)
    assert expected.shape == (1, 128)
    folded = fold_batch_norms(model)
    assert float((folded(x) - expected).norm() / expected.norm()) < 1e-12
    # by hand, without biases and PReLU: what the description says, layer by layer
    weights = 3 * 64 * 9 + 64 * 9
    macs, channels, side = 48**2 * weights, 64, 48
    for expansion, width, repeats, stride in (
        (2, 64, 5, 2),
        (4, 128, 1, 2),
        (2, 128, 6, 1),
        (4, 128, 1, 2),
        (2, 128, 2, 1),
    ):
        for i in range(repeats):
            hidden, before = channels * expansion, side
            side //= stride if i == 0 else 1
            weights += channels * hidden + 9 * hidden + hidden * width
            macs += before**2 * channels * hidden + side**2 * (9 * hidden + hidden * width)
            channels = width
    assert side == 6
    weights += 128 * 512 + 36 * 512 + 512 * 128
    macs += 36 * 128 * 512 + 36 * 512 + 512 * 128
    assert sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d)) == weights
    assert count_macs(model.float(), 96) == macs
    grey = timm.create_model("mobilefacenet_96", num_classes=64, in_chans=1).eval()
    assert grey(x[:, :1].float()).shape == (1, 64)


@torch.no_grad()
def test_inverted_residual_has_a_shortcut_where_shapes_agree():
    for arguments, shortcut in (((8, 8, 2, 1), True), ((8, 8, 2, 2), False), ((8, 4, 2, 1), False)):
        block = randomise_norms(InvertedResidual(*arguments)).eval()
        nn.init.zeros_(block[-1].weight)
        nn.init.zeros_(block[-1].bias)
        x = torch.randn(1, 8, 6, 6)
        assert torch.equal(block(x), x if shortcut else torch.zeros_like(block(x)))


def test_every_parameter_gets_a_gradient():
    model = randomise_norms(MobileFaceNet()).eval()  # in training a batch norm takes the shift before it away
    model(torch.randn(2, 3, 96, 96)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
