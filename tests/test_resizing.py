"""Resized FCs against interpolation of whole maps, written out, and what can be proved of them; whole nets."""

import copy
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import randomise_norms
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

import repmlp  # noqa: F401  (registers the variants)
from repmlp import InjectedLinear, RepMLPNet, SetSharingFC, build_model, inject_locality
from repmlp.models import mixers
from repmlp.models.build import merged_copy
from repmlp.resizing import _resize_fc, resize

SIZES = [
    ((4, 4), (8, 8)),
    ((8, 8), (4, 4)),
    ((7, 7), (8, 8)),
    ((8, 6), (5, 9)),
    ((3, 5), (7, 5)),
    ((5, 4), (3, 1)),
    ((1, 1), (3, 2)),
    ((6, 2), (1, 1)),
]
NET = {"arch": "repmlpnet", "channels": [8, 16], "blocks": [2, 1], "share_sets": [2, 4]}
MLP = {"arch": "resmlp", "depth": 2, "width": 8}
SHAPE = {"img_size": 32, "arguments": {"num_blocks": 2, "embed_dim": 8}}
MIXERS = [
    MLP,
    *({"arch": "timm", "variant": f"{name}_12_patch4_32", "kernels": [3], **SHAPE} for name in ("resmlp", "gmlp")),
]


def axis(old: int, new: int) -> Tensor:
    """Write antialiased bicubic interpolation (Keys, a = -0.5) of one axis as a formula: (new, old)."""
    scale = old / new
    centres = (torch.arange(new, dtype=torch.float64) + 0.5) * scale - 0.5
    x = ((torch.arange(old) - centres[:, None]) / max(1, scale)).abs()
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0))
    return weights / weights.sum(1, keepdim=True)


def interpolate(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., h, w) -> (..., *size), by the formula."""
    return axis(maps.shape[-2], size[0]) @ maps @ axis(maps.shape[-1], size[1]).T


def build(size: tuple[int, int], share_sets: int = 2, dtype: torch.dtype = torch.float64, **kwargs) -> SetSharingFC:
    return randomise_norms(SetSharingFC(size, share_sets, **{"norm": False, **kwargs})).to(dtype).eval()


def resized(fc: SetSharingFC, size: tuple[int, int]) -> SetSharingFC:
    fc = copy.deepcopy(fc)
    _resize_fc(fc, size)
    return fc


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("old", "new"), SIZES)
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"norm": True}, {"inference_mode": True}], ids=str)
@pytest.mark.parametrize("share_sets", [1, 3])
@torch.no_grad()
def test_resized_layer_is_the_layer_between_two_interpolations(old, new, options, share_sets):
    """Batch norms too: they act on each value alone, and rows of an interpolation sum to 1."""
    fc = build(old, share_sets, **options)
    x = torch.randn(3, 2 * share_sets, *new, dtype=torch.float64)
    found = resized(fc, new)(x)
    assert error(found, interpolate(fc(interpolate(x, old)), new)) < 1e-12


@pytest.mark.parametrize(("old", "new"), [sizes for sizes in SIZES if 1 not in (*sizes[0], *sizes[1])])
@torch.no_grad()
def test_the_interpolation_is_torchs(old, new):
    def torchs(maps, size):
        return F.interpolate(maps, size, mode="bicubic", antialias=True)

    fc = build(old, bias=True)
    x = torch.randn(2, 4, *new, dtype=torch.float64)
    assert error(resized(fc, new)(x), torchs(fc(torchs(x, old)), new)) < 1e-12


@pytest.mark.parametrize(("old", "new"), SIZES)
@torch.no_grad()
def test_float32_is_float64_rounded_once(old, new):
    fc = build(old, bias=True, dtype=torch.float32)
    single, double = resized(fc, new), resized(copy.deepcopy(fc).double(), new)
    assert torch.equal(single.weight, double.weight.float()) and torch.equal(single.bias, double.bias.float())


def test_same_size_keeps_every_bit():
    model = randomise_norms(build_model(NET))
    found = resize(model, 32)
    assert found is not model and found.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.state_dict().items())


@pytest.mark.parametrize(("old", "new"), SIZES)
@torch.no_grad()
def test_constant_maps_get_the_interpolated_response(old, new):
    fc = build(old)
    # (S, h*w) -> (S, h, w) -> (S, h'*w')
    expected = interpolate(fc.weight.sum(2).view(-1, *old), new).flatten(1)
    torch.testing.assert_close(resized(fc, new).weight.sum(2), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("old", "new"), SIZES)
@torch.no_grad()
def test_constant_row_sums_are_kept_so_constants_stay_constant(old, new):
    fc = build(old)
    sums = torch.tensor([0.7, -2.0], dtype=torch.float64)
    fc.weight += (sums[:, None] - fc.weight.sum(2)).unsqueeze(2) / fc.weight.shape[2]
    there = resized(fc, new)
    for layer in (there, resized(there, old)):
        found = layer(torch.ones(1, 2, *layer.size, dtype=torch.float64))[0]
        expected = sums[:, None, None].expand_as(found)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("old", "new"), [((7, 7), (8, 8)), ((4, 6), (9, 6)), ((6, 5), (3, 4)), ((1, 1), (4, 4))])
@torch.no_grad()
def test_there_and_back_gives_back_a_weighted_mean(old, new):
    """W -> P W P with P = R(new -> old) R(old -> new). P 1 = 1, so 1 u' comes back exactly where u' P = u'."""
    one_axis = [axis(b, a) @ axis(a, b) for a, b in zip(old, new, strict=True)]
    values, vectors = torch.linalg.eig(torch.kron(*one_axis).T)
    fixed = vectors[:, (values - 1).abs().argmin()].real
    fc = build(old, share_sets=1)
    fc.weight.copy_((fixed / fixed.sum()).expand_as(fc.weight))
    assert error(resized(resized(fc, new), old).weight, fc.weight) < 1e-12


