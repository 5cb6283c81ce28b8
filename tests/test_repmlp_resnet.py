"""ResNets with RepMLP blocks: counts as measured and printed, timm's surface, insertion, sizes, released files.

The networks have 41 to 88 million parameters. What computes is narrow, what only counts is built on the meta device.
"""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import randomise_norms
from safetensors.torch import save_file
from timm.models import group_parameters
from timm.models.resnet import Bottleneck, ResNet
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import repmlp.export
from repmlp import RepMLP, RepMLPResNet, fold_batch_norms, insert, load_older, resize_partitions
from repmlp.cost import count_macs, count_params
from repmlp.models.repmlp_bottleneck import RepMLPBottleneck, RepMLPLight
from repmlp.models.repmlp_partitions import map_sizes
from repmlp.older_key_names import convert_older, to_older

NAMES = timm.list_models("repmlp_res50*", module="repmlp_resnet")
# parameters and MACs in G while training; the same with every batch norm folded
COUNTS = {
    "repmlp_res50_224": (41_071_144, 3.950, 40_871_528, 3.891),
    "repmlp_res50_g8_8_320": (72_450_600, 8.401, 72_023_144, 8.108),
    "repmlp_res50_g8_16_320": (59_543_080, 8.307, 59_223_144, 8.057),
    "repmlp_res50_g4_8_320": (87_939_624, 8.853, 87_383_144, 8.354),
    "repmlp_res50_light_224": (58_351_912, 3.032, 57_868_264, 2.920),
    "repmlp_res50_light_g4_224": (87_038_248, 3.302, 86_142_440, 3.077),
}
# a ResNet of 26 layers with narrow bottlenecks, for images of 56 pixels and partitions of 7 or 2 cells
NARROW = {"layers": (2, 2, 2, 2), "channels": (16, 16, 16, 32), "num_classes": 5}
SMALL = {**NARROW, "img_size": 56, "partition": 3, "kernels": (1, 3), "groups": 2}


def on_meta(name: str, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs).eval()


def small(**kwargs) -> RepMLPResNet:
    return randomise_norms(RepMLPResNet(**{**SMALL, **kwargs})).eval()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def counts(model: nn.Module, img_size: int) -> tuple[int, float]:
    return count_params(model), round(count_macs(model, img_size) / 1e9, 3)


def test_six_variants_are_registered():
    assert set(NAMES) == set(COUNTS)


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_the_published_networks(name):
    model, side = on_meta(name), int(name[-3:])
    assert model.img_size == (side, side)
    folded = fold_batch_norms(model)
    assert (*counts(model, side), *counts(folded, side)) == COUNTS[name]
    assert not any(isinstance(m, _BatchNorm) for m in folded.modules())
    # what reparameterize() alone leaves: the batch norms of the convolutions, two numbers a channel for one bias
    merged = on_meta(name, inference_mode=True)
    kept = sum(m.num_features for m in merged.modules() if isinstance(m, _BatchNorm))
    assert counts(merged, side) == (count_params(folded) + kept, COUNTS[name][3])


def test_counts_of_resnet50():
    with torch.device("meta"):
        model = timm.create_model("resnet50").eval()
    assert (*counts(model, 224), *counts(fold_batch_norms(model), 224)) == (25_557_032, 4.089, 25_530_472, 4.089)


@pytest.mark.parametrize(
    ("stages", "reductions", "groups", "params"),
    [
        ("c4", 4, 8, 30_876_392),
        ("c4", 8, 8, 25_028_392),
        ("c4", 4, 4, 37_022_952),
        ("c4", 2, 8, 52_775_272),
        ("c4", 2, 4, 77_361_512),
        (("c2", "c3", "c4"), None, 8, 58_274_792),
        (("c2", "c3", "c4", "c5"), None, 8, 65_762_792),
    ],
)
def test_counts_of_other_stages_and_widths(stages, reductions, groups, params):
    model = on_meta("repmlp_res50_224", stages=stages, reductions=reductions, groups=groups)
    assert count_params(fold_batch_norms(model)) == params
    if (stages, reductions, groups) == ("c4", 4, 8):
        assert round(count_macs(fold_batch_norms(model), 224) / 1e9, 3) == 3.825


