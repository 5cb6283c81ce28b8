"""ResMLP as timm's MlpMixer: equal to the class of our own that it replaced, by numbers which that class computed."""

import json
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import randomise_norms
from safetensors.torch import save_file
from timm.models.mlp_mixer import MlpMixer
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from repmlp import InjectedLinear, build_model, load_model, merge_locality, save_model
from repmlp.cost import count_macs
from repmlp.export import image_size
from repmlp.locality import network_profiles
from repmlp.models import mixers
from repmlp.models.build import merged_copy
from repmlp.resmlp_key_names import convert_resmlp

CONFIG = {"arch": "resmlp", "img_size": 8, "patch_size": 2, "depth": 2, "width": 8, "init_std": 0.1, "layer_scale": 0.7}
# Of the former class, seed 3: the losses before, after one and after two steps of AdamW, with a weight decay so large
# that a parameter which has it and should not (an affine layer's) would show.
LOSSES = [
    ([], [1.5645656791777725, 1.5923078737673926, 1.5796712839770672]),
    ([1], [1.633337001905989, 1.589424168692914, 1.5998228355329156]),
    ([1, 3], [1.6413120525101854, 1.610603852944368, 1.6237413902828763]),
    ([1, "3s"], [1.6188007453258286, 1.6303127614617405, 1.632677716734855]),
    (["1x3", 3, "3d2s"], [1.5938899275416325, 1.6114805787579318, 1.5202729181873418]),
]
# Of the former class with weights drawn by `older_state`: the logits of two images.
LOGITS = {
    False: [
        [0.2936282312288713, -0.5369292944407629, -0.2533155814197448, 0.39923214179435046, -0.4691540948936105],
        [0.39436767982386267, -0.6461029020844793, -0.17517567543937063, 0.40617403458247586, -0.4943637756492862],
    ],
    True: [
        [-0.17467957993645647, 0.20839260652231398, 0.1707483146348862, -0.405477784422898, 0.011039835888040295],
        [-0.08101568660718209, 0.2596452190344874, 0.19774427099469094, -0.6422037786137984, 0.17134537127508206],
    ],
}
VARIANTS = sorted(timm.list_models(module="mixers"))


def noise(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def older_shapes(merged: bool) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of an older file of CONFIG with five classes, in its order; branches 1 and "3s"."""
    norm = {"weight": (1,), "bias": (1,), "running_mean": (1,), "running_var": (1,), "num_batches_tracked": ()}
    branches = {
        "permutation": (16,),
        "convs.1.weight": (1, 1, 1, 1),
        "convs.3s.weight": (1, 1, 3, 3),
        **{f"norms.{k}.{name}": shape for k in ("1", "3s") for name, shape in norm.items()},
    }
    block = {
        **{"scale1": (8,), "scale2": (8,), "norm1.alpha": (8,), "norm1.beta": (8,)},
        **{"spatial.weight": (1, 16, 16), "spatial.bias": (1, 16)},
        **({} if merged else {f"spatial.local_perceptron.{name}": shape for name, shape in branches.items()}),
        **{"norm2.alpha": (8,), "norm2.beta": (8,)},
        **{"fc1.weight": (32, 8), "fc1.bias": (32,), "fc2.weight": (8, 32), "fc2.bias": (8,)},
    }
    return {
        **{"patch_embed.weight": (8, 3, 2, 2), "patch_embed.bias": (8,)},
        **{f"blocks.{i}.{name}": shape for i in range(2) for name, shape in block.items()},
        **{"norm.alpha": (8,), "norm.beta": (8,), "head.weight": (5, 8), "head.bias": (5,)},
    }


def older_state(merged: bool) -> dict[str, Tensor]:
    """Draw an older file's weights, each from a generator of its own."""
    state = {}
    for i, (name, shape) in enumerate(older_shapes(merged).items()):
        if name.endswith("permutation"):
            state[name] = torch.from_numpy(np.random.default_rng(i).permutation(*shape))
        elif name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
        elif name.endswith("running_var"):
            state[name] = 0.5 + noise(i, *shape) ** 2
        else:
            state[name] = 0.3 * noise(i, *shape)
    return state


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("kernels", "losses"), LOSSES, ids=lambda value: str(value)[:20])
def test_a_seed_gives_the_training_that_it_gave(kernels, losses):
    torch.manual_seed(3)
    net = build_model({**CONFIG, "kernels": kernels}, 5).double().train()
    optimizer = torch.optim.AdamW(param_groups_weight_decay(net, 5.0), lr=0.01)
    for step, expected in enumerate(losses):
        loss = F.cross_entropy(net(noise(step, 6, 3, 8, 8)), torch.arange(6) % 5)
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-6), step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_what_comes_after_the_net_is_drawn_as_it_was():
    """The order of the images, for instance: timm's own draws must not advance the random numbers."""
    torch.manual_seed(3)
    build_model({**CONFIG, "kernels": [1, 3]}, 5)
    assert float(torch.rand(())) == pytest.approx(0.159440279006958, abs=1e-9)


