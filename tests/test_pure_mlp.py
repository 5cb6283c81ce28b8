"""The pure MLP and the networks it is compared with: counts as printed, merging, configurations, bad input."""

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, compose_config, randomise_norms
from torch import nn

from repmlp import build_model, fold_batch_norms, load_model, save_model
from repmlp.cost import count_macs, count_params
from repmlp.models.repmlp_pure import PartitionConv, PureMLP

SMALL = {"channels": (4, 8), "img_size": 16, "kernels": (1, 3)}
CONFIGURATIONS = sorted(path.stem for path in (ROOT / "experiments/conf/model").glob("repmlp_pure*.yaml"))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_macs_are_the_printed_ones():
    """52.8M of the pure MLP, 65.1M of the wide ConvNet; they meet the paper's cells, merged."""
    with torch.device("meta"):
        pure = PureMLP(inference_mode=True)
        convnet = PureMLP(channels=(32, 64, 128), groups=1, spatial="conv", conv_kernel=3)
    assert count_macs(pure, 32) == 52_806_272
    assert count_macs(convnet, 32) == 65_111_296
    # the paper prints 0.50M parameters for the ConvNet: something small differs
    assert round(count_params(fold_batch_norms(convnet.eval())) / 1e6, 2) == 0.44
    with torch.device("meta"):
        trained = PureMLP()
    branches = 2 * sum(1024 // 4**i * (1 + 9 + 25) * c * c // 2 for i, c in enumerate((16, 32, 64)))
    assert count_macs(trained, 32) == 52_806_272 + branches
    assert count_macs(fold_batch_norms(trained.eval()), 32) == 52_806_272


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"kernels": ()},
        {"kernels": (1, "3s")},
        {"global_perceptron": False},
        {"spatial": "fc3_conv"},
        {"spatial": "fc3_conv", "kernels": ("1x3", "3d2"), "global_perceptron": False},
        {"spatial": "conv", "conv_kernel": 5},
    ],
)
@torch.no_grad()
def test_merged_and_folded_compute_the_same(change, tmp_path):
    config = {"arch": "repmlp_pure", **SMALL, **change}
    model = randomise_norms(build_model(config, 7)).double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = model(x)
    folded = fold_batch_norms(model)
    assert relative(folded(x), expected) < 1e-12
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    # through a file, as it is trained and merged
    single = model.float()
    for name in ("train", "merged"):
        save_model(tmp_path / f"{name}.safetensors", single, config)
        again, _ = load_model(tmp_path / f"{name}.safetensors")
        assert torch.equal(again(x.float()), single(x.float()))
        for module in single.modules():
            if hasattr(module, "reparameterize"):
                module.reparameterize()
    assert not any("local_perceptron" in key or "perceptron.norm" in key for key in single.state_dict())


@torch.no_grad()
def test_large_convolution_is_torchs_on_each_partition():
    layer = randomise_norms(PartitionConv(4, 6, (8, 8), 2, (3,), 9)).double().eval()
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    local = layer.local_perceptron
    expected = layer.norm(F.conv2d(x, layer.weight, padding=4, groups=2)) + local.norms["3"](local.convs["3"](x))
    torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)
    layer.reparameterize()
    assert layer.weight.shape == (6, 2, 9, 9) and layer.norm is None and layer.local_perceptron is None
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(RuntimeError, match="training mode"):
        PartitionConv(4, 6, (8, 8), 2, (3,), 9).train().reparameterize()


@pytest.mark.parametrize("spatial", ["repmlp", "fc3_conv", "conv"])
def test_every_parameter_gets_a_gradient(spatial):
    model = PureMLP(**SMALL, spatial=spatial)
    model(torch.randn(4, 3, 16, 16)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_no_global_perceptron_between_parts_of_one_partition():
    with torch.device("meta"):
        gates = [stage[0][0].global_perceptron for stage in PureMLP().stages]
    assert [gate and gate.fc1.in_features for gate in gates] == [256, 128, None]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configurations_build(name):
    config = compose_config(f"model={name}")["model"]
    assert config["name"] == name
    with torch.device("meta"):
        model = build_model(config, 100)
        merged = build_model(config, 100, inference_mode=True)
    x = torch.empty(2, 3, 32, 32, device="meta")
    assert tuple(model(x).shape) == tuple(merged(x).shape) == (2, 100)


def test_the_sweep_names_every_small_configuration():
    text = (ROOT / "experiments/conf/sweep/small/pure_mlp.yaml").read_text()
    (row,) = [line.split(":")[1] for line in text.splitlines() if line.strip().startswith("model: ")]
    assert sorted(row.strip().split(",")) == [name for name in CONFIGURATIONS if "_small" in name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spatial": "mlp"}, "spatial='mlp': use one of repmlp, fc3_conv, conv"),
        ({"img_size": 17}, "img_size=17 is no multiple of 2"),
        ({"partition": 9}, "a partition of 9x9 is larger than the 8x8 map"),
        ({"groups": 3}, "groups=3 does not divide"),
        ({"groups": 3, "spatial": "conv"}, "groups=3 does not divide 4 channels"),
        ({"groups": 3, "spatial": "fc3_conv"}, "groups=3 does not divide"),
        ({"conv_kernel": 4, "spatial": "conv"}, "conv_kernel=4: use an odd number"),
        ({"conv_kernel": 3, "kernels": (5,), "spatial": "fc3_conv"}, "branch 5x5 does not merge into a 3x3 conv"),
        ({"kernels": (1, "3s"), "spatial": "fc3_conv"}, "branch 3x3s"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        PureMLP(**{**SMALL, **arguments})
    assert "\n" not in str(error.value)
