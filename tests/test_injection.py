"""Other people's MLPs with branches: against plain torch, merged, and loaded by the stock model again."""

import copy
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import randomise_norms
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timm.layers import GatedMlp, PatchEmbed
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock, SpatialGatingBlock
from torch import nn
from torch.nn.utils import prune

from repmlp import build_model, load_model, save_model
from repmlp.branches import parse
from repmlp.injection import InjectedLinear, inject_locality, merge_locality
from repmlp.locality import kernel_map, locality_profile

BLOCKS = {
    "resmlp": {"block_layer": partial(ResBlock, init_values=0.5), "norm_layer": Affine, "mlp_ratio": 4},
    "gmlp": {"block_layer": SpatialGatingBlock, "mlp_layer": GatedMlp, "mlp_ratio": 6},
}
TOKEN_LAYERS = {"resmlp": "blocks.{}.linear_tokens", "gmlp": "blocks.{}.mlp_channels.gate.proj"}
SIZE = (4, 3)
IMAGES = (5, 3, 8, 6)


def draw_parameters(model: nn.Module) -> nn.Module:
    """Give every parameter weight: timm starts heads at 0 and gates at 1e-6, where no test could fail."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def stock(kind: str) -> MlpMixer:
    """Build timm's net of the real blocks, small: its registered names fix width, depth and patch."""
    net = MlpMixer(5, img_size=IMAGES[-2:], patch_size=2, num_blocks=2, embed_dim=12, **BLOCKS[kind])
    return draw_parameters(net).double().eval()


def injected_net(kind: str, kernels=(1, 3, 5), **kwargs) -> MlpMixer:
    return randomise_norms(inject_locality(stock(kind), kernels, **kwargs)).eval()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def plain_branches(x: torch.Tensor, layer: InjectedLinear, size: tuple[int, int]) -> torch.Tensor:
    """Compute the branches in evaluation mode, every row of tokens as an image with one channel."""
    maps, out = x.reshape(-1, 1, *size), 0
    for k, conv in layer.local_perceptron.convs.items():
        norm, spec = layer.local_perceptron.norms[k], parse(k)
        order = layer.local_perceptron.permutation if spec.shuffled else torch.arange(maps[0].numel())
        moved = maps.flatten(2)[:, :, order].view_as(maps)
        padding = [spec.dilation * (side // 2) for side in conv.weight.shape[2:]]
        y = F.conv2d(moved, conv.weight, padding=padding, dilation=spec.dilation)
        y = y.flatten(2)[:, :, order.argsort()].view_as(maps)
        out = out + F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    return out.reshape(x.shape)


class TokenNet(nn.Module):
    """A hand-made net whose token and channel layers have the same square shape."""

    def __init__(self, tokens: int = 12, depth: int = 2):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"token_mix": nn.Linear(tokens, tokens), "channel_mix": nn.Linear(tokens, tokens)})
            for _ in range(depth)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block["token_mix"](x)
            x = x + block["channel_mix"](x.transpose(1, 2)).transpose(1, 2)
        return x


@pytest.mark.parametrize("kind", BLOCKS)
def test_injected_net_equals_stock_net_plus_convolutions(kind):
    """The stock net's own forward, with the branches added to its token layers from outside."""
    plain, x = stock(kind), torch.randn(IMAGES, dtype=torch.float64)
    net = randomise_norms(inject_locality(plain, (1, 3, 5)))
    for i in range(2):
        name = TOKEN_LAYERS[kind].format(i)
        branches = partial(plain_branches, layer=net.get_submodule(name), size=SIZE)
        plain.get_submodule(name).register_forward_hook(lambda _, args, out, f=branches: out + f(args[0]))
    with torch.no_grad():
        assert relative(net(x), plain(x)) < 1e-12
        assert relative(net(x), plain(x)) < 1e-12