@pytest.mark.parametrize("merged", [False, True])
def test_an_older_file_loads_and_computes_what_it_did(tmp_path, merged):
    config = {**CONFIG, "kernels": [1, "3s"]}
    path = tmp_path / "older.safetensors"
    save_file(older_state(merged), path, {"repmlp_model": json.dumps(config), "num_classes": "5"})
    net, metadata = load_model(path)
    assert json.loads(metadata["repmlp_model"]) == config
    net.double().load_state_dict(convert_resmlp(older_state(merged)))  # load_model's parameters are float32
    with torch.no_grad():
        logits, expected = net(noise(99, 2, 3, 8, 8)), torch.tensor(LOGITS[merged], dtype=torch.float64)
        assert relative(logits, expected) < 1e-8
        assert relative(merged_copy(net)(noise(99, 2, 3, 8, 8)), expected) < 1e-8
    save_model(tmp_path / "now.safetensors", net, config)
    again = load_model(tmp_path / "now.safetensors")[0].double()
    assert list(again.state_dict()) == list(net.state_dict())


def test_todays_names_go_through():
    state = build_model(CONFIG, 5).state_dict()
    assert all(value is state[name] for name, value in convert_resmlp(state).items())


@pytest.mark.parametrize("kernels", [[], [1, 3]])
def test_layers_know_their_grid_with_branches_or_without(kernels):
    for config in (CONFIG, {"arch": "timm", "variant": "gmlp_12_patch4_32"}):
        net = build_model({**config, "kernels": kernels}, 5).eval()
        layers = [module for module in net.modules() if isinstance(module, InjectedLinear)]
        profiles = network_profiles(net)
        assert len(layers) == len(profiles) == len(net.blocks)
        assert {layer.size for layer in layers} == {tuple(profile["size"]) for profile in profiles}
        assert [layer.kernels for layer in layers] == [tuple(kernels)] * len(layers)
        merged = merge_locality(net)
        assert not any(isinstance(module, InjectedLinear) for module in merged.modules())
        assert image_size(net) == image_size(merged) == net.stem.img_size


def test_an_image_of_another_size_is_refused_before_anything_is_trained():
    net = build_model(CONFIG)
    with pytest.raises(ValueError, match=r"MlpMixer takes no images of 16x8 pixels: Input height \(16\) doesn't match"):
        count_macs(net, (16, 8))
    with pytest.raises(ValueError, match="img_size=9 is no multiple of patch_size=2"):
        build_model({**CONFIG, "img_size": 9})


def test_there_are_variants():
    assert sorted(mixers.default_cfgs) == VARIANTS


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_what_its_configuration_says(name):
    config = timm.get_pretrained_cfg(name)
    with torch.device("meta"):
        net = timm.create_model(name)
        other = timm.create_model(name, num_classes=7, img_size=64, in_chans=1)
    assert isinstance(net, MlpMixer)
    assert (3, *net.stem.img_size) == config.input_size and net.num_classes == config.num_classes
    assert net.get_submodule(config.first_conv).weight.shape[1] == 3
    assert net.get_submodule(config.classifier).out_features == config.num_classes
    assert (other.stem.img_size, other.head.out_features, other.stem.proj.in_channels) == ((64, 64), 7, 1)


def test_the_reduced_resmlp_takes_branches_as_any_network_of_timms():
    for kernels in ((), (1, 3)):
        config = {"arch": "timm", "variant": "resmlp_12_patch2_32", "kernels": kernels, "depth": 1}
        assert build_model(config, 10).blocks[0].linear_tokens.kernels == kernels
    assert count_macs(timm.create_model("resmlp_12_patch2_32"), (32, 32)) == 1_812_751_360


def test_weights_by_the_names_of_resmlps_authors_load(tmp_path):
    """timm's reader is told of them, so that a file of theirs can stand for a variant's own weights."""

    def theirs(name: str) -> str:
        for ours, published in (("stem.", "patch_embed."), ("linear_tokens.", "attn."), ("mlp_channels.", "mlp.")):
            name = name.replace(ours, published)
        return name.replace(".ls", ".gamma_")

    net: Any = timm.create_model("resmlp_12_patch4_32", num_blocks=1)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    save_file({theirs(name): tensor for name, tensor in net.state_dict().items()}, tmp_path / "theirs.safetensors")
    loaded = timm.create_model(
        "resmlp_12_patch4_32",
        pretrained=True,
        num_blocks=1,
        pretrained_cfg_overlay={"file": str(tmp_path / "theirs.safetensors")},
    )
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in net.state_dict().items())


def test_merged_weights_are_those_of_a_net_without_branches():
    net = randomise_norms(build_model({**CONFIG, "kernels": [1, 3]}, 5)).double().eval()
    plain = build_model({**CONFIG, "kernels": []}, 5).double().eval()
    plain.load_state_dict(merge_locality(net).state_dict())
    x = noise(1, 2, 3, 8, 8)
    with torch.no_grad():
        assert relative(plain(x), net(x)) < 1e-12
