"""The older block against its definition, merged against train-time, over map sizes, groups and partitions."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import randomise_norms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from repmlp import RepMLP
from repmlp.branches import parse
from repmlp.locality import group_kernel_map, network_profiles, uniform_profile
from repmlp.repmlp_block import PartitionPerceptron

KERNELS = [(), (1,), (3,), (1, 3, 5), (5, "1x3", "3x1"), ("3d2", 1), (1, "3s"), (3, "3s", "5s")]
shapes = st.fixed_dictionaries(
    {
        "h": st.integers(5, 6),
        "w": st.integers(5, 7),
        "groups": st.integers(1, 3),
        "inputs": st.integers(1, 2),
        "outputs": st.integers(1, 2),
        "kernels": st.sampled_from(KERNELS),
        "gate": st.booleans(),
        "reduction": st.integers(1, 2),
        "rows": st.integers(1, 3),
        "columns": st.integers(1, 3),
        "short": st.tuples(st.integers(0, 5), st.integers(0, 5)),
        "zero": st.booleans(),
        "seed": st.integers(0, 2**16),
    }
)


def build(g: dict) -> tuple[RepMLP, torch.Tensor]:
    """Build a block in float64 with random statistics, and maps whose last partitions are perhaps cut short."""
    torch.manual_seed(g["seed"])
    height = max(g["h"], g["rows"] * g["h"] - g["short"][0] % g["h"])
    width = max(g["w"], g["columns"] * g["w"] - g["short"][1] % g["w"])
    channels, outputs = 2 * g["groups"] * g["inputs"], g["groups"] * g["outputs"]
    block = RepMLP(
        channels,
        outputs,
        (height, width),
        (g["h"], g["w"]),
        g["groups"],
        g["kernels"],
        global_perceptron=g["gate"],
        global_reduction=g["reduction"],
    )
    randomise_norms(block)
    if g["zero"]:  # a batch norm whose weight is 0 passes nothing on: nothing may be divided by it
        for module in block.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.zeros_(module.weight[::2])
    return block.double().eval(), torch.randn(2, channels, height, width, dtype=torch.float64)


def normalised(y: torch.Tensor, norm: nn.Module, index) -> torch.Tensor:
    root = (norm.running_var[index] + norm.eps).sqrt()
    return (y - norm.running_mean[index]) / root * norm.weight[index] + norm.bias[index]


def by_definition(block: RepMLP, x: torch.Tensor) -> torch.Tensor:
    """Compute a block image by image and partition by partition, with none of the library's reshapes."""
    (h, w), (height, width), fc3 = block.size, x.shape[2:], block.partition_perceptron
    rows, columns = -(-height // h), -(-width // w)
    c, o, g = fc3.in_channels, fc3.out_channels, fc3.groups
    cells = [(slice(r * h, r * h + h), slice(k * w, k * w + w)) for r in range(rows) for k in range(columns)]
    out = x.new_zeros(len(x), o, rows * h, columns * w)
    for n, image in enumerate(x):
        given = x.new_zeros(c, rows * columns)
        if block.global_perceptron is not None:
            gp = block.global_perceptron
            pooled = torch.stack([image[:, y, z].mean(dim=(1, 2)) for y, z in cells], dim=1)  # a cut one: what exists
            pooled = torch.stack([normalised(pooled[i], gp.norm, i) for i in range(c)])
            given = gp.fc2(F.relu(gp.fc1(pooled.flatten()))).view(c, -1)
        for i, (y, z) in enumerate(cells):
            valid = image[:, y, z] + given[:, i, None, None]
            tile = F.pad(valid, (0, w - valid.shape[2], 0, h - valid.shape[1]))
            for group in range(g):
                inputs = tile[group * c // g : (group + 1) * c // g]
                features = (fc3.weight[group] @ inputs.flatten()).view(o // g, h, w)
                for j in range(o // g):
                    channel = group * o // g + j
                    numbers = torch.arange(channel * h * w, (channel + 1) * h * w).view(h, w)
                    result = normalised(features[j], fc3.norm, numbers)
                    for name, conv in () if fc3.local_perceptron is None else fc3.local_perceptron.convs.items():
                        kernel, spec = conv.weight[channel], parse(int(name) if name.isdigit() else name)
                        seen, order = inputs, fc3.local_perceptron.permutation
                        if spec.shuffled:
                            assert not order.equal(torch.arange(h * w)) or h * w < 4
                            seen = inputs.flatten(1)[:, order].view(inputs.shape)
                        y_ = F.conv2d(seen[None], kernel[None], padding=spec.padding, dilation=spec.dilation)[0, 0]
                        if spec.shuffled:  # what stands at place i of the shuffled grid belongs to position order[i]
                            unshuffled = torch.empty_like(y_).flatten()
                            unshuffled[order] = y_.flatten()
                            y_ = unshuffled.view(h, w)
                        result = result + normalised(y_, fc3.local_perceptron.norms[name], channel)
                    out[n, channel, y, z] = result
    return out[:, :, :height, :width]


@settings(max_examples=40, derandomize=True)  # the definition is loops in Python
@given(shapes)
@torch.no_grad()
def test_forward_is_the_definition(g):
    block, x = build(g)
    torch.testing.assert_close(block(x), by_definition(block, x), rtol=1e-11, atol=1e-11)


@settings(max_examples=40, derandomize=True)  # the definition is loops in Python
@given(shapes)
@torch.no_grad()
def test_merged_computes_the_same(g):
    block, x = build(g)
    before = block(x)
    block.reparameterize()
    after = block(x)
    assert float((after - before).norm() / before.norm().clamp_min(1e-30)) < 1e-12
    left = {name.rpartition(".")[0] for name in block.state_dict()}
    layers = {"global_perceptron.fc1", "global_perceptron.fc2"} if block.global_perceptron else set()
    assert left == {"partition_perceptron"} | layers
    state = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    block.reparameterize()
    assert all(torch.equal(tensor, state[name]) for name, tensor in block.state_dict().items())


def small(**kwargs) -> RepMLP:
    return RepMLP(8, 4, (14, 10), (7, 5), 2, (1, 3), **kwargs)


@torch.no_grad()
def test_padded_cells_stay_zero_after_the_addition():
    """An FC3 that copies, and a Global Perceptron that adds 5 everywhere: what FC3 gets beyond the border is 0."""
    block = RepMLP(2, 2, (9, 8), (5, 5), 2, ()).eval()
    for layer in (block.global_perceptron.fc1, block.global_perceptron.fc2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    block.global_perceptron.fc2.bias.fill_(5.0)
    seen = []
    block.partition_perceptron.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    block(torch.zeros(1, 2, 9, 8))
    (tiles,) = seen  # four tiles: (rows that exist, columns that exist)
    for tile, (rows, columns) in zip(tiles, [(5, 5), (5, 3), (4, 5), (4, 3)], strict=True):
        expected = torch.zeros(2, 5, 5)
        expected[:, :rows, :columns] = 5.0
        assert torch.equal(tile, expected)


@torch.no_grad()
def test_float32_and_timm_and_inference_mode():
    block = randomise_norms(small()).eval()
    x = torch.randn(2, 8, 14, 10)
    merged = timm.utils.reparameterize_model(nn.Sequential(block))[0]
    expected = block(x)
    assert block.partition_perceptron.kernels == (1, 3) and merged.partition_perceptron.kernels == ()
    assert float((merged(x) - expected).norm() / expected.norm()) < 2e-6
    fresh = small(inference_mode=True).eval()
    fresh.load_state_dict(merged.state_dict())
    assert torch.equal(fresh(x), merged(x))


def test_training_mode_is_refused():
    block = small()
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(RuntimeError, match="training mode"):
        block.reparameterize()
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
    with pytest.raises(RuntimeError, match="training mode"):
        RepMLP(8, 4, (7, 5), (7, 5), 2).reparameterize()  # one without a Global Perceptron


def test_every_parameter_gets_a_gradient_through_the_merged_weight_too():
    block = small()
    block(torch.randn(4, 8, 14, 10)).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in block.parameters())
    fc3 = randomise_norms(PartitionPerceptron(4, 4, (3, 3), 2, (1, 3))).double().eval()
    weight, bias = fc3.merged()
    (weight.sum() + bias.square().sum()).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in fc3.parameters())


def test_initial_weights_are_orthogonal_group_by_group():
    fc3 = PartitionPerceptron(8, 4, (3, 3), 2, ())
    products = torch.bmm(fc3.weight, fc3.weight.transpose(1, 2))  # fewer rows than columns
    torch.testing.assert_close(products, torch.eye(18).expand(2, -1, -1), rtol=0, atol=1e-5)


def test_construction_on_meta_allocates_nothing():
    with torch.device("meta"):
        block = small()
        out = block(torch.empty(2, 8, 14, 10))
    assert out.is_meta and all(t.is_meta for t in (*block.parameters(), *block.buffers()))


def test_global_perceptron_stands_only_between_partitions():
    assert RepMLP(4, 4, (7, 7), (7, 7)).global_perceptron is None
    assert RepMLP(4, 4, (8, 7), (7, 7)).global_perceptron.fc1.weight.shape == (8, 8)
    assert RepMLP(4, 4, (14, 14), (7, 7), global_perceptron=False).global_perceptron is None
    fc1 = RepMLP(4, 4, (14, 21), (7, 7), global_reduction=4).global_perceptron.fc1
    assert fc1.weight.shape == (6, 24)


def test_other_maps():
    block = small().eval()
    with torch.no_grad():
        assert block(torch.zeros(1, 8, 13, 9)).shape == (1, 4, 13, 9)
    with pytest.raises(ValueError, match="21x10 map has 3x2 partitions of 7x5, this RepMLP is built for 2x2"):
        block(torch.zeros(1, 8, 21, 10))
    with pytest.raises(ValueError, match="14x10 map has 2x2 partitions"):
        RepMLP(8, 4, (7, 5), (7, 5))(torch.zeros(1, 8, 14, 10))
    free = RepMLP(8, 4, (7, 5), (7, 5), global_perceptron=False, inference_mode=True)
    assert free(torch.zeros(1, 8, 30, 11)).shape == (1, 4, 30, 11)


def test_other_map_sizes_make_fc1_and_fc2_fresh():
    block = small().double().eval()
    kept, norm = block.partition_perceptron.weight, block.global_perceptron.norm
    assert block.set_map_size((12, 8)) is None  # padded, but as many partitions
    assert block.set_map_size((21, 15)) == "fresh"
    assert block.global_perceptron.fc1.weight.shape == (72, 72) and block.global_perceptron.norm is norm
    assert block.partition_perceptron.weight is kept and not block.global_perceptron.training
    assert block(torch.zeros(1, 8, 21, 15, dtype=torch.float64)).shape == (1, 4, 21, 15)
    assert block.set_map_size((21, 15), global_reduction=4) == "fresh"
    assert block.global_perceptron.fc1.weight.shape == (18, 72)
    assert block.set_map_size((7, 5)) == "removed" and block.global_perceptron is None
    assert block.set_map_size((14, 5)) == "fresh" and block.global_perceptron.norm is not None
    merged = small().eval()
    merged.reparameterize()
    with pytest.raises(ValueError, match="the block is merged"):
        merged.set_map_size((21, 15))
    assert merged.partitions == (2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": 3}, "groups=3 does not divide 8 input and 8 output channels"),
        ({"out_channels": 6, "groups": 4}, "groups=4 does not divide 8 input and 6 output channels"),
        ({"size": (7, 15)}, "a partition of 7x15 is larger than the 14x14 map"),
        ({"size": (0, 7)}, r"partition \(0, 7\): use two positive numbers"),
        ({"kernels": (1, 9)}, "branch 9x9 covers 9x9 cells, a partition has 7x7"),
        ({"kernels": ("3d4",)}, "branch 3x3d4 covers 9x9 cells"),
        ({"kernels": (2,)}, "its sides have to be odd"),
        ({"kernels": (3, "3")}, "the branch 3x3 stands there twice"),
        ({"global_reduction": 5}, "global_reduction=5 does not divide the 32 numbers"),
    ],
)
def test_bad_input(arguments, message):
    given = {"in_channels": 8, "out_channels": 8, "map_size": (14, 14), "size": (7, 7), "groups": 2} | arguments
    with pytest.raises(ValueError, match=message) as error:
        RepMLP(**given)
    assert "\n" not in str(error.value)


def test_layer_refuses_other_maps():
    with pytest.raises(ValueError, match=r"got maps of shape \(4, 3, 3\), this layer takes \(4, 3, 2\)"):
        PartitionPerceptron(4, 4, (3, 2), kernels=())(torch.zeros(1, 4, 3, 3))


def test_kernel_map_of_the_older_paper():
    """Figure 5: one output number's weights over one input channel, log magnitude over the smallest of all groups."""
    weight = torch.linspace(1, 2, 2 * 12 * 18).view(2, 12, 18).clone()  # g = 2, O/g = 2, C/g = 3, maps of 2x3
    weight[0, 0, 0], weight[1, 11, 17] = 0.25, -0.0
    found = group_kernel_map(weight, (2, 3), out_channel=3, point=(1, 2), in_channel=2)
    # channel 3 is the second of group 1: rows 6 to 11 of its matrix, the last of them; columns 12 to 17
    expected = torch.log(weight[1, 11, 12:18].double().clamp_min(0.25) / 0.25).view(2, 3)
    torch.testing.assert_close(found, expected)
    assert found[1, 2] == 0
    for arguments, message in (
        ({"out_channel": 4}, "output channel 4, input channel 0: there are 4 output channels and 3 input channels"),
        ({"in_channel": 3}, "there are 4 output channels and 3 input channels a group"),
        ({"point": (2, 0)}, r"point \(2, 0\) lies outside the 2x3 map"),
        ({"size": (5, 3)}, r"a weight of shape \(2, 12, 18\) is no layer over maps of 5x3"),
    ):
        given = {"size": (2, 3), "out_channel": 0, "point": (0, 0), "in_channel": 0} | arguments
        with pytest.raises(ValueError, match=message):
            group_kernel_map(weight, **given)


def test_locality_profiles_of_a_block():
    """An FC3 of 1x1 branches alone is as local as can be; a flat one is not, and a branch makes it more local."""
    fc3 = PartitionPerceptron(4, 4, (5, 5), 2, (1,)).eval()
    nn.init.zeros_(fc3.weight)
    (profile,) = network_profiles(fc3)
    assert profile["injected"] == [1.0] * 5 and profile["trained"] == [0.0] * 5
    nn.init.constant_(fc3.weight, 0.01)
    (profile,) = network_profiles(fc3)
    assert profile["trained"] == pytest.approx(uniform_profile((5, 5)), abs=1e-6)
    assert profile["injected"][0] > 2 * profile["trained"][0]


@torch.no_grad()
def test_memory_formats_and_free_batch_size():
    """Channels-last maps give the same, and torch.export leaves the number of images free."""
    block = randomise_norms(small()).eval()
    x = torch.randn(3, 8, 13, 9)
    torch.testing.assert_close(block(x.contiguous(memory_format=torch.channels_last)), block(x))
    for form in (block, timm.utils.reparameterize_model(nn.Sequential(block))):
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(form, (x,), dynamic_shapes=({0: batch},))
        five = torch.randn(5, 8, 13, 9)
        torch.testing.assert_close(program.module()(five), form(five))