@pytest.mark.parametrize("kind", BLOCKS)
def test_merged_after_training_loads_into_the_stock_net(kind):
    """Some steps of SGD, so that statistics are real; then the same logits three ways, and timm's own merging."""
    net = inject_locality(stock(kind)).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(4):
        x, y = torch.randn(IMAGES, dtype=torch.float64), torch.randint(5, IMAGES[:1])
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.abs().max() > 0), name
        optimizer.step()
    net.eval()
    fresh = stock(kind)
    with torch.no_grad():
        before = net(x)
        merged = merge_locality(net)
        assert relative(merged(x), before) < 1e-12
        assert all(type(merged.get_submodule(TOKEN_LAYERS[kind].format(i))) is nn.Linear for i in range(2))
        assert [(k, v.shape) for k, v in merged.state_dict().items()] == [
            (k, v.shape) for k, v in fresh.state_dict().items()
        ]
        fresh.load_state_dict(merged.state_dict(), strict=True)
        assert torch.equal(fresh(x), merged(x))
        assert torch.equal(net(x), before)  # a deep copy was merged
        by_timm = timm.utils.reparameterize_model(net)
        assert list(by_timm.state_dict()) == list(fresh.state_dict())
        assert torch.equal(by_timm(x), merged(x))
        assert type(merge_locality(by_timm.train()).get_submodule(TOKEN_LAYERS[kind].format(0))) is nn.Linear


@pytest.mark.parametrize("kind", BLOCKS)
def test_merging_in_float32_stays_within_rounding(kind):
    net, x = injected_net(kind).float(), torch.randn(IMAGES)
    with torch.no_grad():
        assert relative(merge_locality(net)(x), net(x)) < 2e-6


def test_registered_timm_nets():
    """The names that a user types, at their own width and depth."""
    for name, layers in (("resmlp_12_224", 12), ("gmlp_ti16_224", 30)):
        net = draw_parameters(timm.create_model(name, img_size=(64, 32), num_classes=3)).eval()
        injected = randomise_norms(inject_locality(net)).eval()
        found = [m for m in injected.modules() if isinstance(m, InjectedLinear)]
        assert len(found) == layers
        assert {m.size for m in found} == {(4, 2)}
        net.load_state_dict(merge_locality(injected).state_dict(), strict=True)


geometry = st.fixed_dictionaries(
    {
        "h": st.integers(1, 6),
        "w": st.integers(1, 6),
        "kernels": st.sampled_from(
            [*((1,), (3,), (1, 3), (3, 7), (5, 1, 3)), *((1, "3s"), ("1x3", "3d2"), (1, "1x3s", "3d2s"))]
        ),
        "leading": st.sampled_from([(), (3,), (2, 3), (2, 1, 3)]),
        "sequence": st.booleans(),
        "seed": st.integers(0, 2**16),
    }
)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(geometry)
def test_layer_equals_its_definition_before_and_after_merging(g):
    """Any grid, kernels (larger than the map too) and leading dimensions, on maps and on sequences."""
    torch.manual_seed(g["seed"])
    h, w = (1, g["w"]) if g["sequence"] else (g["h"], g["w"])
    size = (w,) if g["sequence"] else (h, w)
    assume(all(parse(kernel).fits(size) for kernel in g["kernels"]))
    layer = InjectedLinear(size, g["kernels"], dtype=torch.float64)
    randomise_norms(layer).eval()
    x = torch.randn(*g["leading"], h * w, dtype=torch.float64)
    with torch.no_grad():
        expected = x @ layer.weight.T + layer.bias + plain_branches(x, layer, (h, w))
        assert layer(x).shape == x.shape
        assert relative(layer(x), expected) < 1e-12
        weight, bias = layer.merged()
        assert relative(x @ weight[0].T + bias[0], expected) < 1e-12
        layer.reparameterize()
        assert torch.equal(layer.weight, weight[0]) and torch.equal(layer.bias, bias[0])
        assert relative(layer(x), expected) < 1e-12


