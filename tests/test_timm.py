"""The timm surface, for every registered variant: counts as printed, features, heads, checkpointing, groups.

The variants have 38 to 118 million parameters. What computes is built for images of 64 pixels (maps of 16, 8, 4 and 2),
what only counts or measures shapes on the meta device.
"""

import copy

import pytest
import timm
import torch
from conftest import randomise_norms
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from repmlp import RepMLPBlock, RepMLPNet
from repmlp.cost import count_macs, count_params

NAMES = timm.list_models("repmlpnet*", module="repmlpnet")
SIDE = 64
# learnable parameters while training, merged, merged without batch norms; MACs in G while training and merged; and the
# paper's Table 2: parameters in M, "FLOPs" in G
PUBLISHED = {
    "repmlpnet_t224": (38_293_608, 38_331_720, 38_287_560, 2.808, 2.798, 38.3, 2.8),
    "repmlpnet_b224": (68_242_712, 68_332_664, 68_234_168, 6.676, 6.657, 68.2, 6.7),
    "repmlpnet_t256": (58_687_848, 58_739_400, 58_695_240, 4.258, 4.246, 58.7, 4.2),
    "repmlpnet_b256": (96_447_512, 96_568_184, 96_469_688, 9.640, 9.616, 96.5, 9.6),
    "repmlpnet_d256": (86_887_648, 86_985_280, 86_876_320, 8.636, 8.611, 86.9, 8.6),
    "repmlpnet_l256": (117_641_560, 117_820_600, 117_689_848, 11.609, 11.579, 117.7, 11.5),
}
SHAPES = {  # channels and blocks of the four stages
    "repmlpnet_t224": ((64, 128, 256, 512), (2, 2, 6, 2)),
    "repmlpnet_b224": ((96, 192, 384, 768), (2, 2, 12, 2)),
    "repmlpnet_t256": ((64, 128, 256, 512), (2, 2, 6, 2)),
    "repmlpnet_b256": ((96, 192, 384, 768), (2, 2, 12, 2)),
    "repmlpnet_d256": ((80, 160, 320, 640), (2, 2, 18, 2)),
    "repmlpnet_l256": ((96, 192, 384, 768), (2, 2, 18, 2)),
}


def on_meta(name: str, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs).eval()


def images(n: int = 2, channels: int = 3, size: tuple[int, int] = (SIDE, SIDE)) -> torch.Tensor:
    return torch.randn(n, channels, *size)


@pytest.fixture(scope="module", params=NAMES)
def built(request) -> RepMLPNet:
    """One variant for small images, in evaluation mode, norms randomised; pytest keeps one alive at a time."""
    torch.manual_seed(0)
    return randomise_norms(timm.create_model(request.param, img_size=SIDE)).eval()


@pytest.fixture
def net(built) -> RepMLPNet:
    """The same, to be changed."""
    return copy.deepcopy(built)


def test_six_variants_are_registered():
    assert set(NAMES) == set(PUBLISHED)


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_the_papers(name):
    train, merged = on_meta(name), on_meta(name, inference_mode=True)
    norms = sum(count_params(m) for m in merged.modules() if isinstance(m, _BatchNorm))
    params = (count_params(train), count_params(merged), count_params(merged) - norms)
    macs = tuple(count_macs(m, m.img_size) / 1e9 for m in (train, merged))
    *exact, printed_params, printed_flops = PUBLISHED[name]
    assert [*params, round(macs[0], 3), round(macs[1], 3)] == exact
    assert round(params[2] / 1e6, 1) == printed_params
    # L256's 11.579 is printed as 11.5
    assert (int(macs[1] * 10) / 10 if name == "repmlpnet_l256" else round(macs[1], 1)) == printed_flops


@pytest.mark.parametrize("name", NAMES)
def test_default_cfgs_describe_the_model(name):
    model = on_meta(name)
    cfg, side = model.pretrained_cfg, int(name[-3:])
    assert cfg["input_size"] == (3, side, side) and model.img_size == (side, side)
    assert cfg["num_classes"] == model.num_classes == 1000
    assert tuple(cfg["mean"]) == (0.485, 0.456, 0.406) and tuple(cfg["std"]) == (0.229, 0.224, 0.225)
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    features = model.forward_features(torch.empty(1, *cfg["input_size"], device="meta"))
    assert tuple(features.shape[-2:]) == cfg["pool_size"]
    data = timm.data.resolve_data_config({}, model=model)
    assert (data["input_size"], data["interpolation"], data["crop_pct"]) == ((3, side, side), "bicubic", 1.0)