@pytest.mark.parametrize("block", ["bottleneck", "light"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
@torch.no_grad()
def test_merged_and_folded_compute_the_same(block, dtype, bound):
    model = small(block=block, stages=("c2", "c3", "c4")).to(dtype)
    x = torch.randn(2, 3, 56, 56, dtype=dtype)
    expected = model(x)
    merged = timm.utils.reparameterize_model(nn.Sequential(model))[0]
    folded = repmlp.deploy(model)
    assert relative(merged(x), expected) < bound and relative(folded(x), expected) < bound
    assert any("local_perceptron" in name for name in model.state_dict())  # a copy
    assert not any("local_perceptron" in name or ".norm." in name for name in merged.state_dict())
    assert not any(isinstance(m, _BatchNorm) for m in folded.modules())
    fresh = RepMLPResNet(**SMALL, block=block, stages=("c2", "c3", "c4"), inference_mode=True).to(dtype).eval()
    fresh.load_state_dict(merged.state_dict())
    assert torch.equal(fresh(x), merged(x))
    assert torch.equal(fold_batch_norms(merged)(x), folded(x)) and torch.equal(fold_batch_norms(folded)(x), folded(x))


@torch.no_grad()
def test_folding_other_networks():
    """A deep stem, blocks of two convolutions; a network whose batch norm follows no convolution is refused."""
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for name in ("resnet18d", "resnet26t"):
        model = randomise_norms(timm.create_model(name, num_classes=7)).double().eval()
        assert relative(fold_batch_norms(model)(x), model(x)) < 1e-12
    with pytest.raises(ValueError, match=r"the batch norm stem\.norm stands behind no convolution"):
        fold_batch_norms(
            repmlp.build_model({"arch": "repmlpnet", "channels": [8], "blocks": [1], "share_sets": [1]}).eval()
        )
    with pytest.raises(RuntimeError, match="training mode"):
        fold_batch_norms(model.train())
    with pytest.raises(TypeError, match="got ResNet"):
        repmlp.deploy(model.eval())


def test_training_mode_is_refused():
    with pytest.raises(RuntimeError, match="training mode"):
        RepMLPResNet(**SMALL).train().reparameterize()


def test_every_parameter_gets_a_gradient():
    for block in ("bottleneck", "light"):
        model = randomise_norms(RepMLPResNet(**SMALL, block=block)).train()
        model(torch.randn(4, 3, 56, 56)).square().mean().backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.no_grad()
def test_blocks_start_as_identities():
    block = RepMLPResNet(**SMALL).layer2[1].eval()
    x = torch.randn(1, 64, 7, 7)
    assert torch.equal(block(x), x.relu())
    assert bool(RepMLPResNet(**SMALL, zero_init_last=False).layer2[1].bn4.weight.all())


def test_timm_surface():
    for name in NAMES:
        model, side = on_meta(name), int(name[-3:])
        cfg = model.pretrained_cfg
        assert cfg["input_size"] == (3, side, side) and cfg["num_classes"] == model.num_classes == 1000
        features = model.forward_features(torch.empty(1, 3, side, side, device="meta"))
        assert tuple(features.shape[-2:]) == cfg["pool_size"]
        assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert group_parameters(model, model.group_matcher(), reverse=True).keys() == dict(model.named_parameters()).keys()
    model = on_meta("repmlp_res50_224", num_classes=10, in_chans=1, drop_path_rate=0.1, img_size=(448, 224))
    assert tuple(model(torch.empty(2, 1, 448, 224, device="meta")).shape) == (2, 10)
    assert model.layer3[-1].drop_path.drop_prob == pytest.approx(0.1 * 12 / 15)
    backbone = on_meta("repmlp_res50_224", features_only=True)
    assert (backbone.feature_info.channels(), backbone.feature_info.reduction()) == (
        [64, 256, 512, 1024, 2048],
        [2, 4, 8, 16, 32],
    )
    maps = backbone(torch.empty(1, 3, 224, 224, device="meta"))
    assert [m.shape[-1] for m in maps] == [112, 56, 28, 14, 7]
    assert all(t.is_meta for t in (*backbone.parameters(), *backbone.buffers()))


def test_output_stride_8():
    """Stage maps at an eighth of the image, as in the paper's PSPNet: partitions are counted there."""
    model = on_meta("repmlp_res50_g4_8_320", output_stride=8, img_size=713)
    assert map_sizes(model, 713) == {"c2": (179, 179), "c3": (90, 90), "c4": (90, 90), "c5": (90, 90)}
    assert [model.layer2[1].repmlp.partitions, model.layer3[1].repmlp.partitions] == [(9, 9), (9, 9)]
    assert tuple(model.forward_features(torch.empty(1, 3, 713, 713, device="meta")).shape) == (1, 2048, 90, 90)


@torch.no_grad()
def test_insertion_keeps_all_other_weights():
    stock = randomise_norms(ResNet(Bottleneck, **NARROW)).eval()
    stock.layer3[1].drop_path = timm.layers.DropPath(0.2)
    before = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    model = insert(stock, 56, "c4", partition=2, kernels=(1,), groups=4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stock.state_dict().items())
    kept = {name for name in before if not name.startswith("layer3.1.")}
    assert kept == {name for name in model.state_dict() if not name.startswith("layer3.1.")}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in kept)
    block = model.layer3[1]
    assert isinstance(block, RepMLPBottleneck) and isinstance(block.drop_path, timm.layers.DropPath)
    assert block.repmlp.partitions == (2, 2) and not block.training
    # the new block adds nothing yet, so that the network is the old one without its block
    x = torch.randn(2, 3, 56, 56)
    del stock.layer3[1]
    torch.testing.assert_close(model(x), stock(x))

    double = insert(
        ResNet(Bottleneck, **NARROW).double(), 56, blocks=[1], partition=2, kernels=(1,), groups=2, block="light"
    )
    assert isinstance(double.layer2[1], RepMLPLight) and double.layer2[1].repmlp.partition_perceptron.weight.is_cpu
    assert {t.dtype for t in double.parameters()} == {torch.float64}
    same = ResNet(Bottleneck, **NARROW)
    assert insert(same, 56, partition=2, kernels=(1,), groups=1, inplace=True) is same


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": "c6"}, r"stages=\['c6'\]: 'c6' does not exist, use some of c2, c3, c4, c5"),
        ({"stages": ["c3", "c3"]}, "c3 stands there twice"),
        ({"groups": 3}, "c3, block 1: groups=3 does not divide 8 input"),
        ({"groups": [2]}, r"groups=\[2\]: use one number, or one for each of the stages c3, c4"),
        ({"partition": 8}, "c3, block 1: a partition of 8x8 is larger than the 7x7 map"),
        ({"kernels": (5,)}, "c3, block 1: branch 5x5 covers 5x5 cells, a partition has 3x3"),
        ({"reductions": 3}, "c3, block 1: reduction=3 does not divide 16 channels"),
        ({"block": "heavy"}, "block='heavy': use 'bottleneck' or 'light'"),
        ({"blocks": [0]}, "c3, block 0: it has stride 2"),
        ({"blocks": [2]}, "block 2 of c3 does not exist: it has 2"),
    ],
)
def test_bad_input(arguments, message):
    stock = ResNet(Bottleneck, **NARROW)
    given = {"img_size": 56, "partition": 3, "groups": 2, "kernels": (3,), "inplace": True} | arguments
    with pytest.raises(ValueError, match=message) as error:
        insert(stock, **given)
    assert "\n" not in str(error.value)
    assert not any(isinstance(m, RepMLP) for m in stock.modules())  # nothing is changed before


