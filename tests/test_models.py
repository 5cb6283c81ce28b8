"""The networks: counts as printed in the paper, merging of whole nets, saving and loading, timm's own merging."""

import json

import pytest
import timm
import torch
from conftest import randomise_norms
from safetensors.torch import save_file
from torch import nn

from repmlp import RepMLPNet, build_model, load_model, save_model
from repmlp.cost import count_macs, count_params, count_params_paper
from repmlp.models.build import merged_copy
from repmlp.models.mixers import build_resmlp
from repmlp.models.repmlpnet import FFN

NETS = {"repmlpnet": RepMLPNet, "resmlp": build_resmlp}
SMALL = {
    "repmlpnet": {"arch": "repmlpnet", "channels": [16, 32], "blocks": [2, 1], "share_sets": [4, 16]},
    "resmlp": {"arch": "resmlp", "depth": 2, "width": 32},
}
# params by autograd's count, by the paper's rule for ResMLP, MACs
PRINTED = {
    ("repmlpnet", ()): (8_305_284, 468_329_472),
    ("repmlpnet", (1,)): (8_305_284 + 720, 468_329_472 + 294_912),
    ("repmlpnet", (3,)): (8_305_284 + 2_640, 468_329_472 + 2_654_208),
    ("repmlpnet", (1, 3)): (8_305_284 + 3_360, 468_329_472 + 2_949_120),
    ("resmlp", ()): (7_144_292, 1_812_751_360),
    ("resmlp", (1,)): (7_144_292 + 60, 1_812_751_360 + 786_432),
    ("resmlp", (3,)): (7_144_292 + 156, 1_812_751_360 + 7_077_888),
    ("resmlp", (1, 3)): (7_144_292 + 216, 1_812_751_360 + 7_864_320),
}
# a dilated or shuffled 3x3 costs what a plain one does, a row of three taps a third of its taps
PRINTED |= {
    (name, (*few, branch)): PRINTED[name, (*few, 3)] for name in NETS for few in ((), (1,)) for branch in ("3s", "3d2")
}
PRINTED["resmlp", ("1x3",)] = (7_144_292 + 156 - 12 * 6, 1_812_751_360 + 7_077_888 // 3)
ANY_KIND = ["1x3", 3, "5d2", "3s", "3d2s"]


@pytest.mark.parametrize(("name", "kernels"), PRINTED)
def test_counts_are_the_papers(name, kernels):
    with torch.device("meta"):
        net = NETS[name](kernels=kernels)
    count = count_params_paper if name == "resmlp" else count_params
    assert (count(net), count_macs(net, 32)) == PRINTED[name, kernels]


def test_imagenet_counts_are_the_published_architectures():
    """T224 and D256 by the general class; the exact counts of the published networks."""
    for img, channels, blocks, params in (
        (224, (64, 128, 256, 512), (2, 2, 6, 2), 38_293_608),
        (256, (80, 160, 320, 640), (2, 2, 18, 2), 86_887_648),
    ):
        with torch.device("meta"):
            net = RepMLPNet(img, 4, channels, blocks, (1, 4, 16, 128), num_classes=1000)
        assert count_params(net) == params


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_whole_net_merges(name, dtype, bound):
    net = randomise_norms(NETS[name](kernels=(1, 3))).to(dtype).eval()
    x = torch.randn(1 if dtype == torch.float64 else 8, 3, 32, 32, dtype=dtype)  # torch's float64 convolutions are slow
    with torch.no_grad():
        before = net(x)
        merged = merged_copy(net)
        after = merged(x)
    assert float((after - before).norm() / before.norm()) < bound
    assert not any("local_perceptron" in key for key in merged.state_dict())


@pytest.mark.parametrize("name", NETS)
def test_timm_merges_a_wrapped_net(name):
    wrapper = nn.Sequential(nn.Identity(), randomise_norms(build_model(SMALL[name]))).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    merged = timm.utils.reparameterize_model(wrapper)
    with torch.no_grad():
        expected = wrapper(x)
        assert float((merged(x) - expected).norm() / expected.norm()) < 1e-12
    assert any("local_perceptron" in key for key in wrapper.state_dict())
    assert not any("local_perceptron" in key for key in merged.state_dict())


@pytest.mark.parametrize("name", NETS)
def test_every_parameter_gets_a_gradient(name):
    net = build_model(SMALL[name]).train()
    net(torch.randn(4, 3, 32, 32)).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in net.parameters())