def test_construction_on_meta_allocates_nothing():
    model = on_meta("repmlpnet_l256", drop_path_rate=0.1, features_only=True)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))


@torch.no_grad()
def test_forward(built):
    x = images()
    logits = built(x)
    assert logits.shape == (2, 1000) and bool(logits.isfinite().all())
    features = built.forward_features(x)
    assert features.shape == (2, built.num_features, 2, 2)
    pooled = built.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, built.head_hidden_size)
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    torch.testing.assert_close(logits, pooled @ built.head.weight.T + built.head.bias)
    assert torch.equal(built.forward_head(features), logits)


def test_every_parameter_gets_a_gradient(net):
    net.train()(images(4)).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_checkpointing_changes_nothing(built):
    """The same loss, gradients and running statistics, with random numbers drawn in the units; each batch counts once.

    A unit is computed twice, which the convolutions in it show.
    """
    x = images(2)
    found, calls = {}, {}
    for checkpointing in (False, True):
        net = copy.deepcopy(built).train()
        net.set_grad_checkpointing(checkpointing)
        for unit in net.stages[-1]:
            unit.drop_path = timm.layers.DropPath(0.5)
        calls[checkpointing] = []
        net.stages[-1][-1].ffn.fc1.register_forward_hook(lambda *_, kind=checkpointing: calls[kind].append(1))
        torch.manual_seed(1)
        loss = net(x).square().mean()
        loss.backward()
        found[checkpointing] = {
            "loss": loss.detach(),
            **{name: p.grad for name, p in net.named_parameters()},
            **dict(net.named_buffers()),
        }
    assert (len(calls[False]), len(calls[True])) == (1, 2)
    assert found[False].keys() == found[True].keys()
    assert [name for name, value in found[False].items() if not torch.equal(value, found[True][name])] == []
    counts = {int(value) for name, value in found[True].items() if name.endswith("num_batches_tracked")}
    assert counts == {1}


@torch.no_grad()
def test_checkpointing_is_for_training_alone(net):
    x = images()
    expected = net(x)
    net.set_grad_checkpointing()
    assert torch.equal(net(x), expected)
    net.set_grad_checkpointing(False)
    assert not net.grad_checkpointing


@pytest.mark.parametrize("name", NAMES)
def test_drop_rates(name):
    model = on_meta(name, drop_rate=0.3, drop_path_rate=0.2)
    blocks = sum(SHAPES[name][1])
    rates = [getattr(unit.drop_path, "drop_prob", 0.0) for stage in model.stages for unit in stage]
    assert rates == pytest.approx([0.2 * i / (blocks - 1) for i in range(blocks)])
    assert model.head_drop.p == 0.3


@pytest.mark.parametrize("name", ["drop_rate", "drop_path_rate"])
@pytest.mark.parametrize("rate", [-0.1, 1, 1.5, float("nan")])
def test_rates_that_are_none_are_refused(name, rate):
    with pytest.raises(ValueError, match=f"^{name}={rate}: use a number from 0 to below 1"):
        on_meta("repmlpnet_t224", **{name: rate})


def test_drops_act_while_training_only():
    model = timm.create_model("repmlpnet_t224", img_size=SIDE, drop_rate=0.5, drop_path_rate=0.5)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    x = images()
    with torch.no_grad():
        assert torch.equal(model.eval()(x), model(x))
        model.train()
        for norm in norms:
            norm.eval()
        assert not torch.equal(model(x), model(x))
        pooled = model.forward_head(torch.ones(1, model.num_features, 2, 2), pre_logits=True)
        assert {float(v) for v in pooled.unique()} == {0.0, 2.0}


@torch.no_grad()
def test_forward_intermediates(built):
    x = images()
    features = built.forward_features(x)
    final, maps = built.forward_intermediates(x)
    assert torch.equal(final, features)
    channels = [info["num_chs"] for info in built.feature_info]
    assert [tuple(m.shape) for m in maps] == [(2, c, s, s) for c, s in zip(channels, (16, 8, 4, 2), strict=True)]
    # each is what the next down-sampling gets: computed here by the modules alone
    y = built.stem(x.contiguous(memory_format=torch.channels_last))
    for i, stage in enumerate(built.stages):
        y = stage(built.downsamples[i - 1](y) if i else y)
        assert torch.equal(maps[i], y)
    assert torch.equal(built.norm(maps[-1]), features)
    _, normed = built.forward_intermediates(x, norm=True)
    assert torch.equal(normed[-1], features) and torch.equal(normed[0], maps[0])

    two = built.forward_intermediates(x, indices=2, intermediates_only=True)
    assert len(two) == 2 and all(torch.equal(a, b) for a, b in zip(two, maps[2:], strict=True))
    some = built.forward_intermediates(x, indices=[0, -2], intermediates_only=True)
    assert len(some) == 2 and all(torch.equal(a, maps[i]) for a, i in zip(some, (0, 2), strict=True))


