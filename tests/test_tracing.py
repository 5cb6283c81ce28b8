"""Which transforms of torch record or run the nets rightly, in all three forms: other batches, other map sizes."""

import io
from functools import partial

import pytest
import timm
import torch
from conftest import randomise_norms
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from repmlp import RepMLPNet, deploy
from repmlp.tracing import _private, plain

NATIVE, TILES, PADDED = (32, 32), (64, 64), (48, 40)
SAME_AREA = (64, 16)  # as many cells as NATIVE: products alone would not notice
RECORDED = 5  # images; the FFN of the deployed net takes two of 32 x 32 at once, see `small_parts`


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr("repmlp.deployed_ffn._HIDDEN_BYTES", 2 * 32 * 256 * 8)


def forms() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    net = RepMLPNet(channels=(8, 16), blocks=(1, 2), share_sets=(2, 4), kernels=(1, 3, "3s", "1x3"), num_classes=5)
    net = randomise_norms(net).double().eval()
    return {"train-time": net, "merged": timm.utils.reparameterize_model(net), "deployed": deploy(net)}


FORMS = forms()
every_form = pytest.mark.parametrize("net", FORMS.values(), ids=FORMS)


def images(n: int = RECORDED, size: tuple[int, int] = NATIVE) -> torch.Tensor:
    return torch.randn(n, 3, *size, dtype=torch.float64)


def assert_equal(net, other, *inputs: torch.Tensor, tolerance: float = 1e-12) -> None:
    with torch.no_grad():
        for x in inputs:
            expected = net(x)
            assert (other(x) - expected).norm() < tolerance * expected.norm(), x.shape


def exported(net: nn.Module) -> nn.Module:
    free = ({0: torch.export.Dim("batch", min=1)},)
    return torch.export.export(net, (images(),), dynamic_shapes=free).module()


RECORDERS = {
    # how it is recorded, and whether it goes on deciding by the size of the map
    "trace": (lambda net: torch.jit.trace(net, images()), False),
    "export": (exported, False),
    "make_fx": (lambda net: make_fx(net, tracing_mode="symbolic", _allow_non_fake_inputs=True)(images()), False),
    "script": (torch.jit.script, True),
    "fx": (torch.fx.symbolic_trace, True),
    "fx, then script": (lambda net: torch.jit.script(torch.fx.symbolic_trace(net)), True),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", RECORDERS)
@every_form
def test_a_recorded_net_is_right_for_other_batches_and_right_or_refused_for_other_maps(net, way):
    record, any_map = RECORDERS[way]
    other = record(net)
    # fewer, as many and more images than were recorded, at the sizes where the deployed FFN does one part, and several
    assert_equal(net, other, images(), images(1), images(11))
    for size in (PADDED, SAME_AREA):
        if any_map:
            assert_equal(net, other, images(3, size))
        else:
            with pytest.raises((RuntimeError, AssertionError)):
                other(images(3, size))


@pytest.mark.parametrize("form", FORMS)
def test_compile_is_right_for_other_batches_and_maps(form):
    torch.compiler.reset()
    net = randomise_norms(RepMLPNet(channels=(8,), blocks=(1,), share_sets=(2,), kernels=(1,))).double().eval()
    net = {"train-time": net, "merged": timm.utils.reparameterize_model(net), "deployed": deploy(net)}[form]
    compiled = torch.compile(net, backend="eager", dynamic=True)
    assert_equal(net, compiled, images(), images(11), images(3, PADDED))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("size", [TILES, PADDED])
@every_form
def test_a_trace_of_partitions_is_right_for_every_map_size(net, size):
    other = torch.jit.trace(net, images(2, size))
    assert_equal(net, other, *(images(n, s) for n, s in ((5, size), (1, NATIVE), (3, PADDED), (2, TILES))))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("size", [NATIVE, PADDED])
@every_form
def test_onnx_by_trace_is_right_for_other_batches(net, size):
    runtime = pytest.importorskip("onnxruntime")
    single, file = net.float(), io.BytesIO()
    try:
        torch.onnx.export(
            single, (images(size=size).float(),), file, dynamo=False, input_names=["images"],
            dynamic_axes={"images": {0: "batch"}}, opset_version=17,
        )  # fmt: skip
        session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
        run = lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])  # noqa: E731
        assert_equal(single, run, *(images(n, size).float() for n in (5, 1, 11)), tolerance=1e-5)
    finally:
        net.double()