def test_sequence_branches_are_1d_convolutions():
    net = randomise_norms(inject_locality(TokenNet().double(), (1, 5), size=(12,), layers="blocks.0.token_mix")).eval()
    layer, x = net.blocks[0]["token_mix"], torch.randn(2, 4, 12, dtype=torch.float64)
    assert [tuple(c.weight.shape) for c in layer.local_perceptron.convs.values()] == [(1, 1, 1, 1), (1, 1, 1, 5)]
    with torch.no_grad():
        expected = F.linear(x, layer.weight, layer.bias)
        for k, conv in layer.local_perceptron.convs.items():
            n = layer.local_perceptron.norms[k]
            y = F.conv1d(x.reshape(8, 1, 12), conv.weight[:, :, 0], padding=int(k) // 2)
            y = (y - n.running_mean) / (n.running_var + n.eps).sqrt() * n.weight + n.bias
            expected = expected + y.reshape(2, 4, 12)
        assert relative(layer(x), expected) < 1e-12
        # the net feeds (N, channels, tokens): as many channels as tokens here, its channel layer being square
        x = torch.randn(2, 12, 12, dtype=torch.float64)
        assert relative(merge_locality(net)(x), net(x)) < 1e-12


def test_kinds_of_branches_along_a_sequence():
    layer = InjectedLinear((12,), ["1x3", "5d2", "3s", np.int64(1)])
    assert layer.kernels == (1, 3, "5d2", "3s")
    convs = layer.local_perceptron.convs
    assert {k: (conv.kernel_size, conv.padding, conv.dilation) for k, conv in convs.items()} == {
        "1": ((1, 1), (0, 0), (1, 1)),
        "3": ((1, 3), (0, 1), (1, 1)),
        "3s": ((1, 3), (0, 1), (1, 1)),
        "5d2": ((1, 5), (0, 4), (2, 2)),
    }
    plain = InjectedLinear((12,), [1, 3])
    assert list(plain.state_dict()) == list(InjectedLinear((12,), [1, "1x3"]).state_dict())
    assert layer.local_perceptron.taps((0, 4)).nonzero()[:, 1].tolist() != [3, 4, 5]


@pytest.mark.parametrize("kernels", [[1, "3s"], ["1x3", "3x1d2", "3d2s"]])
def test_a_stock_net_trains_with_branches_of_any_kind_and_comes_back(tmp_path, kernels):
    """Paper: Section 5.2's ResMLP by timm, reduced; a step, a file and back, merged into the stock net."""
    config = {"arch": "timm", "variant": "resmlp_12_patch4_32", "kernels": kernels}
    net = build_model(config, num_classes=5).train()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    x, y = torch.randn(4, 3, 32, 32), torch.randint(5, (4,))
    F.cross_entropy(net(x), y).backward()
    assert all(bool(p.grad.abs().max() > 0) for p in net.parameters())
    torch.optim.SGD(net.parameters(), lr=0.01).step()
    randomise_norms(net).eval()
    save_model(tmp_path / "net.safetensors", net, config)
    torch.manual_seed(1)
    loaded = load_model(tmp_path / "net.safetensors")[0]
    with torch.no_grad():
        assert torch.equal(loaded(x), net(x))
        expected = net.double()(x.double())
        fresh = build_model({**config, "kernels": []}, num_classes=5).double().eval()
        fresh.load_state_dict(merge_locality(net).state_dict(), strict=True)
        assert relative(fresh(x.double()), expected) < 1e-12


@pytest.mark.parametrize("kind", BLOCKS)
def test_without_branches_layers_know_their_grid_and_nothing_else_changes(kind):
    plain, x = stock(kind), torch.randn(IMAGES, dtype=torch.float64)
    net = inject_locality(plain, ())
    layers = [module for module in net.modules() if isinstance(module, InjectedLinear)]
    assert [(layer.size, layer.kernels) for layer in layers] == [(SIZE, ())] * 2
    assert list(net.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(net(x), plain(x))
    assert str(merge_locality(net.train())) == str(plain)
    for layer in layers:
        layer.reparameterize()  # in training mode too: there is nothing to merge
    again = inject_locality(net.eval(), (1, 3))
    assert {module.kernels for module in again.modules() if isinstance(module, InjectedLinear)} == {(1, 3)}
    once_more = inject_locality(timm.utils.reparameterize_model(again), (5,), inplace=True)
    assert {module.kernels for module in once_more.modules() if isinstance(module, InjectedLinear)} == {(5,)}


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("training", [False, True])
def test_zero_init_changes_nothing(kind, training):
    plain, x = stock(kind).train(training), torch.randn(IMAGES, dtype=torch.float64)
    net = inject_locality(plain, (1, 3), zero_init=True)
    with torch.no_grad():
        assert torch.equal(net(x), plain(x))
        assert not torch.equal(inject_locality(plain, (1, 3))(x), plain(x))


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ("blocks.*.token_mix", {0, 1}),
        (["blocks.1.token_mix"], {1}),
        (["blocks.0.token_mix", "blocks.[01].token_mix"], {0, 1}),
    ],
)
def test_named_layers_alone_are_injected(layers, chosen):
    """The square channel layers stay what they were."""
    net = inject_locality(TokenNet(), size=(4, 3), layers=layers)
    found = {name for name, m in net.named_modules() if isinstance(m, InjectedLinear)}
    assert found == {f"blocks.{i}.token_mix" for i in chosen}
    merged = merge_locality(net.eval())
    assert list(merged.state_dict()) == list(TokenNet().state_dict())
    assert str(merged) == str(TokenNet())