@torch.no_grad()
def test_forward_intermediates_stops_early(net):
    x = images()
    expected = net.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    entered = []
    for i, stage in enumerate(net.stages):
        stage.register_forward_hook(lambda *_, i=i: entered.append(i))
    final, maps = net.forward_intermediates(x, indices=[0, 1], stop_early=True)
    assert entered == [0, 1] and torch.equal(final, maps[-1])
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    with pytest.raises(ValueError, match="output_fmt='NLC'"):
        net.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("name", NAMES)
def test_features_only_at_full_size(name):
    model, side = on_meta(name, features_only=True), int(name[-3:])
    channels = SHAPES[name][0]
    assert model.feature_info.channels() == list(channels)
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    found = [tuple(f.shape) for f in model(torch.empty(1, 3, side, side, device="meta"))]
    assert found == [(1, c, side // s, side // s) for c, s in zip(channels, (4, 8, 16, 32), strict=True)]


@torch.no_grad()
def test_features_only_gives_the_nets_maps(built):
    x = images()
    expected = built.forward_intermediates(x, intermediates_only=True)
    backbone = timm.create_model(
        built.pretrained_cfg["architecture"], img_size=SIDE, features_only=True, out_indices=(0, 3)
    )
    state = {name: v for name, v in built.state_dict().items() if not name.startswith(("norm.", "head."))}
    backbone.model.load_state_dict(state)
    found = backbone.eval()(x)
    assert len(found) == 2 and torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[3])


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("name", NAMES)
def test_a_single_out_index_prunes_the_rest(name, index):
    model = on_meta(name, features_only=True, out_indices=(index,), inference_mode=True)
    channels, blocks = SHAPES[name]
    assert (model.feature_info.channels(), model.feature_info.reduction()) == ([channels[index]], [4 * 2**index])
    kept = {key.split(".")[0] + "." + key.split(".")[1] for key in model.model.state_dict()}
    stages = {f"stages.{i}" for i in range(index + 1)} | {f"downsamples.{i}" for i in range(index)}
    assert kept == {"stem.conv", "stem.norm"} | stages
    assert sum(isinstance(m, RepMLPBlock) for m in model.modules()) == sum(blocks[: index + 1])
    side = int(name[-3:])
    (found,) = model(torch.empty(1, 3, side, side, device="meta"))
    assert tuple(found.shape) == (1, channels[index], side // 4 // 2**index, side // 4 // 2**index)


def test_pruning_keeps_norm_and_head_where_asked(net):
    x = images()
    with torch.no_grad():
        expected = net(x)
        assert net.prune_intermediate_layers([3], prune_norm=False, prune_head=False) == [3]
        assert torch.equal(net(x), expected)
        map_1 = net.forward_intermediates(x, [1], intermediates_only=True)[0]
        assert net.prune_intermediate_layers([1]) == [1]
        assert torch.equal(net(x), map_1)
    assert net.num_features == net.head_hidden_size == map_1.shape[1] and net.num_classes == 0


def test_classifier(net):
    x = images()
    with torch.no_grad():
        features = net.forward_features(x)
        assert net.get_classifier() is net.head
        net.reset_classifier(10)
        assert net.num_classes == 10 and net.get_classifier().out_features == 10 and net(x).shape == (2, 10)
        net.reset_classifier(0)
        assert isinstance(net.get_classifier(), nn.Identity)
        torch.testing.assert_close(net(x), features.mean((2, 3)))
        net.reset_classifier(0, "")
        assert torch.equal(net(x), features)
        with pytest.raises(ValueError, match="num_classes=10 needs global_pool='avg'"):
            net.reset_classifier(10)
        net.reset_classifier(10, "avg")
        assert net(x).shape == (2, 10)
    with pytest.raises(ValueError, match="global_pool='max'"):
        net.reset_classifier(10, "max")
    net.double().reset_classifier(3)
    assert net.head.weight.dtype == torch.float64


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_constructor_arguments_of_timm(name):
    x = torch.empty(2, 3, 128, 64, device="meta")
    features = SHAPES[name][0][-1]
    model = on_meta(name, img_size=(128, 64), num_classes=0)
    assert model.img_size == (128, 64) and tuple(model(x).shape) == (2, features)
    assert [stage[0].block.channel_perceptron.size for stage in model.stages] == [(32, 16), (16, 8), (8, 4), (4, 2)]
    model = on_meta(name, img_size=128, num_classes=7, inference_mode=True)
    assert model.img_size == (128, 128) and tuple(model(x).shape) == (2, 7)
    model = on_meta(name, img_size=128, in_chans=1, num_classes=0, global_pool="", inference_mode=True)
    assert model.in_chans == 1 and tuple(model(x[:, :1]).shape) == (2, features, 4, 2)
    with pytest.raises(ValueError, match="img_size=100 is no multiple of 32"):
        on_meta(name, img_size=100)


@pytest.mark.parametrize("name", NAMES)
def test_groups_cover_every_parameter_in_order_of_depth(name):
    model = on_meta(name)
    blocks = SHAPES[name][1]
    for coarse in (False, True):
        layer = group_parameters(model, model.group_matcher(coarse), reverse=True)
        assert layer.keys() == dict(model.named_parameters()).keys()
        # what forward() goes through, and the number that each part should have
        expected, depth = {"stem": 0}, 0
        for i, units in enumerate(blocks):
            if i:
                expected[f"downsamples.{i - 1}"] = depth + 1
            for j in range(units):
                depth += not (coarse and j)
                expected[f"stages.{i}.{j}"] = depth
        expected |= {"norm": depth, "head": depth + 1}
        assert {key: {v for k, v in layer.items() if k.startswith(key + ".")} for key in expected} == {
            key: {value} for key, value in expected.items()
        }


@pytest.mark.parametrize("name", NAMES)
def test_layer_decay(name):
    model = on_meta(name)
    groups = param_groups_layer_decay(model, weight_decay=0.1, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scale.keys() == {id(p) for p in model.parameters()}
    depth = sum(SHAPES[name][1])
    assert scale[id(model.head.weight)] == 1 and scale[id(model.stem.conv.weight)] == 0.5 ** (depth + 1)
    assert scale[id(model.downsamples[2].conv.weight)] == scale[id(model.stages[3][0].ffn.fc1.weight)] == 0.5**2
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.ndim > 1}


@torch.no_grad()
def test_reparameterize_model(built):
    x = images()
    merged = timm.utils.reparameterize_model(nn.Sequential(built))[0]
    assert any("local_perceptron" in name for name in built.state_dict())
    fresh = timm.create_model(built.pretrained_cfg["architecture"], img_size=SIDE, inference_mode=True).eval()
    fresh.load_state_dict(merged.state_dict())
    expected = built(x)
    assert float((merged(x) - expected).norm() / expected.norm()) < 1e-5
    assert torch.equal(fresh(x), merged(x))


@torch.no_grad()
def test_deepcopy_is_independent(built):
    x = images()
    expected = built(x)
    twin = copy.deepcopy(built)
    assert torch.equal(twin(x), expected)
    twin.reparameterize()
    twin.reset_classifier(3)
    assert torch.equal(built(x), expected)


MAP_INPUTS = [(256, 256), (512, 512), (512, 1024), (320, 192)]


@pytest.mark.parametrize("size", MAP_INPUTS)
def test_d256_takes_other_image_sizes(size):
    model = on_meta("repmlpnet_d256", features_only=True)
    height, width = size
    found = [tuple(f.shape) for f in model(torch.empty(1, 3, height, width, device="meta"))]
    channels = SHAPES["repmlpnet_d256"][0]
    assert found == [(1, c, height // s, width // s) for c, s in zip(channels, (4, 8, 16, 32), strict=True)]


@pytest.mark.parametrize("stage", range(4))
@torch.no_grad()
def test_identity_kernels_of_d256_give_the_map_back(stage):
    """Partitions of the trained size, whole and cut short: no tile, channel or pixel is displaced, bit for bit."""
    side, stride = 64 // 2**stage, 4 * 2**stage
    channels, share_sets = (80, 160, 320, 640)[stage], (1, 4, 16, 128)[stage]
    layer = on_meta("repmlpnet_d256").stages[stage][0].block.channel_perceptron
    assert (layer.size, layer.share_sets) == ((side, side), share_sets)
    block = RepMLPBlock(channels, (side, side), share_sets, global_perceptron=False, inference_mode=True)
    block.channel_perceptron.weight.copy_(torch.eye(side * side).expand(share_sets, -1, -1))
    block.channel_perceptron.bias.zero_()
    for height, width in MAP_INPUTS:
        x = torch.randn(1, channels, height // stride, width // stride)
        assert torch.equal(block(x), x)
