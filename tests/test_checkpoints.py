"""Weights in the authors' and mmpretrain's formats, spelled out here, against a plain computation from them."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import randomise_norms
from safetensors.torch import save_file
from torch import nn

from repmlp import RepMLPNet, build_model
from repmlp.backbones import load_backbone
from repmlp.checkpoints import config_of, convert, load, to_official
from repmlp.models.mixers import build_resmlp
from repmlp.reading import read

# The names that other projects give to the layers
OFFICIAL = {
    "stem": "conv_embedding.conv",
    "stem_bn": "conv_embedding.bn",
    "bn1": "stages.{}.{}.prebn1",
    "bn2": "stages.{}.{}.prebn2",
    "gp1": "stages.{}.{}.repmlp_block.gp.fc1",
    "gp2": "stages.{}.{}.repmlp_block.gp.fc2",
    "fc3": "stages.{}.{}.repmlp_block.fc3",
    "fc3_bn": "stages.{}.{}.repmlp_block.fc3_bn",
    "conv": "stages.{}.{}.repmlp_block.repconv{}.conv",
    "conv_bn": "stages.{}.{}.repmlp_block.repconv{}.bn",
    "ffn1": "stages.{}.{}.ffn_block.ffn_fc1.conv",
    "ffn1_bn": "stages.{}.{}.ffn_block.ffn_fc1.bn",
    "ffn2": "stages.{}.{}.ffn_block.ffn_fc2.conv",
    "ffn2_bn": "stages.{}.{}.ffn_block.ffn_fc2.bn",
    "down": "embeds.{}.conv",
    "down_bn": "embeds.{}.bn",
    "norm": "head_norm",
    "head": "head",
}
ALONE = {
    **OFFICIAL,
    "stem": "patch_embed.projection",
    "stem_bn": "patch_embed.norm",
    "bn1": "stages.{}.{}.norm1",
    "bn2": "stages.{}.{}.norm2",
    "gp1": "stages.{}.{}.repmlp_block.gp.conv1.conv",
    "gp2": "stages.{}.{}.repmlp_block.gp.conv2.conv",
    "down": "downsample_layers.{}.conv",
    "down_bn": "downsample_layers.{}.bn",
    "norm": "final_norm",
}
MMPRETRAIN = {layer: f"backbone.{name}" for layer, name in ALONE.items()} | {"head": "head.fc"}
FORMATS = {"official": OFFICIAL, "mmpretrain": MMPRETRAIN, "alone": ALONE}

# channels, blocks, share-sets, map size of each stage, kernels, patch size, image channels, classes
SMALL = {
    "channels": (8, 16),
    "blocks": (2, 1),
    "sets": (2, 8),
    "sizes": ((8, 8), (4, 4)),
    "kernels": (1, 3),
    "patch": 2,
    "in_chans": 3,
    "classes": 5,
}
NETS = {
    "two stages": SMALL,
    "one stage, one kernel": {**SMALL, "channels": (8,), "blocks": (1,), "sets": (8,), "sizes": ((5, 5),), "patch": 4}
    | {"kernels": (3,), "in_chans": 1},
    "three stages, three kernels": {**SMALL, "channels": (4, 8, 16), "blocks": (1, 2, 1), "sets": (1, 4, 4)}
    | {"sizes": ((8, 8), (4, 4), (2, 2)), "kernels": (1, 3, 5)},
    "no kernels": {**SMALL, "kernels": ()},
}
VARIANTS = {
    "repmlpnet_t224": (224, (64, 128, 256, 512), (2, 2, 6, 2), (1, 4, 16, 128)),
    "repmlpnet_b224": (224, (96, 192, 384, 768), (2, 2, 12, 2), (1, 4, 32, 128)),
    "repmlpnet_t256": (256, (64, 128, 256, 512), (2, 2, 6, 2), (1, 4, 16, 128)),
    "repmlpnet_b256": (256, (96, 192, 384, 768), (2, 2, 12, 2), (1, 4, 32, 128)),
    "repmlpnet_d256": (256, (80, 160, 320, 640), (2, 2, 18, 2), (1, 4, 16, 128)),
    "repmlpnet_l256": (256, (96, 192, 384, 768), (2, 2, 18, 2), (1, 4, 32, 256)),
}


def variant(name: str, img: int | None = None, **changes) -> dict:
    native, channels, blocks, sets = VARIANTS[name]
    sides = [(img or native) // 4 // 2**i for i in range(4)]
    shape = {"channels": channels, "blocks": blocks, "sets": sets, "sizes": [(s, s) for s in sides]}
    return {**SMALL, **shape, "patch": 4, "classes": 1000, **changes}


def shapes_of(net: dict, names: dict, merged: bool = False, gp_inner=lambda c: c // 4) -> dict[str, tuple]:
    """Write down every tensor of a file; the backbone alone has no head."""
    shapes = {}

    def norm(name, features):
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{name}.{tensor}"] = (features,)
        shapes[f"{name}.num_batches_tracked"] = ()

    first = net["channels"][0]
    shapes[names["stem"] + ".weight"] = (first, net["in_chans"], net["patch"], net["patch"])
    norm(names["stem_bn"], first)
    for i, (c, depth, s, (h, w)) in enumerate(
        zip(net["channels"], net["blocks"], net["sets"], net["sizes"], strict=True)
    ):
        for j in range(depth):
            norm(names["bn1"].format(i, j), c)
            shapes[names["gp1"].format(i, j) + ".weight"] = (gp_inner(c), c, 1, 1)
            shapes[names["gp1"].format(i, j) + ".bias"] = (gp_inner(c),)
            shapes[names["gp2"].format(i, j) + ".weight"] = (c, gp_inner(c), 1, 1)
            shapes[names["gp2"].format(i, j) + ".bias"] = (c,)
            shapes[names["fc3"].format(i, j) + ".weight"] = (s * h * w, h * w, 1, 1)
            if merged:
                shapes[names["fc3"].format(i, j) + ".bias"] = (s * h * w,)
            else:
                norm(names["fc3_bn"].format(i, j), s)
                for k in net["kernels"]:
                    shapes[names["conv"].format(i, j, k) + ".weight"] = (s, 1, k, k)
                    norm(names["conv_bn"].format(i, j, k), s)
            norm(names["bn2"].format(i, j), c)
            shapes[names["ffn1"].format(i, j) + ".weight"] = (4 * c, c, 1, 1)
            norm(names["ffn1_bn"].format(i, j), 4 * c)
            shapes[names["ffn2"].format(i, j) + ".weight"] = (c, 4 * c, 1, 1)
            norm(names["ffn2_bn"].format(i, j), c)
        if i:
            shapes[names["down"].format(i - 1) + ".weight"] = (c, net["channels"][i - 1], 2, 2)
            norm(names["down_bn"].format(i - 1), c)
    norm(names["norm"], net["channels"][-1])
    if names is not ALONE and net["classes"]:
        shapes[names["head"] + ".weight"] = (net["classes"], net["channels"][-1])
        shapes[names["head"] + ".bias"] = (net["classes"],)
    return shapes


def file_of(net: dict, names: dict = OFFICIAL, merged: bool = False, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """Fill a file with random tensors whose activations stay of order one."""
    state = {}
    for name, shape in shapes_of(net, names, merged).items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.randint(1, 1000, ())
        elif name.endswith("running_var"):
            state[name] = torch.empty(shape, dtype=dtype).uniform_(0.2, 3.0)
        else:
            state[name] = torch.randn(shape, dtype=dtype) / math.sqrt(math.prod(shape[1:]))
    return state


def logits(state: dict, x: torch.Tensor, net: dict, names: dict = OFFICIAL) -> torch.Tensor:
    """Compute the network at its native resolution from a file's tensors; the pooled features where it has no head."""

    def norm(y, name):
        mean, var, weight, bias = (state[f"{name}.{t}"] for t in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(y, mean, var, weight, bias, training=False)

    def conv(y, name, **kwargs):
        return F.conv2d(y, state[f"{name}.weight"], state.get(f"{name}.bias"), **kwargs)

    x = F.relu(norm(conv(x, names["stem"], stride=net["patch"]), names["stem_bn"]))
    for i, (c, depth, s, (h, w)) in enumerate(
        zip(net["channels"], net["blocks"], net["sets"], net["sizes"], strict=True)
    ):
        if i:
            x = F.relu(norm(conv(x, names["down"].format(i - 1), stride=2), names["down_bn"].format(i - 1)))
        assert x.shape[1:] == (c, h, w)
        for j in range(depth):
            y = norm(x, names["bn1"].format(i, j))
            gate = conv(F.adaptive_avg_pool2d(y, 1), names["gp1"].format(i, j))
            gate = torch.sigmoid(conv(F.relu(gate), names["gp2"].format(i, j)))
            # (N, C, h, w) -> (N*C/S, S*h*w, 1, 1)
            out = conv(y.reshape(-1, s * h * w, 1, 1), names["fc3"].format(i, j), groups=s).reshape(-1, s, h, w)
            if names["fc3_bn"].format(i, j) + ".weight" in state:
                out = norm(out, names["fc3_bn"].format(i, j))
                for k in net["kernels"]:
                    branch = conv(y.reshape(-1, s, h, w), names["conv"].format(i, j, k), padding=k // 2, groups=s)
                    out = out + norm(branch, names["conv_bn"].format(i, j, k))
            x = x + out.reshape(x.shape) * gate
            y = conv(norm(x, names["bn2"].format(i, j)), names["ffn1"].format(i, j))
            y = F.gelu(norm(y, names["ffn1_bn"].format(i, j)))
            x = x + norm(conv(y, names["ffn2"].format(i, j)), names["ffn2_bn"].format(i, j))
    x = norm(x, names["norm"]).mean(dim=(2, 3))
    head = names["head"]
    return x if f"{head}.weight" not in state else F.linear(x, state[f"{head}.weight"], state[f"{head}.bias"])


def image(net: dict, dtype=torch.float64) -> torch.Tensor:
    h, w = net["sizes"][0]
    return torch.randn(2, net["in_chans"], h * net["patch"], w * net["patch"], dtype=dtype)


@torch.no_grad()
def difference(model: nn.Module, state: dict, net: dict, names: dict = OFFICIAL) -> float:
    """Compare a network with the plain computation: relative, in the tensors' dtype."""
    x = image(net, next(model.parameters()).dtype)
    expected = logits(state, x, net, names)
    return float((model.eval()(x) - expected).norm() / expected.norm())


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", NETS)
def test_converted_net_computes_what_the_file_says(name, form, merged):
    net, names = NETS[name], FORMATS[form]
    state = file_of(net, names, merged)
    before = {key: tensor.clone() for key, tensor in state.items()}
    converted = convert(state)
    config, num_classes, inference_mode = config_of(converted)
    assert inference_mode is merged and num_classes == (0 if form == "alone" else 5)
    model = build_model(config, num_classes, inference_mode).double()
    model.load_state_dict(converted, strict=True)
    assert difference(model, state, net, names) < 1e-12
    assert same(state, before)


def test_branches_of_any_kind_in_files_of_ours(tmp_path):
    """The order of a shuffled grid is the file's, and a map that is no square leaves room for a dilated row."""
    arguments = {"channels": (8, 16), "blocks": (1, 1), "share_sets": (2, 4), "num_classes": 5}
    for img_size, kernels in ((16, [1, "3s", "3d2"]), ((8, 32), [3, "1x3d5", "1x3s"])):
        torch.manual_seed(1)
        net = randomise_norms(RepMLPNet(img_size, 2, kernels=kernels, **arguments)).eval()
        state = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
        assert same(convert(state), net.state_dict())
        torch.manual_seed(2)
        other = RepMLPNet(img_size, 2, kernels=kernels, **arguments).eval()
        x = torch.randn(1, 3, *other.img_size)
        assert not torch.equal(other.stages[0](other.stem(x)), net.stages[0](net.stem(x)))
        assert load_backbone(other, state) == []
        assert torch.equal(other(x), net(x))
        lost = {name: tensor for name, tensor in state.items() if not name.endswith("permutation")}
        with pytest.raises(ValueError, match=r"local_perceptron\.permutation is missing"):
            convert(lost)
    torch.manual_seed(1)
    net = RepMLPNet(16, 2, kernels=[1, "3s"], **arguments).eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(load(tmp_path / "net.pth")(x), net(x))


def test_maps_need_not_be_square():
    net = {**SMALL, "sizes": ((4, 12), (2, 6))}
    state = file_of(net)
    model = RepMLPNet((8, 24), 2, net["channels"], net["blocks"], net["sets"], num_classes=5).double()
    model.load_state_dict(convert(state))
    assert difference(model, state, net) < 1e-12
    with pytest.raises(ValueError, match="12 positions, not a square number"):
        config_of(state)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_the_published_names_and_shapes(name, merged):
    with torch.device("meta"):
        expected = timm.create_model(name, inference_mode=merged).state_dict()
    for names in (OFFICIAL, MMPRETRAIN)[: 1 if name == "repmlpnet_d256" else 2]:
        shapes = shapes_of(variant(name), names, merged)
        state = convert({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
        assert {key: t.shape for key, t in state.items()} == {key: t.shape for key, t in expected.items()}
        assert config_of(state).config["img_size"] == VARIANTS[name][0]
    assert {key: tuple(t.shape) for key, t in to_official(expected).items()} == shapes_of(
        variant(name), OFFICIAL, merged
    )


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_round_trips_are_exact(name, merged):
    net = NETS[name]
    state = file_of(net, merged=merged)
    ours = convert(state)
    assert same(to_official(ours), state)
    assert same(convert(to_official(ours)), ours)
    assert same(convert(ours), ours)


def test_our_net_merged_runs_in_the_authors_layout():
    net = SMALL
    model = RepMLPNet(16, 2, net["channels"], net["blocks"], net["sets"], num_classes=5)
    model = randomise_norms(model).double().eval()
    x = image(net)
    with torch.no_grad():
        expected = model(x)
        trained = logits(to_official(model.state_dict()), x, net)
        model.reparameterize()
        state = to_official(model.state_dict())
        merged = logits(state, x, net)
    assert state.keys() == shapes_of(net, OFFICIAL, merged=True).keys()
    assert float((trained - expected).norm() / expected.norm()) < 1e-12
    assert float((merged - expected).norm() / expected.norm()) < 1e-12


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"kernels": []},
        {"kernels": [1, 3, 7]},
        {"kernels": [1, "1x3", "3d2", "1x3d3s", "3s"]},
        {"kernels": ["3s"]},
        {"global_perceptron": False},
        {"in_chans": 4, "num_classes": 0},
        {"embed_kernel": 3},
        {"embed_kernel": 5, "channels": [8, 16, 32], "blocks": [1, 2, 1], "share_sets": [2, 4, 8]},
        {"img_size": 24, "stem_stride": 3, "channels": [8, 16, 32, 64], "blocks": [1, 2, 3, 1]}
        | {"share_sets": [1, 2, 4, 64]},
        {"img_size": 4, "stem_stride": 4, "channels": [8], "blocks": [12], "share_sets": [2], "num_classes": 1},
    ],
)
def test_configuration_comes_back(change, merged):
    config = {"arch": "repmlpnet", "img_size": 16, "stem_stride": 2, "channels": [8, 16], "blocks": [2, 1]}
    config |= {"share_sets": [2, 8], "kernels": [1, 3], "global_perceptron": True, "in_chans": 3, **change}
    num_classes = config.pop("num_classes", 7)
    state = build_model(config, num_classes, inference_mode=merged).state_dict()
    found = config_of(state)
    assert found == ({**config, "kernels": [] if merged else config["kernels"]}, num_classes, merged)
    plain = merged or all(isinstance(kernel, int) for kernel in config["kernels"])
    if config["global_perceptron"] and "embed_kernel" not in config and plain:
        assert config_of(to_official(state)) == found
    else:
        reason = "2x2 ones only" if "embed_kernel" in config else "without Global Perceptrons"
        reason = reason if plain else "the branch (1x3|3x3s) cannot be written: .* write the merged net"
        with pytest.raises(ValueError, match=reason):
            to_official(state)


@pytest.mark.parametrize("form", FORMATS)
def test_wrapped_and_nested(form):
    state = file_of(SMALL, FORMATS[form])
    other = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    expected = convert(state)
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        assert same(convert({prefix + key: tensor for key, tensor in state.items()}), expected)
    for nest in ("state_dict", "model", "state_dict_ema", "model_ema"):
        wrapped = {f"module.{key}": tensor for key, tensor in state.items()}
        assert same(convert({"epoch": 3, "optimizer": {"state": {}}, nest: wrapped, "x": torch.ones(1)}), expected)
    for averaged, raw in (("state_dict_ema", "state_dict"), ("model_ema", "model")):
        assert same(convert({averaged: other, raw: state}), expected)
        assert same(convert({averaged: state, raw: None}), expected)
    assert same(convert({"model": {"state_dict": state}}), expected)
    assert same(convert({**state, "epoch": 3}), expected)


def test_old_files_without_batch_counts():
    state = file_of(SMALL)
    old = {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")}
    assert len(old) < len(state)
    ours = convert(old)
    assert ours.keys() == convert(state).keys()
    counts = [tensor for key, tensor in ours.items() if key.endswith("num_batches_tracked")]
    assert all(t.dtype == torch.long and t.shape == () and int(t) == 0 for t in counts)
    assert same(ours, convert({k: v * 0 if k.endswith("num_batches_tracked") else v for k, v in state.items()}))


BLOCK = "stages.0.0.repmlp_block"


def without(*keys):
    return lambda state: {key: tensor for key, tensor in state.items() if key not in keys}


def with_shape(key, *shape):
    return lambda state: {**state, key: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("form", "merged", "change", "words"),
    [
        (
            "official",
            False,
            without("head_norm.bias"),
            r"official, mmpretrain, .*nearest, official: head_norm.bias is mi",
        ),
        (
            "mmpretrain",
            False,
            without("backbone.final_norm.bias"),
            r"nearest, mmpretrain: backbone.final_norm.bias is m",
        ),
        ("alone", False, without("patch_embed.norm.bias"), r"nearest, mmpretrain's backbone alone: patch_embed.norm.b"),
        ("official", False, without("conv_embedding.conv.weight"), r"conv_embedding.conv.weight is missing$"),
        ("official", False, without("stages.1.0.prebn1.weight"), r"stages.1.0.prebn1.weight is missing$"),
        ("official", False, without(f"{BLOCK}.repconv3.bn.bias"), rf"{BLOCK}.repconv3.bn.bias is missing$"),
        ("official", False, without("head.bias"), r"head.bias is missing$"),
        ("official", False, without("head.weight"), r"head.weight is missing$"),
        ("official", False, with_shape("head.weight"), r"head.weight is unexpected$"),
        ("official", False, with_shape("head.extra", 5), r"official: head.extra is unexpected$"),
        (
            "official",
            False,
            with_shape("stages.0.7.prebn1.bias", 8),
            r"stages.0.2.\S+ is missing and stages.0.7.prebn1.b",
        ),
        ("official", False, with_shape(f"{BLOCK}.repconv5.conv.weight", 2, 1, 5, 5), r"repconv5.bn.weight is missing$"),
        (
            "official",
            False,
            with_shape(f"{BLOCK}.repconv2.conv.weight", 2, 1, 2, 2),
            r"branch 2x2: its sides have to be odd",
        ),
        ("official", False, with_shape(f"{BLOCK}.fc3.bias", 128), r"0.1.repmlp_block.fc3.bias is missing and .*fc3_bn"),
        (
            "official",
            True,
            with_shape(f"{BLOCK}.repconv3.conv.weight", 2, 1, 3, 3),
            r": \S+repconv3.conv.weight is unex",
        ),
        (
            "official",
            False,
            with_shape(f"{BLOCK}.fc3.weight", 100, 64, 1, 1),
            r"fc3.weight has 100 rows and 64 columns",
        ),
        (
            "official",
            False,
            with_shape(f"{BLOCK}.fc3.weight", 192, 64, 1, 1),
            r"share_sets=3 does not divide channels=8",
        ),
        ("official", False, with_shape(f"{BLOCK}.fc3.weight", 128, 64), r"fc3.weight is \(128, 64\), expected 4 dim"),
        (
            "official",
            False,
            with_shape(f"{BLOCK}.fc3.weight", 0, 0, 1, 1),
            r"fc3.weight is \(0, 0, 1, 1\), expected 4 dim",
        ),
        (
            "official",
            False,
            with_shape("stages.0.1.repmlp_block.fc3.weight", 64, 64, 1, 1),
            r"is \(64, 64, 1, 1\), .* \(128",
        ),
        (
            "official",
            False,
            with_shape("stages.1.0.ffn_block.ffn_fc1.conv.weight", 32, 16, 1, 1),
            r"need \(64, 16, 1, 1\)",
        ),
        (
            "official",
            False,
            with_shape("conv_embedding.conv.weight", 8, 3, 2, 4),
            r"\(8, 3, 2, 4\), .*need \(8, 3, 2, 2\)",
        ),
        (
            "official",
            True,
            with_shape(f"{BLOCK}.fc3.bias", 64),
            r"fc3.bias is \(64,\), the other weights need \(128,\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(form, merged, change, words):
    state = file_of(SMALL, FORMATS[form], merged)
    convert(state)
    with pytest.raises(ValueError, match=words) as caught:
        convert(change(state))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (
            build_resmlp(depth=1, width=8).state_dict(),
            r"repmlp: stem.conv.weight is missing and stem.proj.weight is unex",
        ),
        (nn.Linear(2, 2).state_dict(), r"conv_embedding.conv.weight is missing and weight is unexpected"),
        ({"epoch": 3, "model": {}}, r"found no weights in the keys \['epoch', 'model'\]: expected a state_dict"),
        ({}, r"found no weights in the keys \[\]"),
        ([torch.zeros(1)], r"found no weights in a list"),
    ],
)
def test_other_networks_are_refused(weights, words):
    with pytest.raises(ValueError, match=words):
        convert(weights)


def test_mmpretrains_d256_is_another_network():
    """Its inner features are rounded to a multiple of 8: 20 to 24 in the first stage."""
    net = variant("repmlpnet_d256")
    rounded = shapes_of(net, MMPRETRAIN, gp_inner=lambda c: max(8, (c // 4 + 4) // 8 * 8))
    assert rounded["backbone.stages.0.0.repmlp_block.gp.conv1.conv.weight"] == (24, 80, 1, 1)
    with pytest.raises(ValueError, match=r"gp.conv1.conv.weight has 24 inner features, RepMLPNet has C/4 = 20"):
        convert({key: torch.empty(shape, device="meta") for key, shape in rounded.items()})


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("form", FORMATS)
def test_load(tmp_path, form, suffix):
    path = tmp_path / f"model{suffix}"
    state = file_of(SMALL, FORMATS[form], dtype=torch.float32)
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state, "epoch": 300}, path)
    assert same(convert(read(path)), convert(state))
    model = load(str(path))
    assert type(model) is RepMLPNet and not model.training
    wide = {key: tensor.double() for key, tensor in state.items()}
    assert difference(model, state, SMALL, FORMATS[form]) < 2e-6
    assert difference(model.double(), wide, SMALL, FORMATS[form]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_load_gives_float32(tmp_path, dtype):
    path = tmp_path / "model.pth"
    state = {k: t if k.endswith("tracked") else t.to(dtype) for k, t in file_of(SMALL, merged=True).items()}
    torch.save(state, path)
    expected = {k: t if k.endswith("tracked") else t.float() for k, t in state.items()}
    assert same(dict(load(path).state_dict()), convert(expected))


def test_unreadable_files_are_named(tmp_path):
    state = file_of(SMALL)
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"model{suffix}"
        with pytest.raises(FileNotFoundError, match=f"no checkpoint at .*model{suffix}$"):
            load(path)
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
        whole = path.read_bytes()
        for length in (0, 1, 100, len(whole) // 2, len(whole) - 7):
            path.write_bytes(whole[:length])
            with pytest.raises(
                ValueError, match=rf"model{suffix} is no whole \w+ file \(.+\): fetch or write it again$"
            ):
                load(path)
    path = tmp_path / "model.pth"
    path.write_text("<html>404</html>")
    with pytest.raises(ValueError, match="is no whole PyTorch file"):
        read(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"model.pth holds a list, expected a state_dict"):
        load(path)
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(ValueError, match=r"model.pth: these weights have none of the formats"):
        load(path)


@pytest.mark.filterwarnings("ignore")  # torch is giving TorchScript up
def test_a_torchscript_program_is_named(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model.pt is a TorchScript program, not weights: save model.state_dict\(\)"):
        load(tmp_path / "model.pt")


@pytest.fixture(scope="module")
def t224(tmp_path_factory):
    """Write T224, built for images of 32 x 32, as the authors' training script does."""
    torch.manual_seed(1)
    net = variant("repmlpnet_t224", 32)
    state = file_of(net, dtype=torch.float32)
    path = tmp_path_factory.mktemp("timm") / "best_ckpt.pth"
    torch.save({"model": state, "epoch": 99, "max_accuracy": 76.62}, path)
    return path, net, {key: tensor.double() for key, tensor in state.items()}


def pretrained(path, **kwargs) -> nn.Module:
    overlay = {"file": str(path)}
    return timm.create_model("repmlpnet_t224", pretrained=True, pretrained_cfg_overlay=overlay, img_size=32, **kwargs)


def test_timm_loads_an_official_file(t224):
    path, net, state = t224
    assert difference(pretrained(path).double(), state, net) < 1e-12
    assert load(path).num_classes == 1000


def test_timm_drops_the_classifier_of_other_classes(t224):
    path, net, state = t224
    model = pretrained(path, num_classes=10).double().eval()
    features = {key: tensor for key, tensor in state.items() if not key.startswith("head.")}
    x = image(net)
    with torch.no_grad():
        expected = logits(features, x, net)
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        assert model(x).shape == (2, 10)
    assert float((pooled - expected).norm() / expected.norm()) < 1e-12
    assert difference(pretrained(path, num_classes=0).double(), features, net) < 1e-12


def test_merged_weights_for_a_train_time_model_are_said():
    from repmlp.models.repmlpnet import checkpoint_filter_fn

    merged = RepMLPNet(channels=(8,), blocks=(1,), share_sets=(2,), inference_mode=True)
    model = RepMLPNet(channels=(8,), blocks=(1,), share_sets=(2,))
    with pytest.raises(ValueError, match="merged and the model is not: create it with inference_mode=True"):
        checkpoint_filter_fn(to_official(merged.state_dict()), model)
    assert checkpoint_filter_fn(to_official(model.state_dict()), model).keys() == model.state_dict().keys()


def test_timms_checkpoint_path_and_data_config(t224):
    path, net, state = t224
    model = timm.create_model("repmlpnet_t224", checkpoint_path=str(path), img_size=32)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 32, 32)
    assert difference(model.double(), state, net) < 1e-12
    with pytest.raises(ValueError, match=r"another image size than \(64, 64\); build that one and repmlp\.resize it"):
        timm.create_model("repmlpnet_t224", checkpoint_path=str(path), img_size=64)