def test_two_calls_give_layers_different_kernels():
    net = inject_locality(TokenNet(), (3,), size=(4, 3), layers="blocks.0.token_mix")
    inject_locality(net, (1, 5), size=(4, 3), layers="blocks.1.token_mix", inplace=True)
    assert [block["token_mix"].kernels for block in net.blocks] == [(3,), (1, 5)]


def test_what_is_kept_in_place():
    """Parameters, dtype, mode, frozen weights, hooks: an optimizer made before goes on working."""
    net = TokenNet().double().eval()
    old, block = dict(net.named_parameters()), net.blocks[0]
    block["token_mix"].weight.requires_grad_(False)
    calls = []
    block["token_mix"].register_forward_hook(lambda *_: calls.append(1))
    assert inject_locality(net, size=(4, 3), layers="blocks.*.token_mix", inplace=True) is net
    new = dict(net.named_parameters())
    assert all(new[name] is parameter for name, parameter in old.items())
    assert {p.dtype for p in new.values()} == {torch.float64}
    assert not any(m.training for m in net.modules())
    layer = block["token_mix"]
    assert isinstance(layer, nn.Linear)
    assert (layer.kernels, layer.share_sets, layer.size) == ((1, 3), 1, (4, 3))
    assert merge_locality(net, inplace=True) is net
    assert type(layer) is nn.Linear and layer is net.blocks[0]["token_mix"]
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (False, True)
    net(torch.randn(2, 12, 12, dtype=torch.float64))
    assert calls == [1]


def test_a_copy_leaves_the_model_alone():
    plain = TokenNet().train()
    net = inject_locality(plain, size=(4, 3), layers="blocks.*.token_mix")
    assert str(plain) == str(TokenNet())
    assert all(m.training for m in net.modules())
    assert not {id(p) for p in plain.parameters()} & {id(p) for p in net.parameters()}


def test_meta_and_checkpoints():
    with torch.device("meta"):
        net = inject_locality(TokenNet(), size=(4, 3), layers="blocks.*.token_mix").eval()
        outside = InjectedLinear((2, 2), device="cpu")
    on_meta = inject_locality(TokenNet().to("meta"), size=(4, 3), layers="blocks.*.token_mix")
    assert {p.device.type for m in (net, on_meta) for p in (*m.parameters(), *m.buffers())} == {"meta"}
    assert {p.device.type for p in (*outside.parameters(), *outside.buffers())} == {"cpu"}
    merged = merge_locality(net).state_dict()
    assert {k: v.shape for k, v in merged.items()} == {k: v.shape for k, v in TokenNet().state_dict().items()}
    trained = randomise_norms(inject_locality(TokenNet(), size=(4, 3), layers="blocks.*.token_mix")).eval()
    net.load_state_dict(trained.state_dict(), assign=True)
    x = torch.randn(2, 12, 12)
    assert torch.equal(net(x), trained(x))


def test_merged_serves_the_kernel_picture():
    layer = randomise_norms(InjectedLinear((4, 3))).eval()
    with torch.no_grad():
        assert torch.equal(layer.merged(branches=False)[0][0], layer.weight)
        assert torch.equal(layer.merged(branches=False)[1][0], layer.bias)
        assert kernel_map(layer.merged()[0], layer.size, 0, (1, 1)).shape == (4, 3)
        weight = InjectedLinear((7,)).eval().merged()[0]
        assert len(locality_profile(weight, InjectedLinear((7,)).size)) == 7


