"""Products as linear layers and as 1x1 convolutions: the same numbers, and the second only where it was asked for."""

import copy
import pathlib

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise_norms
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils import prune

from repmlp import RepMLP, RepMLPNet, deploy, deployed_ffn, deployment, layers
from repmlp.models import repmlpnet
from repmlp.products import by_convolution, convolved, products_by, usual_product

# maps of 12x12 (large enough for FC3 as a convolution) and 6x6 (not); 16 images make 16 * 16 / 4 rows of a share-set
SMALL = {"img_size": 24, "channels": (16, 32), "blocks": (1, 1), "share_sets": (4, 2), "kernels": (1, 3)}


@pytest.fixture
def calls(monkeypatch):
    """The shapes (rows, weight) of all products that were done by convolution."""
    seen = []

    def spy(rows, weight):
        seen.append((tuple(rows.shape), tuple(weight.shape)))
        return convolved(rows, weight)

    for module in (layers, repmlpnet, deployment):
        monkeypatch.setattr(module, "convolved", spy)
    return seen


@given(st.integers(1, 70), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_a_convolution_is_the_linear_layer(p, i, o, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, weight = (torch.randn(n, i, generator=generator, dtype=torch.float64) for n in (p, o))
    found = convolved(rows, weight)
    assert found.shape == (p, o) and found.is_contiguous()
    torch.testing.assert_close(found, F.linear(rows, weight), rtol=1e-13, atol=1e-13)
    single = convolved(rows.float(), weight.float()).double()
    torch.testing.assert_close(single, F.linear(rows, weight), rtol=1e-5, atol=1e-5)


def learnt(net: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a training step of a network gives: output, all gradients, running statistics."""
    maps = x.clone().requires_grad_()
    out = net(maps)
    (out * torch.linspace(-1, 1, out.numel(), dtype=x.dtype).view_as(out)).sum().backward()
    gradients = {f"{name}.grad": p.grad for name, p in net.named_parameters()}
    return {"out": out.detach(), "maps": maps.grad, **gradients, **dict(net.named_buffers())}


@pytest.mark.parametrize("merged", [False, True], ids=["train-time", "merged"])
def test_a_network_computes_and_learns_the_same(calls, merged):
    one = randomise_norms(RepMLPNet(**SMALL, num_classes=10)).double()
    if merged:
        one.eval().reparameterize()
    other = products_by(copy.deepcopy(one), "convolution")
    x = torch.randn(16, 3, 24, 24, dtype=torch.float64)
    results = [learnt(net.train(), x) for net in (one, other)]
    ffns = [
        ((16 * 144, 16), (64, 16)),
        ((16 * 144, 64), (16, 64)),
        ((16 * 36, 32), (128, 32)),
        ((16 * 36, 128), (32, 128)),
    ]
    fc3 = [((16 * 4, 144), (144, 144))] * 4
    assert calls == fc3 + ffns, "each layer once; the small FC3 stays one batched product"
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-10, atol=1e-10, msg=name)
    assert one.state_dict().keys() == other.state_dict().keys()


def test_what_records_a_network_sees_linear_layers(calls):
    net = products_by(randomise_norms(RepMLPNet(**SMALL)).eval(), "convolution")
    x = torch.randn(16, 3, 24, 24)
    expected = net(x)
    assert calls
    for record in (
        lambda: torch.jit.trace(net, x, check_trace=False),  # a check runs the network itself
        lambda: torch.jit.script(net),
        lambda: torch.fx.symbolic_trace(net),
        lambda: torch.compile(net, backend="eager"),
        lambda: torch.export.export(net, (x,)).module(),
    ):
        torch._dynamo.reset()
        calls.clear()
        recorded = record()
        torch.testing.assert_close(recorded(x), expected, rtol=1e-4, atol=1e-5)
        assert not calls, type(recorded)
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        net(x)
    net.bfloat16()(x.bfloat16())
    assert not calls, "16-bit products are the same library's either way"


def test_a_layer_on_which_something_hangs_is_called(calls):
    net = products_by(RepMLPNet(**SMALL).eval(), "convolution")
    heard = []
    net.stages[0][0].ffn.fc1.register_forward_hook(lambda layer, inputs, out: heard.append(out.shape))
    pruned = prune.l1_unstructured(net.stages[0][0].ffn.fc2, "weight", amount=0.5)
    net(torch.randn(16, 3, 24, 24))
    assert heard == [(16 * 144, 64)] and hasattr(pruned, "weight_mask")
    assert ((16 * 144, 16), (64, 16)) not in calls and ((16 * 144, 64), (16, 64)) not in calls
    assert ((16 * 36, 32), (128, 32)) in calls


@pytest.mark.parametrize("size", [(24, 24), (36, 48), (20, 28)])
def test_a_deployed_network_gives_the_same_with_either(calls, monkeypatch, size):
    monkeypatch.setattr(deployed_ffn, "_CONVOLVED_BYTES", 8 * 64 * 144 * 3)  # three images at once
    monkeypatch.setattr(deployed_ffn, "_CONVOLVED_MACS", 0)
    net = randomise_norms(RepMLPNet(**SMALL)).double().eval()
    x = torch.randn(64, 3, *size, dtype=torch.float64)
    linear, other = deploy(net, products="linear"), deploy(net, products="convolution")
    with torch.no_grad():
        expected = linear(x)
        assert not calls
        found = other(x)
    assert calls and {weight for _, weight in calls} == {(144, 144)}
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, net(x).detach(), rtol=1e-11, atol=1e-11)
    x.requires_grad_()
    torch.testing.assert_close(
        *(torch.autograd.grad(f(x).sum(), x)[0] for f in (linear, other)), rtol=1e-10, atol=1e-12
    )


def test_small_products_of_a_deployed_network_stay_linear(calls, monkeypatch):
    taken = []
    monkeypatch.setattr(deployed_ffn, "_ffn_by_convolution", lambda x, *weights: taken.append(x.shape) or x)
    net = deploy(RepMLPNet(**SMALL).eval(), products="convolution")
    x = torch.randn(64, 3, 24, 24)  # 64 * 144 * 64 * 16 = 9.4 million multiply-accumulates in the larger FFN
    with torch.no_grad():
        net(x)
    assert not taken and len(calls) == 4, "the FC3 of 12x12 maps alone"
    monkeypatch.setattr(deployed_ffn, "_CONVOLVED_MACS", 64 * 144 * 64 * 16)
    with torch.no_grad():
        net(x)
    assert taken == [(64, 16, 144), (64, 32, 36)], "as many in either stage"
    calls.clear()
    with torch.no_grad():
        net(x[:48])
    assert len(taken) == 2 and not calls, "192 rows of a share-set"


def test_tuning_takes_what_was_faster(monkeypatch):
    net = randomise_norms(RepMLPNet(**SMALL)).eval()
    clock = iter(range(10**6))
    monkeypatch.setattr(deployment.time, "perf_counter", lambda: next(clock))
    times = []

    def slow(way):  # a clock by which one of the ways takes longer
        def forward(unit, x):
            for layer in ("fc3_products", "ffn_products"):
                if getattr(unit, layer) == way:
                    next(clock)
            times.append((unit.fc3_products, unit.ffn_products))
            return x

        return forward

    for slower, faster in (("linear", "convolution"), ("convolution", "linear")):
        with monkeypatch.context() as patch:
            original = deployment.DeployedUnit.forward
            patch.setattr(deployment.DeployedUnit, "forward", slow(slower))
            tuned = deploy(net, tune=torch.randn(2, 3, 24, 24))
        assert deployment.DeployedUnit.forward is original
        assert {(u.fc3_products, u.ffn_products) for u in deployment._units(tuned)} == {(faster, faster)}
    assert len(set(times)) > 2, "each layer was tried apart"


def test_tuned_for_real_it_computes_the_same():
    net = randomise_norms(RepMLPNet(**SMALL)).eval()
    x = torch.randn(16, 3, 24, 24)
    with torch.no_grad():
        expected = net(x)
        found = deploy(net, tune=x)(x)
    assert (found - expected).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"products": "rows"}, "products='rows': use linear or convolution"),
        ({"products": "linear", "tune": torch.zeros(1, 3, 24, 24)}, "products='linear' and tune: give one of them"),
    ],
)
def test_mistakes_are_one_line(arguments, words):
    with pytest.raises(ValueError, match=words):
        deploy(RepMLPNet(**SMALL).eval(), **arguments)
    older = torch.nn.Sequential(RepMLP(8, 8, (4, 4), (4, 4), kernels=(1, 3))).eval()
    with pytest.raises(ValueError, match=words if "rows" in words or "give one" in words else "leave them out"):
        deploy(older, **arguments)
    with pytest.raises(ValueError, match="leave them out for older networks"):
        deploy(older, products="linear")
    with pytest.raises(ValueError, match="use linear or convolution"):
        products_by(torch.nn.Linear(1, 1), "rows")


@pytest.mark.parametrize(
    ("vendor", "capability", "expected"),
    [
        ("AuthenticAMD", "AVX512", "convolution"),
        ("AuthenticAMD", "AVX2", "linear"),
        ("GenuineIntel", "AVX512", "linear"),
    ],
)
def test_the_usual_product_is_that_of_the_processor(monkeypatch, vendor, capability, expected):
    monkeypatch.setattr(pathlib.Path, "read_text", lambda self: f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert usual_product() == expected
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert usual_product() == "linear"


def test_where_a_convolution_is_taken():
    x = torch.zeros(16, 3)
    assert by_convolution("convolution", x) and not by_convolution("linear", x)
    assert not by_convolution("convolution", x.to("meta")) and not by_convolution("convolution", x.half())