@pytest.mark.parametrize(("width", "bound"), [(1.5, 0.05), (3.0, 0.015), (6.0, 0.01)])
@torch.no_grad()
def test_there_and_back_changes_a_smooth_kernel_little(width, bound):
    """Interpolation smooths, more so at borders: standard deviation 3 changes by 1.3 %, white noise by 57 %."""
    x = torch.arange(8, dtype=torch.float64)
    line = torch.exp(-((x[:, None] - x) ** 2) / (2 * width**2))
    fc = build((8, 8), share_sets=1)
    fc.weight.copy_(torch.kron(line, line))
    assert 1e-3 < error(resized(resized(fc, (16, 16)), (8, 8)).weight, fc.weight) < bound


@torch.no_grad()
def test_an_enlarged_kernel_is_the_kernel_interpolated_over_both_positions():
    """Per unit of input area, to 0.1 % of the largest, but for five columns at the borders: rows are normalised."""
    line = build((1, 16), share_sets=1)
    expected = F.interpolate(line.weight[:, None], (32, 32), mode="bicubic", antialias=True)[0, 0] / 2
    found = resized(line, (1, 32)).weight[0]
    assert float((found - expected)[:, 5:-5].abs().max()) < 1e-3 * float(expected.abs().max())


@pytest.mark.parametrize("img_size", [64, 16, (48, 80)])
def test_repmlpnet(img_size):
    model = randomise_norms(build_model(NET, 5)).eval()
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = resize(model, img_size)
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    assert found.img_size == (height, width) and not found.training
    for stage, stride in zip(found.stages, (2, 4), strict=True):
        assert {unit.block.channel_perceptron.size for unit in stage} == {(height // stride, width // stride)}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.img_size == (32, 32) and model.stages[0][0].block.channel_perceptron.size == (16, 16)
    changed = {name for name, value in found.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.endswith("channel_perceptron.weight")}
    # its weights are those of a network built for the size, and it computes what that one does
    fresh = build_model({**NET, "img_size": img_size}, 5).eval()
    fresh.load_state_dict(found.state_dict())
    x = torch.randn(2, 3, height, width)
    with torch.no_grad():
        assert torch.equal(found(x), fresh(x)) and found(x).shape == (2, 5)


@pytest.mark.parametrize("img_size", [64, 16, (20, 48)])
@pytest.mark.parametrize("config", MIXERS, ids=["resmlp", "timm's", "gmlp"])
def test_mixers(config, img_size):
    """Their linear layers are set-sharing FCs with one set, and resized alike; the grid goes with them."""
    model = build_model(config, 5).eval()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, InjectedLinear)}
    for layer in layers.values():
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    found = resize(model, img_size)
    sides = (img_size, img_size) if isinstance(img_size, int) else img_size
    size = tuple(side // model.stem.patch_size[0] for side in sides)
    assert (found.stem.img_size, found.stem.grid_size) == (sides, size) and model.stem.img_size == (32, 32)
    assert len(layers) == len(model.blocks)
    for name, layer in layers.items():
        fc = SetSharingFC(layer.size, bias=True, norm=False)
        fc.load_state_dict({"weight": layer.weight[None], "bias": layer.bias[None]})
        expected, there = resized(fc, size), found.get_submodule(name)
        assert torch.equal(there.weight, expected.weight[0]) and torch.equal(there.bias, expected.bias[0])
        assert (there.size, there.in_features, there.out_features) == (size, *there.weight.shape)
    # its weights are those of a network built for the size
    if sides[0] == sides[1]:
        fresh = build_model({**config, "img_size": img_size}, 5).eval()
        fresh.load_state_dict(found.state_dict())
        x = torch.randn(2, 3, *sides)
        with torch.no_grad():
            assert torch.equal(found(x), fresh(x)) and found(x).shape == (2, 5)


def test_a_stock_net_stays_one():
    model = timm.create_model("resmlp_12_224", img_size=32, num_classes=3).eval()
    nn.init.normal_(model.head.weight)
    with pytest.warns(UserWarning, match="stretched with them"):
        found = resize(model, (32, 64))
    assert {type(block.linear_tokens) for net in (model, found) for block in net.blocks} == {nn.Linear}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        marked = resize(inject_locality(model, ()), (32, 64))
    x = torch.randn(2, 3, 32, 64)
    with torch.no_grad():
        assert torch.equal(found(x), marked(x))


@pytest.mark.parametrize("config", [NET, MLP], ids=["repmlpnet", "resmlp"])
def test_a_resized_net_merges_and_trains(config):
    model = randomise_norms(resize(build_model(config), (24, 40))).double()
    x = torch.randn(3, 3, 24, 40, dtype=torch.float64)
    model.train()(x).square().mean().backward()
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())
    with torch.no_grad():
        expected = model.eval()(x)
        assert error(merged_copy(model)(x), expected) < 1e-12