def test_tied_layers_stay_tied():
    """One Linear in two places, named by one of them; and one whole block used twice."""
    net = TokenNet().double()
    net.blocks[1]["token_mix"] = net.blocks[0]["token_mix"]
    net.blocks.append(net.blocks[1])
    names = list(net.state_dict())
    net = randomise_norms(inject_locality(net, size=(4, 3), layers="blocks.2.token_mix")).eval()
    layer = net.blocks[0]["token_mix"]
    assert isinstance(layer, InjectedLinear)
    assert layer is net.blocks[1]["token_mix"] is net.blocks[2]["token_mix"]
    x = torch.randn(2, 12, 12, dtype=torch.float64)
    with torch.no_grad():
        merged = merge_locality(net)
        assert relative(merged(x), net(x)) < 1e-12
    assert list(merged.state_dict()) == names
    assert merged.blocks[0]["token_mix"] is merged.blocks[2]["token_mix"]


def test_merging_refuses_training_mode_and_changes_nothing():
    net = inject_locality(TokenNet(), size=(4, 3), layers="blocks.*.token_mix").eval()
    net.blocks[1].train()
    for merge in (partial(merge_locality, inplace=True), merge_locality, timm.utils.reparameterize_model):
        with pytest.raises(RuntimeError, match=r"call model\.eval\(\)"):
            merge(net)
    assert [block["token_mix"].kernels for block in net.blocks] == [(1, 3), (1, 3)]


def test_reparameterize_is_idempotent():
    layer = randomise_norms(InjectedLinear((4, 3))).eval()
    layer.reparameterize()
    first = copy.deepcopy(layer.state_dict())
    layer.train().reparameterize()
    assert set(first) == {"weight", "bias"} and layer.kernels == ()
    assert all(torch.equal(first[name], value) for name, value in layer.state_dict().items())


def test_merging_a_model_without_branches_is_refused():
    with pytest.raises(ValueError, match="no injected layers to merge: was it made by inject_locality"):
        merge_locality(TokenNet().eval())


def no_bias() -> nn.Module:
    net = TokenNet()
    net.blocks[1]["token_mix"] = nn.Linear(12, 12, bias=False)
    return net


class ScaledLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def subclass() -> nn.Module:
    net = TokenNet()
    net.blocks[1]["token_mix"] = ScaledLinear(12, 12)
    return net


def any_grid() -> nn.Module:
    return nn.ModuleDict({"stem": PatchEmbed(None, 2), "block": ResBlock(8, 12)})


def pruned() -> nn.Module:
    net = TokenNet()
    prune.l1_unstructured(net.blocks[1]["token_mix"], "weight", 3)
    return net


def shared_weight() -> nn.Module:
    net = TokenNet()
    net.blocks[1]["token_mix"].weight = net.blocks[0]["channel_mix"].weight
    return net


def mixer() -> nn.Module:
    return MlpMixer(5, img_size=8, patch_size=2, num_blocks=1, embed_dim=8)


def two_grids() -> nn.Module:
    return nn.ModuleList([stock("resmlp"), MlpMixer(img_size=8, patch_size=2, num_blocks=1, **BLOCKS["resmlp"])])


def class_token() -> nn.Module:
    return nn.ModuleDict({"stem": PatchEmbed(8, 2), "mix": nn.Linear(17, 17)})


TOKEN = {"layers": "blocks.*.token_mix"}


