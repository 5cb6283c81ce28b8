"""Down-samplings that overlap: what they compute and cost, what passes between tiles, weights for such backbones."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import randomise_norms
from timm.models import group_parameters

from repmlp import RepMLPNet, deploy, load_model, resize, save_model
from repmlp.backbones import load_backbone
from repmlp.checkpoints import config_of, convert, load, to_official
from repmlp.cost import count_macs, count_params
from repmlp.models.repmlpnet import ConvBNReLU, OverlappingEmbedding

NAMES = timm.list_models("repmlpnet*", module="repmlpnet")
SMALL = {"img_size": 32, "stem_stride": 2, "channels": (8, 16, 32), "blocks": (1, 2, 1), "share_sets": (2, 4, 8)}
FRESH = ["downsamples.0", "downsamples.1"]


def net(**changes) -> RepMLPNet:
    """A small net in evaluation mode, whose batch norms are far from their initial values."""
    return randomise_norms(RepMLPNet(**{**SMALL, "num_classes": 5, **changes})).eval()


def backbone(**changes) -> RepMLPNet:
    """The same net as features_only leaves it: no head, no last batch norm."""
    model = net(**{"embed_kernel": 3, **changes})
    model.prune_intermediate_layers(3, prune_norm=True)
    return model


@pytest.mark.parametrize("size", [(12, 8), (7, 12), (5, 9), (1, 1)])
@pytest.mark.parametrize("k", [3, 5, 7])
@torch.no_grad()
def test_it_is_one_convolution(k, size):
    embedding = randomise_norms(OverlappingEmbedding(4, 6, k)).double().eval()
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    kernel = torch.zeros(6, 4, k, k, dtype=torch.float64)
    for o in range(6):
        for i in range(4):
            kernel[o, i] = embedding.conv.weight[o, 0] * embedding.expand.weight[o, i, 0, 0]
    y = F.conv2d(x, kernel, stride=2, padding=k // 2)
    norm = embedding.norm
    y = (y - norm.running_mean.view(-1, 1, 1)) / (norm.running_var.view(-1, 1, 1) + norm.eps).sqrt()
    expected = (y * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)).clamp(min=0)
    found = embedding(x)
    assert found.shape == (2, 6, -(-size[0] // 2), -(-size[1] // 2))
    assert float((found - expected).abs().max()) < 1e-12


@pytest.mark.parametrize("k", [3, 5])
def test_what_it_costs(k):
    with torch.device("meta"):
        two, wide = RepMLPNet(**SMALL), RepMLPNet(**SMALL, embed_kernel=k)
    pairs = ((8, 16), (16, 32))
    assert count_params(wide) - count_params(two) == sum(a * b + k * k * b - 4 * a * b for a, b in pairs)
    # maps of 16 and 8 before, 8 and 4 after: the 1x1 before the stride costs what 2x2 with stride 2 does
    assert count_macs(wide, 32) - count_macs(two, 32) == k * k * (16 * 8 * 8 + 32 * 4 * 4)
    assert [type(d) for d in two.downsamples] == [ConvBNReLU] * 2 and two.embed_kernel is None
    assert [type(d) for d in wide.downsamples] == [OverlappingEmbedding] * 2 and wide.embed_kernel == k
    assert type(wide.stem) is ConvBNReLU


def test_table_6_prints_the_difference_between_5x5_and_3x3():
    """1960.16 - 1960.01 GFLOPs for images of 1024x2048: the 1x1 expands before the depth-wise convolution."""
    macs = []
    for k in (3, 5):
        with torch.device("meta"):
            model = timm.create_model("repmlpnet_d256", embed_kernel=k, features_only=True, inference_mode=True)
        macs.append(count_macs(model, (1024, 2048)))
    assert round((macs[1] - macs[0]) / 1e9, 2) == 0.15


@pytest.mark.parametrize("bad", [True, False, 0, 1, 2, 4, -3, 3.0, "3", (3, 3)])
def test_another_embed_kernel_is_refused(bad):
    with pytest.raises(ValueError, match=r"embed_kernel=.*use None for 2x2 embeddings, or an odd number >= 3"):
        RepMLPNet(**SMALL, embed_kernel=bad)


def columns_that_differ(a: torch.Tensor, b: torch.Tensor) -> list[int]:
    return [int(i) for i in (a != b).any(dim=2).any(dim=1).any(dim=0).nonzero()]


@pytest.mark.parametrize("changed", ["left", "right"])
@pytest.mark.parametrize("k", [None, 3, 5])
@torch.no_grad()
def test_tiles_communicate(k, changed):
    """An image of two tiles side by side, one of them changed: which columns of the maps become others."""
    model = net(embed_kernel=k, global_perceptron=False)
    x = torch.randn(1, 3, 32, 64)
    y = x.clone()
    half = slice(0, 32) if changed == "left" else slice(32, 64)
    y[..., half] += torch.randn(1, 3, 32, 32)
    maps = [model.forward_intermediates(image, intermediates_only=True) for image in (x, y)]
    own = [list(range(w // 2)) if changed == "left" else list(range(w // 2, w)) for w in (32, 16, 8)]
    # column o of the down-sampled map sees the columns 2 o - k // 2 ... 2 o + k // 2
    reached = {(3, "left"): [*range(9)], (5, "left"): [*range(9)], (5, "right"): [*range(7, 16)]}.get((k, changed))
    downs = [model.downsamples[0](first) for first, *_ in maps]
    assert columns_that_differ(*downs) == (reached or own[1])
    # from a tile's border the FC takes it through the whole tile
    expected = [own[0], list(range(16)), list(range(8))] if reached else own
    assert [columns_that_differ(a, b) for a, b in zip(*maps, strict=True)] == expected


@pytest.mark.parametrize("name", NAMES)
def test_registered_variants_take_it(name):
    side = int(name[-3:])
    with torch.device("meta"):
        model = timm.create_model(name, embed_kernel=3, features_only=True).eval()
        plain = timm.create_model(name, features_only=True).eval()
        x = torch.empty(1, 3, side, 2 * side)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert model.feature_info.channels() == plain.feature_info.channels()
    assert [f.shape for f in model(x)] == [f.shape for f in plain(x)]
    net = model.model
    for coarse in (False, True):
        layer = group_parameters(net, net.group_matcher(coarse), reverse=True)
        assert layer.keys() == dict(net.named_parameters()).keys()
        for i, stage in enumerate(net.downsamples):
            first = layer[f"stages.{i + 1}.0.norm1.weight"]
            assert {layer[f"downsamples.{i}.{key}"] for key, _ in stage.named_parameters()} == {first}


def test_maps_of_odd_size_are_rounded_up_and_pruning_works():
    model = net(embed_kernel=3)
    with torch.no_grad():
        maps = model.forward_intermediates(torch.randn(1, 3, 20, 44), intermediates_only=True)
    assert [tuple(m.shape[2:]) for m in maps] == [(10, 22), (5, 11), (3, 6)]
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)
    assert model.prune_intermediate_layers([1]) == [1] and len(model.downsamples) == 1


def test_checkpointing_changes_nothing():
    model, x, found = net(embed_kernel=3), torch.randn(4, 3, 32, 32), []
    for enable in (False, True):
        twin = copy.deepcopy(model).train()
        twin.set_grad_checkpointing(enable)
        twin(x).square().mean().backward()
        assert [name for name, p in twin.named_parameters() if p.grad is None or not p.grad.any()] == []
        found.append({name: p.grad for name, p in twin.named_parameters()} | dict(twin.named_buffers()))
    assert [name for name, value in found[0].items() if not torch.equal(value, found[1][name])] == []


@pytest.mark.parametrize("k", [3, 5])
def test_merging_and_files(k, tmp_path):
    model, x = net(embed_kernel=k), torch.randn(2, 3, 40, 32)
    state = model.state_dict()
    assert convert(state).keys() == state.keys() and config_of(state).config["embed_kernel"] == k
    with torch.no_grad():
        expected = model(x)
        for name, form in (("train", model), ("merged", timm.utils.reparameterize_model(model))):
            path = tmp_path / f"{name}.pth"
            torch.save({"model": form.state_dict()}, path)
            assert torch.equal(load(path)(x), form(x))
            save_model(path.with_suffix(".safetensors"), form, config_of(state).config)
            assert torch.equal(load_model(path.with_suffix(".safetensors"))[0](x), form(x))
            torch.testing.assert_close(form(x), expected, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(deploy(form)(x), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(resize(model, 32)(x), expected)
    assert "embed_kernel" not in config_of(net().state_dict()).config
    with pytest.raises(ValueError, match=r"overlapping embeddings .* cannot be written: the authors' code has 2x2"):
        to_official(state)
    del state["downsamples.1.expand.weight"]
    with pytest.raises(ValueError, match=r"downsamples\.1\.expand\.weight is missing"):
        convert(state)


@torch.no_grad()
def test_features_only_backbone_merges():
    model = timm.create_model("repmlpnet_t224", img_size=64, embed_kernel=3, features_only=True)
    randomise_norms(model).eval()
    merged = timm.utils.reparameterize_model(model)
    assert not any("local_perceptron" in name for name in merged.state_dict())
    x = torch.randn(1, 3, 128, 64)
    for a, b in zip(model(x), merged(x), strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-5


def wrap_official(state: dict) -> dict:
    return {"epoch": 3, "model": {f"module.{key}": tensor for key, tensor in to_official(state).items()}}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("form", [dict, wrap_official])
def test_a_classifiers_weights_go_into_a_backbone(form, merged):
    classifier = net()
    if merged:
        classifier.reparameterize()
    weights = classifier.state_dict()
    model = backbone(inference_mode=merged)
    before = copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    assert load_backbone(model, form(weights)) == FRESH
    for name, value in model.state_dict().items():
        source = before if name.startswith("downsamples.") else weights
        assert torch.equal(value, source[name]), name
    assert all(parameters[name] is p for name, p in model.named_parameters())

    # with the classifier's embeddings nothing is fresh, and the maps are the classifier's
    plain, x = backbone(embed_kernel=None, inference_mode=merged), torch.randn(1, 3, 32, 64)
    assert load_backbone(plain, form(weights)) == []
    with torch.no_grad():
        expected = classifier.forward_intermediates(x, intermediates_only=True)
        found = plain.forward_intermediates(x, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_which_embeddings_stay_fresh():
    three = net(embed_kernel=3).state_dict()
    same, other, short = backbone(), backbone(embed_kernel=5), backbone()
    assert load_backbone(same, three) == []
    assert all(torch.equal(value, three[name]) for name, value in same.state_dict().items())
    assert load_backbone(other, three) == FRESH
    short.prune_intermediate_layers([1])
    assert load_backbone(short, net().state_dict()) == FRESH[:1]
    whole = net(embed_kernel=3)
    assert load_backbone(whole, net().state_dict()) == FRESH
    assert load_backbone(backbone(), net().half().state_dict()) == FRESH


FC = r"stages\.0\.0\.block\.channel_perceptron"


@pytest.mark.parametrize(
    ("there", "here", "reason"),
    [
        (
            {"img_size": 64},
            {},
            rf"{FC}\.weight is \(2, 1024, 1024\) there and \(2, 256, 256\) here: .*img_size=64, or r",
        ),
        (
            {"img_size": (32, 64)},
            {},
            r"\(2, 512, 512\) there .* build the backbone with the img_size of the weights, or",
        ),
        (
            {"share_sets": (1, 4, 8)},
            {},
            rf"{FC}\.weight is \(1, 256, 256\) there and \(2, .* here: .*config_of\(weights\)",
        ),
        ({"channels": (16, 16, 32)}, {}, r"stem\.conv\.weight is \(16, 3, 2, 2\) there and \(8, 3, 2, 2\) here: build"),
        ({"blocks": (1, 3, 1)}, {}, r"stages\.1\.2\.norm1\.weight is missing here"),
        ({"blocks": (1, 1, 1)}, {}, r"stages\.1\.1\.norm1\.weight is missing there"),
        ({"kernels": (1, 3, 5)}, {}, rf"{FC}\.local_perceptron\.convs\.5\.weight is missing here"),
        ({"kernels": (3,)}, {}, rf"{FC}\.local_perceptron\.convs\.1\.weight is missing there"),
        ({"global_perceptron": False}, {}, r"global_perceptron\.fc1\.weight is missing there"),
        ({}, {"inference_mode": True}, rf"{FC}\.bias is missing there"),
        ({"inference_mode": True}, {}, r"merged and the model is not: create it with inference_mode=True"),
    ],
)
def test_weights_of_another_network_are_refused(there, here, reason):
    model = backbone(**here)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=reason):
        load_backbone(model, net(**there).state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_head_of_its_own_and_wrappers_are_refused():
    with pytest.raises(ValueError, match=r"head\.weight is \(5, 32\) there and \(7, 32\) here"):
        load_backbone(net(num_classes=7), net().state_dict())
    with pytest.raises(TypeError, match="takes a RepMLPNet itself, no wrapper; got FeatureGetterNet"):
        load_backbone(timm.create_model("repmlpnet_t224", img_size=32, features_only=True), net().state_dict())
    resized = resize(net(), 64)
    assert load_backbone(backbone(img_size=64), resized.state_dict()) == FRESH