def test_merged_nets_are_resized_with_a_warning():
    """Without branches merging and resizing commute; with them they do not, which is why there is a warning."""
    gap = {}
    for kernels in ((), (1, 3)):
        model = randomise_norms(build_model({**NET, "kernels": kernels})).double().eval()
        merged = copy.deepcopy(model)
        merged.reparameterize()
        first = resize(model, 48)
        first.reparameterize()
        with pytest.warns(UserWarning, match="stretched with them") as caught:
            second = resize(merged, 48)
        assert caught[0].filename == __file__
        pairs = zip(first.parameters(), second.parameters(), strict=True)
        gap[kernels] = max(error(b.detach(), a.detach()) for a, b in pairs)
    assert gap[()] < 1e-12 and gap[1, 3] > 0.1
    with pytest.warns(UserWarning, match="stretched with them"):
        resize(build_model(NET, inference_mode=True), 16)
    with pytest.warns(UserWarning, match="stretched with them"):
        resize(build_model(MLP, inference_mode=True), 16)


def test_branches_of_other_kinds():
    """Dilated branches go on to the new size where they are of use; the order of a shuffled grid cannot."""
    model = randomise_norms(build_model({**NET, "kernels": [1, "3d2", "1x3"]})).double().eval()
    found = resize(model, (48, 24))
    x = torch.randn(1, 3, 48, 24, dtype=torch.float64)
    with torch.no_grad():
        expected = found(x)
        assert found.stages[0][0].block.channel_perceptron.local_perceptron.taps((23, 0)).shape == (24, 12)
        found.reparameterize()
        assert error(found(x), expected) < 1e-12
    with pytest.raises(ValueError, match=r"branch 3x3d2 only middle taps .* map of 2x2; use a dilation below 2"):
        resize(model, 8)
    for config in (NET, MLP):
        model = build_model({**config, "kernels": [1, "3s"]}).eval()
        images = torch.randn(1, 3, 32, 32)
        assert torch.equal(resize(model, 32)(images), model(images))
        with pytest.raises(ValueError, match=r"branch 3x3s: the order of its shuffled grid belongs to maps of 16x16"):
            resize(model, 64)
        with pytest.warns(UserWarning, match="stretched with them"):
            resize(merged_copy(model), 64)