def test_ffn_is_two_pointwise_convolutions():
    ffn = randomise_norms(FFN(8)).double().eval()
    x = torch.randn(2, 8, 5, 3, dtype=torch.float64)

    def norm(y, layer):
        return nn.functional.batch_norm(y, layer.running_mean, layer.running_var, layer.weight, layer.bias)

    hidden = norm(nn.functional.conv2d(x, ffn.fc1.weight[:, :, None, None]), ffn.norm1)
    expected = norm(nn.functional.conv2d(nn.functional.gelu(hidden), ffn.fc2.weight[:, :, None, None]), ffn.norm2)
    torch.testing.assert_close(ffn(x), expected, rtol=1e-12, atol=1e-12)


def test_resmlp_starts_like_resmlp():
    net = build_resmlp()
    spatial = net.blocks[0].linear_tokens
    assert abs(float(spatial.weight.detach().std()) - 0.02) < 2e-3 and not spatial.bias.detach().any()
    assert float(net.blocks[0].ls1.detach().unique()) == pytest.approx(0.1)
    assert spatial.local_perceptron.convs["3"].weight.shape == (1, 1, 3, 3)


def test_other_image_sizes():
    net = build_model(SMALL["repmlpnet"]).eval()
    assert net(torch.randn(1, 3, 48, 80)).shape == (1, 100)


@pytest.mark.parametrize("kernels", [[1, "3s"], ANY_KIND])
@pytest.mark.parametrize("name", NETS)
def test_branches_of_any_kind_from_training_to_the_merged_file(tmp_path, name, kernels):
    """A step, a file and back under another seed, and merging."""
    config = {**SMALL[name], "kernels": kernels}
    net = build_model(config).double().train()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    net(x).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in net.parameters())
    optimizer.step()
    randomise_norms(net).eval()
    save_model(tmp_path / "model.safetensors", net, config)
    torch.manual_seed(5)
    loaded, metadata = load_model(tmp_path / "model.safetensors")
    assert json.loads(metadata["repmlp_model"])["kernels"] == kernels
    with torch.no_grad():
        expected = net(x)
        loaded.double().load_state_dict(net.state_dict())
        assert torch.equal(loaded(x), expected)
        merged = merged_copy(net)
        assert float((merged(x) - expected).norm() / expected.norm()) < 1e-12
        net = merged.float()
        save_model(tmp_path / "merged.safetensors", net, config)
        assert torch.equal(load_model(tmp_path / "merged.safetensors")[0](x.float()), net(x.float()))


def test_layers_of_one_grid_share_the_order():
    net = build_model({**SMALL["repmlpnet"], "kernels": [1, "3s"]})
    orders = [b for name, b in net.named_buffers() if name.endswith("permutation")]
    assert [len(order) for order in orders] == [256, 256, 64] and torch.equal(orders[0], orders[1])


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("merged", [False, True])
def test_save_and_load(tmp_path, name, merged):
    config = SMALL[name]
    net = randomise_norms(build_model(config)).eval()
    if merged:
        net = merged_copy(net)
    save_model(tmp_path / "model.safetensors", net, config, {"key": "abc"})
    loaded, metadata = load_model(tmp_path / "model.safetensors")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(net(x), loaded(x))
    assert metadata["key"] == "abc"
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_bad_checkpoints_are_named(tmp_path):
    config = SMALL["repmlpnet"]
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_model(path)
    save_model(path, build_model(config), config)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        load_model(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="names no repmlp model"):
        load_model(path)
    path.unlink()
    other = {**config, "channels": [32, 64]}
    for net, words in (
        (
            build_model(SMALL["resmlp"]),
            r"architecture: stem\.conv\.weight is missing and \S+ is unexpected$",
        ),
        (build_model(other), r"architecture: stem\.conv\.weight is \(32, 3, 2, 2\) there and \(16, 3, 2, 2\) here$"),
    ):
        with pytest.raises(ValueError, match=f"^config is of another {words}"):
            save_model(path, net, config)
        assert not list(tmp_path.iterdir())
        save_file(net.state_dict(), path, {"repmlp_model": json.dumps(config), "num_classes": "100"})
        with pytest.raises(ValueError, match=rf"model\.safetensors is of another {words}"):
            load_model(path)
        path.unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arch": "vit"}, "unknown architecture 'vit'"),
        ({"colour": 3}, "colour"),
        ({"share_sets": [3, 16]}, "share_sets=3 does not divide channels=16"),
        ({"share_sets": [4]}, "one number a stage"),
        ({"img_size": 30}, "img_size=30"),
        ({"kernels": [2]}, "branch 2x2: its sides have to be odd"),
    ],
)
def test_bad_configurations_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        build_model({**SMALL["repmlpnet"], **change})
