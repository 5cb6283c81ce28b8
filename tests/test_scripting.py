"""Every network that is registered with timm, and those beside them, scripted, traced by torch.fx and exported."""

import pytest
import timm
import torch
from conftest import randomise_norms
from torch import nn

from repmlp.injection import inject_locality
from repmlp.models.pspnet import build_pspnet
from repmlp.models.repmlp_pure import PureMLP

NARROW = {"layers": (1, 2, 2, 1), "channels": (4, 4, 8, 16), "num_classes": 3}
BLOCKS = {"partition": 2, "kernels": (1,), "groups": 2, "reductions": 1}
BODY = {name: value for name, value in {**NARROW, **BLOCKS}.items() if name not in ("num_classes", "kernels")}
SETS = {"img_size": 32, "channels": (8, 16, 32, 64), "blocks": (1,) * 4, "share_sets": (1, 2, 4, 8), "num_classes": 3}
PURE = {"img_size": 16, "channels": (4, 8), "partition": 4}
OURS = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("repmlp.")]
# of a family whose variants differ in the numbers that `small` replaces, one; of the others all
FAMILIES = {
    "repmlpnet_": "repmlpnet_t224",
    "repmlp_res50_g": "repmlp_res50_g4_8_320",
    "repmlp_res50_light_": "repmlp_res50_light_224",
}
REGISTERED = [n for n in OURS if next((one == n for start, one in FAMILIES.items() if n.startswith(start)), True)]
OTHERS = {
    "pure": lambda: (PureMLP(**PURE, kernels=(1, 3, "3s", "1x3")), 16),
    "pure, FC3 as a convolution": lambda: (PureMLP(**PURE, kernels=(1, 3), spatial="fc3_conv", conv_kernel=5), 16),
    "pure, convolutions": lambda: (PureMLP(**PURE, kernels=(), spatial="conv", conv_kernel=3), 16),
    "pspnet": lambda: (
        build_pspnet("repmlp_res50_224", 64, (1,), num_classes=3, decoder_channels=8, arguments=BODY),
        64,
    ),
}


def small(name: str) -> tuple[nn.Module, int]:
    """Build a network as small as its kind can be; returns it and the side of its images."""
    if name in OTHERS:
        return OTHERS[name]()
    if name.startswith("repmlpnet"):
        return timm.create_model(name, **SETS, kernels=(1, 3, "3s")), 32
    if name.startswith("repmlp_"):
        stages = {"stages": ("c2", "c3", "c4")} if "faceres" in name else {}
        return timm.create_model(name, **NARROW, **BLOCKS, **stages, img_size=56), 56
    if name == "faceresnet_96":
        return timm.create_model(name, **NARROW, base_width=64), 32
    if name == "mobilefacenet_96":
        return timm.create_model(name, num_classes=3), 96
    given = {"img_size": 32} if "patch16" in name else {}
    if "patch2" in name:
        net = timm.create_model(name, num_classes=3, depth=1, width=16)
    else:
        net = timm.create_model(name, num_classes=3, num_blocks=1, embed_dim=16, **given)
    return inject_locality(net, (1,) if given else (1, 3)), 32


@pytest.fixture(scope="module", params=[*REGISTERED, *OTHERS])
def case(request):
    """Return a network in both forms, in float64, and two batches of its images."""
    torch.manual_seed(0)
    net, side = small(request.param)
    for module in net.modules():
        if isinstance(module, nn.Linear) and not module.weight.any():  # timm's mixers start their head at 0
            nn.init.normal_(module.weight)
    net = randomise_norms(net).double().eval()
    merged = timm.utils.reparameterize_model(nn.ModuleList([net]))[0]
    return (net, merged), [torch.randn(n, 3, side, side, dtype=torch.float64) for n in (2, 3)]


def fx_then_script(net: nn.Module) -> nn.Module:
    return torch.jit.script(torch.fx.symbolic_trace(net))


@pytest.mark.parametrize("record", [torch.jit.script, torch.fx.symbolic_trace, fx_then_script])
def test_recorded_networks_compute_the_same(case, record):
    forms, batches = case
    for net in forms:
        other = record(net)
        with torch.no_grad():
            for x in batches:  # another number of images than the one before
                expected = net(x)
                assert float(expected.norm()) > 0
                assert float((other(x) - expected).norm()) < 1e-12 * float(expected.norm())


@pytest.mark.parametrize("record", [torch.jit.script, torch.fx.symbolic_trace])
def test_recorded_networks_have_the_same_gradients(case, record):
    (net, _), (x, _) = case
    net.zero_grad()
    net(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    record(net)(x).square().sum().backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-9, atol=1e-9)


def test_exported_networks_compute_the_same(case):
    (net, _), (x, more) = case
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: batch},)).module()
    with torch.no_grad():
        expected = net(more)
        assert float((program(more) - expected).norm()) < 1e-12 * float(expected.norm())


@pytest.mark.parametrize("record", [torch.jit.script, torch.fx.symbolic_trace])
def test_a_recorded_network_refuses_maps_with_other_partitions(record):
    net, _ = small("repmlp_res50_224")
    recorded = record(net.eval())
    with pytest.raises(Exception, match="partitions of 2x2, this RepMLP is built for"):
        recorded(torch.randn(1, 3, 96, 96))