def test_frozen_parameters_stay_frozen():
    model = build_model(NET).requires_grad_(False)
    assert not any(p.requires_grad for p in resize(model, 64).parameters())


def test_registered_variant():
    model = timm.create_model("repmlpnet_t224", img_size=64, num_classes=7).eval()
    found = resize(model, (96, 64))
    assert [stage[0].block.channel_perceptron.size for stage in found.stages] == [(24, 16), (12, 8), (6, 4), (3, 2)]
    assert found.pretrained_cfg == model.pretrained_cfg
    with torch.no_grad():
        assert found(torch.randn(1, 3, 96, 64)).shape == (1, 7)
    # a backbone is resized inside its wrapper, and the stages it has been cut to decide the stride
    wrapper = timm.create_model("repmlpnet_t224", img_size=64, features_only=True, out_indices=(0, 1))
    wrapper.model = resize(wrapper.model, (40, 72))
    with torch.no_grad():
        assert [tuple(f.shape[-2:]) for f in wrapper(torch.randn(1, 3, 40, 72))] == [(10, 18), (5, 9)]


def test_meta_tensors():
    with torch.device("meta"):
        model = resize(RepMLPNet(), 64)
    assert model.stages[0][0].block.channel_perceptron.weight.shape == (8, 1024, 1024)


@pytest.mark.parametrize("img_size", [30, 0, -4, (32, 30), (32, 32, 32), 32.0, "32"])
def test_bad_sizes_are_named(img_size):
    words = "multiples of 4, the stride of the last map|use a whole number of pixels"
    with pytest.raises(ValueError, match=words) as raised:
        resize(build_model(NET), img_size)
    assert repr(img_size) in str(raised.value)


def test_other_models_are_refused():
    net = build_model(NET)
    for model in (nn.Linear(2, 2), nn.Sequential(net), timm.create_model("vit_tiny_patch16_224", img_size=32)):
        with pytest.raises(TypeError, match=f"ResMLP or gMLP, itself, no wrapper; got {type(model).__name__}"):
            resize(model, 64)
    with pytest.raises(ValueError, match="no set-sharing FCs"):
        resize(build_model({**NET, "blocks": [0, 0]}), 64)
    with pytest.raises(ValueError, match="MixerBlock mixes tokens by an MLP"):
        resize(MlpMixer(5, 32, num_blocks=1, embed_dim=8), 64)
    with pytest.raises(ValueError, match="square patches only; the model's are 4x2 pixels"):
        resize(MlpMixer(5, 32, patch_size=(4, 2), num_blocks=1, embed_dim=8, **mixers.RESMLP), 64)