@every_form
def test_gradients_of_functions_are_those_of_autograd(net):
    x, direction = images(3), images(3)
    leaf = x.clone().requires_grad_()
    expected = torch.stack(
        [torch.stack(torch.autograd.grad(net(leaf)[i, j], leaf)) for i in range(3) for j in range(5)]
    ).view(3, 5, *x.shape)
    torch.testing.assert_close(jacrev(net)(x), expected)
    along = (expected * direction).sum(dim=(2, 3, 4, 5))
    value, tangent = jvp(net, (x,), (direction,))
    torch.testing.assert_close(value, net(x))
    torch.testing.assert_close(tangent, along)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(net(forward_ad.make_dual(x, direction)))
    torch.testing.assert_close(dual.tangent, along)


@every_form
def test_vmap_and_gradients_of_single_images(net):
    x = images(6).view(2, 3, 3, *NATIVE)
    torch.testing.assert_close(vmap(net)(x), torch.stack([net(x[0]), net(x[1])]))
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters: dict, image: torch.Tensor) -> torch.Tensor:
        return functional_call(net, parameters, (image[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x[0])
    one = grad(loss)(parameters, x[0, 1])
    for name, gradient in one.items():
        torch.testing.assert_close(found[name][1], gradient)
    assert any(gradient.any() for gradient in one.values())


@every_form
def test_other_parameters_by_functional_call(net):
    state = {k: v * 1.5 if v.is_floating_point() else v for k, v in net.state_dict().items()}
    other = next(form for form in forms().values() if form.state_dict().keys() == state.keys())
    other.load_state_dict(state)
    x = images()
    torch.testing.assert_close(functional_call(net, state, (x,)), other(x))


@every_form
def test_autocast_is_as_near_as_bfloat16_is(net):
    single = net.float()
    try:
        x = images().float()
        with torch.no_grad():
            expected = single(x)
            with torch.autocast("cpu", torch.bfloat16):
                found = single(x)
        assert 1e-6 < float((found - expected).norm() / expected.norm()) < 0.03
    finally:
        net.double()


@pytest.mark.parametrize("form", ["train-time", "merged"])
def test_a_net_traced_by_fx_trains_like_the_net(form):
    net = forms()[form].train()
    traced = torch.fx.symbolic_trace(net)
    x = images()
    net(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    traced(x).square().sum().backward()
    for name, p in net.named_parameters():  # the graph has the net's own parameters
        torch.testing.assert_close(p.grad, expected[name])


def test_an_unfrozen_deployed_net_trains():
    net = forms()["deployed"]
    net.requires_grad_(True)
    net(images()).square().sum().backward()
    assert all(p.grad is not None for p in (net.stages[0][0].ffn1, net.stages[0][0].weight, net.head.weight))


def test_the_quick_way_is_taken_where_nothing_records():
    x = images()
    assert plain(x) and plain(x, nn.Parameter(x, requires_grad=False))
    assert not plain(x, nn.Parameter(x))
    with torch.no_grad():
        assert plain(nn.Parameter(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert not plain(x)
    seen = []
    vmap(lambda row: seen.append(plain(row)) or row)(x)
    jvp(lambda row: seen.append(plain(row)) or row, (x,), (x,))
    assert seen == [False, False]


@pytest.mark.parametrize("features", ["getter", "fx"])
def test_features_by_fx_are_those_of_the_net(features):
    torch.manual_seed(0)
    arguments = {"img_size": 32, "channels": (8, 16, 32, 64), "blocks": (1,) * 4, "share_sets": (1, 2, 4, 8)}
    create = partial(timm.create_model, "repmlpnet_t224", features_only=True, **arguments)
    net, whole = create(feature_cls=features).eval(), timm.create_model("repmlpnet_t224", **arguments).eval()
    state = {k.removeprefix("graph_module.").removeprefix("model."): v for k, v in net.state_dict().items()}
    whole.load_state_dict(state, strict=False)
    x = torch.randn(2, 3, 64, 48)
    for found, expected in zip(net(x), whole.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(found, expected)


def test_what_has_no_public_name_is_asked_for_at_the_import():
    with pytest.raises(ImportError, match=r"torch\._C\._functorch\.gone, which torch \d.* does not have: use"):
        _private("torch._C._functorch.gone")


def test_plain_is_said_of_no_transform():
    x = torch.zeros(2)
    assert plain(x)
    with forward_ad.dual_level():
        assert not plain(x)
    assert not vmap(lambda each: each + plain(x))(x).any()