def test_other_bad_input():
    with pytest.raises(ValueError, match="stride=2: a RepMLP block keeps the map's size"):
        RepMLPBottleneck(64, 16, 2, stride=2, map_size=(7, 7), size=(7, 7))
    with pytest.raises(ValueError, match="stride=2"):
        RepMLPLight(64, 8, stride=2, map_size=(7, 7), size=(7, 7))
    with pytest.raises(ValueError, match="it is a BasicBlock, and only timm's Bottlenecks are replaced"):
        insert(timm.create_model("resnet18"), 224)
    with pytest.raises(TypeError, match="takes a timm ResNet itself, no wrapper; got Sequential"):
        insert(nn.Sequential(), 224)
    with pytest.raises(ValueError, match="it has an attention layer"):
        insert(timm.create_model("seresnet50"), 224, "c5")


@torch.no_grad()
def test_resizing_says_what_is_fresh():
    model = small(partition=2, stages=("c3", "c4", "c5"), kernels=(1,)).eval()  # maps 7, 4, 2: 16, 4 and 1 partitions
    resized = resize_partitions(model, 112, {"c3": 2})
    gates = [f"{layer}.1.repmlp.global_perceptron" for layer in ("layer2", "layer3", "layer4")]
    assert (resized.fresh, resized.removed) == (gates, []) and resized.model.img_size == (112, 112)
    assert resized.model(torch.randn(1, 3, 112, 112)).shape == (1, 5)
    assert resized.model.layer2[1].repmlp.global_perceptron.fc1.weight.shape == (8 * 49 // 2, 8 * 49)
    state, before = resized.model.state_dict(), model.state_dict()
    same = [name for name in before if torch.equal(before[name], state.get(name, torch.empty(0)))]
    assert [name for name in before if name not in same] == [
        f"{gate}.{fc}.{tensor}" for gate in gates[:2] for fc in ("fc1", "fc2") for tensor in ("weight", "bias")
    ]
    assert resize_partitions(model, 56)[1:] == ([], []) and model.img_size == (56, 56)
    back = resize_partitions(resized.model, 56, {"c3": 1})
    assert (back.fresh, back.removed) == (gates[:2], gates[2:])
    with pytest.raises(ValueError, match="a partition of 2x2 is larger than the 1x1 map"):
        resize_partitions(model, 32)
    with pytest.raises(ValueError, match="'c9' does not exist"):
        resize_partitions(model, 56, {"c9": 2})
    with pytest.raises(ValueError, match="the block is merged"):
        resize_partitions(timm.utils.reparameterize_model(nn.Sequential(model))[0], 112)


# --- released files ---------------------------------------------------------------------------------------------------


def released_shapes(block: str, groups: int, converted: bool) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a released file for 224 pixels, written out from the published listing."""
    shapes: dict[str, tuple[int, ...]] = {}

    def conv(name: str, shape: tuple[int, ...]) -> None:
        shapes[f"{name}.conv.weight"] = shape
        if converted:
            shapes[f"{name}.conv.bias"] = shape[:1]
        else:
            norm(f"{name}.bn", shape[0])

    def norm(name: str, channels: int) -> None:
        shapes.update({f"{name}.{n}": (channels,) for n in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    conv("stage0.0", (64, 3, 7, 7))
    before = 64
    for stage, (depth, mid) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 1):
        out, side = 4 * mid, 56 // 2 ** (stage - 1)
        for i in range(depth):
            at = f"stage{stage}.{i}"
            if i == 0 or stage in (1, 4):
                if i == 0:
                    conv(f"{at}.shortcut", (out, before, 1, 1))
                conv(f"{at}.conv1", (mid, before, 1, 1))
                conv(f"{at}.conv2", (mid, mid, 3, 3))
                conv(f"{at}.conv3", (out, mid, 1, 1))
                before = out
                continue
            light = block == "light"
            inner = out // 8 if light else mid // (2 if stage == 2 else 4)
            kind = "light" if light else "btnk"
            conv(f"{at}.{kind}_conv1", (inner if light else mid, out, 1, 1))
            if not light:
                conv(f"{at}.btnk_conv2", (inner, mid, 3, 3))
            repmlp, numbers, partitions = f"{at}.{kind}_repmlp", inner * 49, (side // 7) ** 2
            for fc in ("fc1", "fc2"):
                shapes[f"{repmlp}.fc1_fc2.{fc}.weight"] = (inner * partitions,) * 2
                shapes[f"{repmlp}.fc1_fc2.{fc}.bias"] = (inner * partitions,)
            shapes[f"{repmlp}.fc3.weight"] = (numbers, numbers // groups, 1, 1)
            if converted:
                shapes[f"{repmlp}.fc3.bias"] = (numbers,)
            else:
                norm(f"{repmlp}.avg.bn", inner)
                norm(f"{repmlp}.fc3_bn", numbers)
                for k in (1, 3, 5):
                    conv(f"{repmlp}.repconv{k}", (inner, inner // groups, k, k))
            if light:
                conv(f"{at}.light_conv3", (out, inner, 1, 1))
            else:
                conv(f"{at}.btnk_conv4", (mid, inner, 3, 3))
                conv(f"{at}.btnk_conv5", (out, mid, 1, 1))
    shapes["linear.weight"], shapes["linear.bias"] = (1000, 2048), (1000,)
    return shapes


@pytest.mark.parametrize(
    ("block", "groups", "converted", "entries"),
    [("light", 4, False, 536), ("light", 4, True, 140), ("bottleneck", 8, False, 632), ("bottleneck", 8, True, 172)],
)
def test_released_names_and_shapes(block, groups, converted, entries):
    """Every name and shape of the four kinds of file, both ways; nothing is computed."""
    shapes = released_shapes(block, groups, converted)
    assert len(shapes) == entries
    theirs = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    ours = convert_older(theirs)
    name = "repmlp_res50_light_g4_224" if block == "light" else "repmlp_res50_224"
    model = fold_batch_norms(on_meta(name)) if converted else on_meta(name)
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in model.state_dict().items()}
    back = to_older(ours)
    assert {n: tuple(t.shape) for n, t in back.items()} == shapes
    assert convert_older(ours).keys() == ours.keys() and to_older(theirs).keys() == theirs.keys()


def released(block: str, groups: int, converted: bool) -> dict[str, torch.Tensor]:
    """Return a file with the released names and shapes but for 5 classes, and random numbers."""
    generator = torch.Generator().manual_seed(3)
    full = released_shapes(block, groups, converted)
    tensors = {}
    for name, shape in full.items():
        shape = tuple(shape)
        if name.startswith("linear"):
            shape = (5, *shape[1:])
        if name.endswith("running_var"):
            tensors[name] = torch.rand(shape, generator=generator).add(0.3)
        elif name.endswith("num_batches_tracked"):
            tensors[name] = torch.tensor(7)
        else:
            fan = max(1, int(torch.tensor(shape[1:]).prod()))
            scale = fan**-0.5 if len(shape) > 1 else 0.3
            tensors[name] = torch.randn(shape, generator=generator) * scale
            if name.endswith(("bn.weight",)):
                tensors[name] += 1
    return tensors


def reference(weights: dict[str, torch.Tensor], x: torch.Tensor, block: str, groups: int) -> torch.Tensor:
    """Compute the logits from the released names with torch's functions alone."""

    def has(name):
        return name in weights

    def norm(y, name):
        if not has(f"{name}.weight"):
            return y
        return F.batch_norm(y, *(weights[f"{name}.{n}"] for n in ("running_mean", "running_var", "weight", "bias")))

    def conv(y, name, stride=1, padding=0, groups=1):
        weight, bias = weights[f"{name}.conv.weight"], weights.get(f"{name}.conv.bias")
        return norm(F.conv2d(y, weight, bias, stride, padding, 1, groups), f"{name}.bn")

    def repmlp(y, name):
        n, c, height, width = y.shape
        rows, columns = height // 7, width // 7
        if rows * columns > 1:
            pooled = norm(F.avg_pool2d(y, 7), f"{name}.avg.bn").reshape(n, -1)
            hidden = F.linear(pooled, weights[f"{name}.fc1_fc2.fc1.weight"], weights[f"{name}.fc1_fc2.fc1.bias"])
            given = F.linear(hidden.relu(), weights[f"{name}.fc1_fc2.fc2.weight"], weights[f"{name}.fc1_fc2.fc2.bias"])
            y = y + F.interpolate(given.view(n, c, rows, columns), scale_factor=7, mode="nearest")
        out = torch.empty_like(y)
        for r in range(0, height, 7):
            for k in range(0, width, 7):
                tile = y[:, :, r : r + 7, k : k + 7]
                # FC3 as the 1x1 convolution that the file stores
                flat = F.conv2d(
                    tile.reshape(n, c * 49, 1, 1),
                    weights[f"{name}.fc3.weight"],
                    weights.get(f"{name}.fc3.bias"),
                    groups=groups,
                )
                z = norm(flat, f"{name}.fc3_bn").view(n, c, 7, 7)
                for size in (1, 3, 5):
                    if has(f"{name}.repconv{size}.conv.weight"):
                        z = z + conv(tile, f"{name}.repconv{size}", 1, size // 2, groups)
                out[:, :, r : r + 7, k : k + 7] = z
        return out

    x = F.max_pool2d(conv(x, "stage0.0", 2, 3).relu(), 3, 2, 1)
    for stage, depth in enumerate((3, 4, 6, 3), 1):
        for i in range(depth):
            at = f"stage{stage}.{i}"
            if has(f"{at}.conv1.conv.weight"):
                stride = 2 if i == 0 and stage > 1 else 1
                y = conv(conv(conv(x, f"{at}.conv1").relu(), f"{at}.conv2", stride, 1).relu(), f"{at}.conv3")
                x = conv(x, f"{at}.shortcut", stride) if i == 0 else x
            elif block == "light":
                y = conv(repmlp(conv(x, f"{at}.light_conv1").relu(), f"{at}.light_repmlp").relu(), f"{at}.light_conv3")
            else:
                y = conv(conv(x, f"{at}.btnk_conv1").relu(), f"{at}.btnk_conv2", 1, 1).relu()
                y = conv(repmlp(y, f"{at}.btnk_repmlp").relu(), f"{at}.btnk_conv4", 1, 1).relu()
                y = conv(y, f"{at}.btnk_conv5")
            x = (x + y).relu()
    return F.linear(x.mean(dim=(2, 3)), weights["linear.weight"], weights["linear.bias"])


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize(("block", "groups"), [("light", 4), ("bottleneck", 8)])
@torch.no_grad()
def test_released_files_give_the_logits_of_an_independent_computation(block, groups, converted, tmp_path):
    weights = released(block, groups, converted)
    path = tmp_path / "released.pth"
    torch.save({"state_dict": {f"module.{name}": t for name, t in weights.items()}, "epoch": 99}, path)
    model = load_older(path)
    x = torch.randn(1, 3, 224, 224)
    expected = reference(weights, x, block, groups)
    assert relative(model(x), expected) < 1e-5
    assert any(isinstance(m, _BatchNorm) for m in model.modules()) is not converted
    written = to_older(model.state_dict())
    assert written.keys() == weights.keys() and all(torch.equal(written[n], weights[n]) for n in weights)
    if not converted:  # converting is what folding does
        folded = fold_batch_norms(model)
        again = to_older(folded.state_dict())
        assert again.keys() == released_shapes(block, groups, True).keys()
        assert relative(reference(again, x, block, groups), expected) < 1e-5


def test_what_the_older_files_cannot_hold():
    model = small(kernels=("1x3",))
    with pytest.raises(
        ValueError, match=r"convs\.1x3\.weight has no name in the older code, whose branches are square"
    ):
        to_older(model.state_dict())
    model.reparameterize()
    with pytest.raises(ValueError, match="merged but not folded"):
        to_older(model.state_dict())


@pytest.mark.parametrize("block", ["bottleneck", "light"])
@torch.no_grad()
def test_narrow_networks_go_through_their_names_and_back(block, tmp_path):
    """Arguments are read off the weights: stages, r, g, partition, branches, lengths between FC1 and FC2, classes."""
    settings = {**SMALL, "block": block, "stages": ("c2", "c3"), "groups": (2, 4), "global_reductions": (2, 1)}
    settings |= {"partition": 7, "kernels": (1, 5), "in_chans": 1, "reductions": (4, 2)}
    model = randomise_norms(RepMLPResNet(**settings)).eval()
    x = torch.randn(2, 1, 56, 56)
    for form in (model, fold_batch_norms(model)):
        path = tmp_path / f"{block}.safetensors"
        save_file({name: t.contiguous() for name, t in to_older(form.state_dict()).items()}, path)
        assert torch.equal(load_older(path)(x), form(x))
        assert torch.equal(load_older(form.state_dict())(x), form(x))


@torch.no_grad()
def test_timm_reads_the_older_names(tmp_path):
    model = small()
    torch.save({"model": to_older(model.state_dict())}, tmp_path / "older.pth")
    file = {"file": str(tmp_path / "older.pth"), "num_classes": 5}
    arguments = {**SMALL, "pretrained": True, "pretrained_cfg_overlay": file}
    x = torch.randn(1, 3, 56, 56)
    assert torch.equal(timm.create_model("repmlp_res50_224", **arguments).eval()(x), model(x))
    assert timm.create_model("repmlp_res50_224", **{**arguments, "num_classes": 9})(x).shape == (1, 9)
    torch.save(fold_batch_norms(model).state_dict(), tmp_path / "older.pth")
    with pytest.raises(ValueError, match=r"these weights have no batch norms: read them with repmlp\.load,"):
        timm.create_model("repmlp_res50_224", **arguments)
    merged = copy.deepcopy(model)
    merged.reparameterize()
    torch.save(merged.state_dict(), tmp_path / "older.pth")
    with pytest.raises(ValueError, match="create it with inference_mode=True"):
        timm.create_model("repmlp_res50_224", **arguments)
    assert torch.equal(timm.create_model("repmlp_res50_224", **arguments, inference_mode=True).eval()(x), merged(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("stage0.0.bn.weight"), "bn1.weight is missing"),
        (
            lambda w: w.pop("stage2.1.btnk_repmlp.fc3.weight"),
            r"layer2\.1\.repmlp\.partition_perceptron\.weight is missing",
        ),
        (lambda w: w.update(odd=torch.zeros(2)), "odd is no name of an older RepMLP-ResNet's file"),
        (lambda w: w.update({"linear.bias": torch.zeros(3)}), r"fc.bias is \(3,\), the other weights need \(5,\)"),
        (
            lambda w: w.update({"stage2.1.btnk_repmlp.fc3.weight": torch.zeros(5, 3, 1, 1)}),
            r"fc3.weight is \(5, 3, 1, 1\)",
        ),
        (lambda w: [w.pop(n) for n in list(w) if "repmlp" in n], "no RepMLP block"),
        (lambda w: [w.pop(n) for n in list(w) if n.startswith("stage4")], "layer4.0.conv3.weight is missing"),
    ],
)
def test_files_that_fit_nothing_are_refused(change, message, tmp_path):
    weights = dict(to_older(small().state_dict()))
    change(weights)
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message) as error:
        load_older(tmp_path / "w.pth")
    assert str(tmp_path / "w.pth") in str(error.value) and "\n" not in str(error.value)


@torch.no_grad()
def test_configurations_and_files(tmp_path):
    """By a configuration of any timm model, branches included, and through a file of ours, as trained and merged."""
    arguments = {name: SMALL[name] for name in ("layers", "channels", "partition", "groups")}
    config = {"arch": "timm", "variant": "repmlp_res50_224", "img_size": 56, "kernels": [1, "1x3"]}
    config["arguments"] = arguments
    model = randomise_norms(repmlp.build_model(config, 5)).eval()
    assert model.layer2[1].repmlp.partition_perceptron.kernels == (1, "1x3")
    assert repmlp.export.image_size(model, config) == (56, 56)
    x = torch.randn(2, 3, 56, 56)
    for name in ("train", "merged"):
        repmlp.save_model(tmp_path / f"{name}.safetensors", model, config)
        again, _ = repmlp.load_model(tmp_path / f"{name}.safetensors")
        assert torch.equal(again(x), model(x))
        model.reparameterize()
    bare = repmlp.build_model({**config, "kernels": []}, 5)
    assert bare.layer2[1].repmlp.partition_perceptron.kernels == ()
    assert repmlp.export.image_size(RepMLPResNet(**{**SMALL, "img_size": (56, 64)})) == (56, 64)