@pytest.mark.parametrize(
    ("build", "arguments", "message"),
    [
        (TokenNet, {}, r"TokenNet has no token-mixing layers .* name them, e\.g\. layers="),
        (mixer, {}, r"layer blocks\.0: a MixerBlock mixes tokens by an MLP \(tokens -> hidden -> tokens\)"),
        (mixer, {"layers": "blocks.*.mlp_tokens.fc1"}, r"blocks\.0\.mlp_tokens\.fc1 maps 16 -> 4 tokens"),
        (TokenNet, {"layers": "blocks.*.tokens"}, r"'blocks\.\*\.tokens' matches no module of TokenNet"),
        (TokenNet, {"layers": ["blocks.0.token_mix", "nowhere"], "size": (4, 3)}, "'nowhere' matches no module"),
        (TokenNet, {"layers": []}, r"layers=\[\] names no layer"),
        (TokenNet, {"layers": "blocks.*", "size": (4, 3)}, r"layer blocks\.0 is a ModuleDict"),
        (TokenNet, {"layers": "*", "size": (4, 3)}, "layer blocks is a ModuleList: branches go beside"),
        (subclass, {**TOKEN, "size": (4, 3)}, r"layer blocks\.1\.token_mix is a ScaledLinear: branches go beside"),
        (no_bias, {**TOKEN, "size": (4, 3)}, r"layer blocks\.1\.token_mix has no bias"),
        (pruned, {**TOKEN, "size": (4, 3)}, r"layer blocks\.1\.token_mix computes its weight from other param"),
        (shared_weight, {**TOKEN, "size": (4, 3)}, r"blocks\.1\.token_mix shares its weight .*blocks\.0\.channel_mix"),
        (TokenNet, TOKEN, r"TokenNet has no timm PatchEmbed with a fixed grid: give size=\(h, w\)"),
        (any_grid, {}, "ModuleDict has no timm PatchEmbed with a fixed grid"),
        (partial(ResBlock, 8, 12), {"size": (4, 4)}, "layer linear_tokens mixes 12 tokens, the 4x4 grid has 16"),
        (two_grids, {}, r"several grids \[\(4, 3\), \(4, 4\)\]: give size="),
        (TokenNet, {**TOKEN, "size": (4, 4)}, r"layer blocks\.0\.token_mix mixes 12 tokens, the 4x4 grid has 16"),
        (class_token, {"layers": "mix"}, "layer mix mixes 17 tokens, one more than the 4x4 grid: a class token"),
        (TokenNet, {**TOKEN, "size": (11,)}, "one more than the 1x11 grid: a class token"),
        (TokenNet, {**TOKEN, "size": 12}, "size=12: give"),
        (TokenNet, {**TOKEN, "size": (2, 2, 3)}, r"size=\(2, 2, 3\): give"),
        (TokenNet, {**TOKEN, "size": (4.0, 3)}, r"size=\(4\.0, 3\): give"),
        (TokenNet, {**TOKEN, "size": (-4, -3)}, r"size=\(-4, -3\): give"),
        (TokenNet, {**TOKEN, "size": (4, 3), "kernels": 3}, "kernels=3: give the branches"),
        (TokenNet, {**TOKEN, "size": (4, 3), "kernels": (2,)}, r"branch 2x2: its sides have to be odd"),
        (TokenNet, {**TOKEN, "size": (4, 3), "kernels": "3s"}, "kernels='3s': give the branches"),
        (
            TokenNet,
            {**TOKEN, "size": (4, 3), "kernels": ("3d4",)},
            r"kernels=\['3d4'\]: .* map of 4x3; use a dilation below",
        ),
        (TokenNet, {**TOKEN, "size": (12,), "kernels": (1, "3x1")}, "branch 3x1 on a sequence"),
        (TokenNet, {**TOKEN, "size": (12,), "kernels": (3, "1x3")}, "branch 3x3 stands there twice"),
    ],
)
def test_refusals_change_nothing(build, arguments, message):
    net = build()
    before = str(net)
    with pytest.raises(ValueError, match=message) as caught:
        inject_locality(net, **arguments, inplace=True)
    assert "\n" not in str(caught.value)
    assert str(net) == before


def test_injecting_twice_is_refused():
    with pytest.raises(ValueError, match=r"layer blocks\.0\.linear_tokens is injected already"):
        inject_locality(injected_net("resmlp"))
    for merge in (timm.utils.reparameterize_model, merge_locality):
        again = inject_locality(merge(injected_net("gmlp")), (3,))
        assert again.blocks[1].mlp_channels.gate.proj.kernels == (3,)


@pytest.mark.parametrize("name", ["resmlp_12_patch4_32", "gmlp_12_patch4_32"])
def test_networks_of_cifars_size_take_branches_and_give_them_back(name):
    plain = timm.create_model(name, num_classes=7)
    net = randomise_norms(inject_locality(plain, (1, 3))).double().eval()
    layers = [m for m in net.modules() if isinstance(m, InjectedLinear)]
    assert len(layers) == 12 and {layer.size for layer in layers} == {(8, 8)}
    draw_parameters(net.head)
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    expected = net(images)
    plain.double().eval().load_state_dict(merge_locality(net).state_dict())
    assert relative(plain(images), expected) < 1e-12
