"""The deployed form against the train-time net: every map size, zero gammas, no batch norm left."""

import copy
import sys
from functools import partial

import pytest
import timm
import torch
from conftest import randomise_norms
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d, freeze_batch_norm_2d
from torch import nn
from torch.nn.utils import prune

from repmlp import RepMLPNet, deploy
from repmlp.cost import count_macs
from repmlp.deployment import DeployedUnit
from repmlp.models.mixers import build_resmlp
from repmlp.models.repmlpnet import RepMLPNetUnit

NETS = {
    "two stages": {"channels": (16, 32), "blocks": (2, 2), "share_sets": (4, 16)},
    "no Global Perceptron": {
        "channels": (16, 32), "blocks": (1, 1), "share_sets": (16, 1), "global_perceptron": False,
    },
    "branches of any kind": {"channels": (16,), "blocks": (2,), "share_sets": (2,), "kernels": (1, "3s", "1x5", "3d2")},
    "three kernels": {"channels": (16,), "blocks": (3,), "share_sets": (2,), "kernels": (1, 3, 5)},
    "no branches": {"channels": (8, 16), "blocks": (1, 2), "share_sets": (1, 2), "kernels": ()},
    "not square": {"img_size": (16, 24), "channels": (8, 16), "blocks": (1, 1), "share_sets": (2, 4)},
    "3x3 embeddings": {"channels": (8, 16, 32), "blocks": (1, 2, 1), "share_sets": (2, 4, 8), "embed_kernel": 3},
    "5x5 embeddings, no Global Perceptron": {
        "channels": (8, 16, 32), "blocks": (1, 1, 1), "share_sets": (8, 2, 1), "embed_kernel": 5,
        "global_perceptron": False,
    },
    "no classifier": {"channels": (8,), "blocks": (1,), "share_sets": (2,), "num_classes": 0},
}  # fmt: skip


def trained(dtype=torch.float64, **arguments) -> RepMLPNet:
    """A net whose batch norms have statistics far from their initial ones, and some gammas of 0."""
    net = randomise_norms(RepMLPNet(**arguments)).to(dtype).eval()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.weight.data[::3] = 0
    return net


@torch.no_grad()
def relative(net: nn.Module, other: nn.Module, x: torch.Tensor) -> float:
    expected = net(x)
    return float((other(x) - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("size", [(32, 32), (64, 32), (40, 56), (20, 12), (16, 24)])
def test_deployed_net_equals_the_trained_one_on_every_map_size(name, size):
    net = trained(**NETS[name])
    deployed = deploy(net)
    assert relative(net, deployed, torch.randn(2, 3, *size, dtype=torch.float64)) < 1e-12
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in deployed.modules())
    assert not any(p.requires_grad for p in deployed.parameters())


@pytest.mark.parametrize("name", NETS)
def test_float32_stays_within_rounding(name):
    net = trained(torch.float32, **NETS[name])
    assert relative(net, deploy(net), torch.randn(4, 3, 48, 48)) < 5e-6


units = st.fixed_dictionaries(
    {
        "h": st.integers(1, 5),
        "w": st.integers(1, 5),
        "sets": st.integers(1, 3),
        "members": st.integers(1, 3),
        "gate": st.booleans(),
        "height": st.integers(1, 12),
        "width": st.integers(1, 12),
        "n": st.integers(1, 3),
        "seed": st.integers(0, 2**16),
    }
)


@given(units)
def test_unit_equals_the_trained_one(g):
    torch.manual_seed(g["seed"])
    c = 4 * g["sets"] * g["members"]
    unit = RepMLPNetUnit(c, (g["h"], g["w"]), g["sets"], (1, 3), global_perceptron=g["gate"])
    randomise_norms(unit).double().eval()
    carried = torch.randn(c, dtype=torch.float64)
    deployed = DeployedUnit(unit, carried)
    x = torch.randn(g["n"], c, g["height"], g["width"], dtype=torch.float64)
    with torch.no_grad():
        expected = unit(x + carried.view(1, -1, 1, 1))
        found = deployed(x) + (carried + deployed.carried).view(1, -1, 1, 1)
    assert float((found - expected).norm()) < 1e-12 * float(1 + expected.norm())


def test_the_trained_net_stays_as_it_was_and_a_merged_one_deploys_too():
    net = trained(**NETS["two stages"])
    before = copy.deepcopy(net.state_dict())
    deployed = deploy(net)
    with torch.no_grad():
        for parameter in deployed.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    merged = timm.utils.reparameterize_model(net)
    assert relative(net, deploy(merged), x) < 1e-12


@pytest.mark.parametrize("name", ["repmlpnet_t224", "repmlpnet_d256"])
def test_registered_variants_deploy(name):
    net = randomise_norms(timm.create_model(name, img_size=64, num_classes=7)).eval()
    deployed = deploy(net)
    assert relative(net, deployed, torch.randn(2, 3, 64, 64)) < 1e-5
    merged = timm.create_model(name, img_size=64, num_classes=7, inference_mode=True)
    # the same products but for the carried constants; the pooled gate is counted alike
    assert count_macs(deployed, 64) == count_macs(merged, 64)


def test_deployed_net_exports_with_a_free_batch():
    net = trained(torch.float32, **NETS["two stages"])
    deployed = deploy(net)
    images = torch.randn(2, 3, 32, 32)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(deployed, (images,), dynamic_shapes=({0: batch},)).module()
    x = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program(x), deployed(x))


def test_what_cannot_be_deployed_is_said():
    with pytest.raises(TypeError, match=r"takes a RepMLPNet, got MlpMixer: use timm\.utils\.reparameterize_model"):
        deploy(build_resmlp(depth=1, width=8))
    with pytest.raises(RuntimeError, match="training mode"):
        deploy(RepMLPNet(**NETS["no branches"]).train())
    with pytest.raises(ValueError, match="no head"):
        deploy(timm.create_model("repmlpnet_t224", img_size=32, features_only=True).model.eval())


def test_ffn_by_parts_is_the_ffn(monkeypatch):
    net = trained(**NETS["two stages"])
    deployed = deploy(net)
    x = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = deployed(x)
        monkeypatch.setattr(sys.modules["repmlp.deployed_ffn"], "_HIDDEN_BYTES", 2 * 64 * 256 * 8)  # two images at once
        torch.testing.assert_close(deployed(x), expected, rtol=1e-12, atol=1e-12)


def frozen(net: nn.Module) -> nn.Module:
    """timm freezes batch norms in place, and where the whole model is none it returns the model."""
    return freeze_batch_norm_2d(net)


@pytest.mark.parametrize(
    "convert", [nn.SyncBatchNorm.convert_sync_batchnorm, frozen, timm.layers.convert_sync_batchnorm]
)
def test_batch_norms_of_other_kinds_are_folded_too(convert):
    net = trained(**NETS["two stages"])
    other = convert(copy.deepcopy(net)).eval()
    assert type(other.norm) is not nn.BatchNorm2d
    x = torch.randn(2, 3, 40, 32, dtype=torch.float64)
    deployed = deploy(other)
    assert relative(net, deployed, x) < 1e-12
    assert not any("running" in name for name, _ in deployed.named_buffers())
    merged = timm.utils.reparameterize_model(other)
    assert relative(net, merged, x) < 1e-12 and merged.stages[0][0].block.channel_perceptron.norm is None


def test_a_batch_norm_without_an_activation_is_folded_and_one_with_it_refused():
    net = trained(**NETS["two stages"])
    state = net.norm.state_dict()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    net.norm = BatchNormAct2d(32, apply_act=False).double().eval()
    net.norm.load_state_dict(state)
    assert relative(net, deploy(net), x) < 1e-12
    net.norm = BatchNormAct2d(32).double().eval()
    with pytest.raises(ValueError, match="a BatchNormAct2d with ReLU in it is not linear"):
        deploy(net)


@pytest.mark.parametrize("size", [(32, 32), (40, 56)])
def test_an_empty_batch_gives_no_logits(size):
    net = trained(**NETS["two stages"])
    for form in (net, timm.utils.reparameterize_model(net), deploy(net)):
        assert form(torch.empty(0, 3, *size, dtype=torch.float64)).shape == (0, 100)


def fc(net: RepMLPNet) -> nn.Module:
    return net.stages[0][0].block.channel_perceptron


COMPUTED = {
    "pruned FC": lambda net: prune.l1_unstructured(fc(net), "weight", 0.5),
    "pruned branch": lambda net: prune.l1_unstructured(fc(net).local_perceptron.convs["3"], "weight", 0.5),
    "weight norm": lambda net: nn.utils.weight_norm(fc(net).local_perceptron.convs["1"]),
    "weight norm by parametrization": lambda net: nn.utils.parametrizations.weight_norm(fc(net)),
    "spectral norm": lambda net: nn.utils.spectral_norm(fc(net).local_perceptron.convs["3"]),
    "pruned batch norm": lambda net: prune.l1_unstructured(fc(net).norm, "weight", 0.5),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_weights_that_are_computed_from_others_are_refused_by_name(name):
    net = trained(**NETS["two stages"])
    COMPUTED[name](net)
    net.eval()
    in_place = partial(timm.utils.reparameterize_model, inplace=True)  # torch cannot copy such a net
    for change in (deploy, in_place, lambda net: net.reparameterize()):
        with pytest.raises(ValueError, match=r"weight of .* is computed from other parameters.*remove"):
            change(net)


def test_pruning_made_permanent_is_merged():
    net = trained(**NETS["two stages"])
    COMPUTED["pruned FC"](net)
    prune.remove(fc(net), "weight")
    assert relative(net, deploy(net), torch.randn(2, 3, 32, 32, dtype=torch.float64)) < 1e-12


def test_an_embedding_under_pruning_is_refused_where_it_would_be_folded():
    net = trained(**NETS["two stages"])
    prune.l1_unstructured(net.stem.conv, "weight", 0.5)
    with pytest.raises(ValueError, match="weight of Conv2d is computed from other parameters"):
        deploy(net)
    net.reparameterize()  # merges no embedding
