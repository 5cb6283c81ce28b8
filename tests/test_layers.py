"""The layers against their definition, merged against train-time, over map sizes and partitions."""

import copy
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import randomise_norms
from hypothesis import assume, given
from hypothesis import strategies as st

from repmlp import RepMLPBlock, SetSharingFC
from repmlp.branches import WAYS, parse
from repmlp.layers import GlobalPerceptron
from repmlp.local_perceptron import LocalPerceptron, branches_by
from repmlp.parameters import batch_norm_stats

shapes = st.fixed_dictionaries(
    {
        "h": st.integers(1, 6),
        "w": st.integers(1, 6),
        "share_sets": st.integers(1, 3),
        "members": st.integers(1, 3),
        "kernels": st.sampled_from(
            [
                *((), (1,), (3,), (1, 3), (1, 3, 5, 7)),
                *(("1x3", "3x1"), ("3d2", 1), ("5d2", "1x3d3"), (1, "3s"), ("1x3s", "3s", 3), ("3d2s", "5s", "3x1d2")),
            ]
        ),
        "gate": st.booleans(),
        "rows": st.integers(1, 3),
        "columns": st.integers(1, 3),
        "short": st.tuples(st.integers(0, 5), st.integers(0, 5)),
        "seed": st.integers(0, 2**16),
    }
)


def build(g: dict, dtype=torch.float64) -> tuple[RepMLPBlock, torch.Tensor]:
    """Build a block and a map of rows x columns partitions, the last ones perhaps cut short."""
    assume(all(parse(kernel).fits((g["h"], g["w"])) for kernel in g["kernels"]))
    torch.manual_seed(g["seed"])
    channels = 4 * g["share_sets"] * g["members"]
    block = RepMLPBlock(channels, (g["h"], g["w"]), g["share_sets"], g["kernels"], global_perceptron=g["gate"])
    height = g["rows"] * g["h"] - g["short"][0] % g["h"]
    width = g["columns"] * g["w"] - g["short"][1] % g["w"]
    return randomise_norms(block).to(dtype).eval(), torch.randn(2, channels, height, width, dtype=dtype)


def by_definition(block: RepMLPBlock, x: torch.Tensor) -> torch.Tensor:
    """Compute a block channel by channel and tile by tile, with none of the library's reshapes."""
    fc = block.channel_perceptron
    (h, w), s = fc.size, fc.share_sets
    height, width = x.shape[-2:]
    padded = F.pad(x, (0, -width % w, 0, -height % h))
    out = torch.empty_like(padded)
    for channel in range(x.shape[1]):
        share = channel % s

        def norm(y, layer, share=share):
            return (y - layer.running_mean[share]) / (layer.running_var[share] + layer.eps).sqrt() * layer.weight[
                share
            ] + layer.bias[share]

        for top in range(0, padded.shape[2], h):
            for left in range(0, padded.shape[3], w):
                tile = padded[:, channel, top : top + h, left : left + w]
                y = norm((tile.flatten(1) @ fc.weight[share].T).view_as(tile), fc.norm)
                for k in fc.kernels:
                    spec, local = parse(k), fc.local_perceptron
                    order = local.permutation if spec.shuffled else torch.arange(h * w)
                    seen = tile.flatten(1)[:, order].view(-1, 1, h, w)
                    kernel = local.convs[str(k)].weight[share : share + 1]
                    padding = [spec.dilation * (side // 2) for side in kernel.shape[2:]]
                    z = F.conv2d(seen, kernel, padding=padding, dilation=spec.dilation)
                    back = torch.empty_like(tile).flatten(1)
                    back[:, order] = z.flatten(1)
                    y = y + norm(back.view_as(tile), local.norms[str(k)])
                out[:, channel, top : top + h, left : left + w] = y
    out = out[:, :, :height, :width]
    if block.global_perceptron is not None:
        gp = block.global_perceptron
        hidden = torch.relu(x.mean((2, 3)) @ gp.fc1.weight.T + gp.fc1.bias)
        out = out * torch.sigmoid(hidden @ gp.fc2.weight.T + gp.fc2.bias)[:, :, None, None]
    return out


@given(shapes)
def test_block_equals_its_definition_before_and_after_merging(g):
    block, x = build(g)
    with torch.no_grad():
        expected = by_definition(block, x)
        assert float((block(x) - expected).norm() / expected.norm()) < 1e-12
        block.reparameterize()
        assert float((block(x) - expected).norm() / expected.norm()) < 1e-12


@given(shapes)
def test_merging_in_float32_stays_within_rounding(g):
    block, x = build(g, torch.float32)
    with torch.no_grad():
        expected = block(x)
        block.reparameterize()
        assert float((block(x) - expected).norm()) < 1e-5 * float(1 + expected.norm())


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (16, 24), (20, 12), (5, 31)])
def test_identity_kernel_gives_identity_for_every_map_size(size):
    """Partitions: the published code scrambles tiles and channels here (C/S > 1, several tiles)."""
    block = RepMLPBlock(12, (8, 8), share_sets=3, global_perceptron=False, inference_mode=True)
    with torch.no_grad():
        block.channel_perceptron.weight.copy_(torch.eye(64).expand(3, 64, 64))
        block.channel_perceptron.bias.zero_()
        x = torch.randn(2, 12, *size)
        assert torch.equal(block(x), x)


def test_channels_are_interleaved():
    fc = SetSharingFC((2, 2), share_sets=3, norm=False)
    with torch.no_grad():
        for s in range(3):
            fc.weight[s] = (s + 1) * torch.eye(4)
        x = torch.ones(1, 6, 2, 2)
        assert [float(v) for v in fc(x)[0, :, 0, 0]] == [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize("share_sets", [1, 4])
def test_local_perceptron_trains_like_grouped_convolutions(share_sets):
    """Repeated kernels on C channels against S channels on the interleaved view: outputs, gradients, statistics."""
    ours = LocalPerceptron(share_sets, (1, 3, 5, "3d2", "1x5", "3s"), (5, 6)).double().train()
    plain = copy.deepcopy(ours)
    x = torch.randn(3, 8, 5, 6, dtype=torch.float64)
    view, order = x.reshape(-1, share_sets, 5, 6), plain.permutation

    def branch(k, conv):
        if "s" not in k:
            return conv(view)
        return conv(view.flatten(2)[:, :, order].view_as(view)).flatten(2)[:, :, order.argsort()].view_as(view)

    expected = sum(plain.norms[k](branch(k, conv)) for k, conv in plain.convs.items()).reshape(x.shape)
    found = ours(x)
    cotangent = torch.randn_like(x)
    (found * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10, msg=name)
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("way", WAYS[1:])
@given(shapes)
def test_every_way_of_branches_computes_and_learns_the_same(way, g):
    """In training, against the default way: outputs, gradients of maps and weights, running statistics, merged form."""
    one, x = build(g)
    other = branches_by(copy.deepcopy(one), way)
    results = []
    for block in (one, other):
        block.train()
        maps = x.clone().requires_grad_()
        out = block(maps)
        (out * torch.linspace(-1, 1, out.numel(), dtype=x.dtype).view_as(out)).sum().backward()
        results.append({"out": out.detach(), "maps": maps.grad, **{k: p.grad for k, p in block.named_parameters()}})
        results[-1] |= {**block.state_dict(), "merged": block.channel_perceptron.merged()[0].detach()}
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        apart = (results[1][name] - expected).abs().max()
        assert apart <= 1e-12 * max(1, float(expected.abs().max())), name


@pytest.mark.parametrize("way", WAYS)
def test_ways_of_branches_that_are_recorded_or_on_sequences(way):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    plain = LocalPerceptron(2, (1, "1x3", "3d2", "3s"), (5, 6)).double().eval()
    local, expected = branches_by(copy.deepcopy(plain), way), plain(x)
    graph = torch.fx.symbolic_trace(local)
    torch._dynamo.reset()
    compiled = torch.compile(local, backend="aot_eager", fullgraph=True)
    for recorded in (graph, torch.jit.script(local), compiled):
        torch.testing.assert_close(recorded(x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(graph(x[:2]), plain(x[:2]), rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"got maps of size \(6, 5\): the shuffled grid .* size \(5, 6\)"):
        local(x.transpose(2, 3))
    anywhere = branches_by(LocalPerceptron(2, (1, 3)).double().eval(), way)
    sequence = branches_by(LocalPerceptron(2, (3, "5d2"), (9,)).double().eval(), way)
    tokens = torch.randn(3, 4, 1, 9, dtype=torch.float64)
    for layer, maps in ((anywhere, x), (anywhere, x[:, :, :3]), (sequence, tokens)):
        found = layer(maps)
        torch.testing.assert_close(found, branches_by(layer, "channels")(maps), rtol=1e-12, atol=1e-12)
        branches_by(layer, way)


def test_another_way_of_branches_is_refused():
    with pytest.raises(ValueError, match=r"^branches by 'rows': use one of channels, sets, matrix$"):
        branches_by(RepMLPBlock(8, (4, 4), 2), "rows")


def test_reparameterize_is_idempotent_and_leaves_one_fc():
    block = randomise_norms(RepMLPBlock(8, (3, 4), 2)).eval()
    block.reparameterize()
    first = copy.deepcopy(block.state_dict())
    block.reparameterize()
    assert all(torch.equal(first[name], value) for name, value in block.state_dict().items())
    assert set(block.channel_perceptron.state_dict()) == {"weight", "bias"}
    RepMLPBlock(8, (3, 4), 2, inference_mode=True).load_state_dict(block.state_dict())


def test_reparameterize_refuses_training_mode_and_changes_nothing():
    block = RepMLPBlock(8, (3, 4), 2).train()
    with pytest.raises(RuntimeError, match=r"call model\.eval\(\)"):
        block.reparameterize()
    assert block.channel_perceptron.kernels == (1, 3)


@pytest.mark.parametrize("kernels", [(2,), (-1,), (0,), (3, 3), (1.5,), (True,), "3", 3, ("3s", "3x3s"), ("1s",)])
def test_bad_kernels_are_refused(kernels):
    for merged in (False, True):
        with pytest.raises(ValueError, match="kernels="):
            RepMLPBlock(8, (4, 4), 2, kernels, inference_mode=merged)


def test_branches_of_no_use_are_refused():
    """The rule of BranchSpec.fits, through the layers; a larger kernel is none of them, nor 3x3 on one cell."""
    for kernel, size in (("3d9", (8, 8)), ("3d8", (8, 9)), ("3d2", (1, 6)), ("3d2s", (6, 2)), ("1x3d5", (8, 5))):
        shown = f"kernels=.*branch {parse(kernel).label} only middle taps .* {size[0]}x{size[1]}; use a dilation below"
        with pytest.raises(ValueError, match=shown):
            SetSharingFC(size, 1, [1, kernel])
    for kernel, size in (("5d4", (8, 8)), (7, (2, 2)), (3, (1, 1)), ("3s", (1, 1)), ("1x3d4", (1, 5)), ("3x1", (1, 1))):
        fc = randomise_norms(SetSharingFC(size, 1, [kernel])).double().eval()
        x = torch.randn(1, 2, *size, dtype=torch.float64)
        with torch.no_grad():
            expected = fc(x)
            fc.reparameterize()
            torch.testing.assert_close(fc(x), expected, rtol=1e-12, atol=1e-12)


def test_names_of_branches_in_state_dicts():
    fc = SetSharingFC((4, 5), 2, ["3s", 3, np.int64(1), "1x3", "3d2"])
    assert fc.kernels == (1, "1x3", 3, "3d2", "3s")
    assert list(fc.local_perceptron.convs) == list(fc.local_perceptron.norms) == ["1", "1x3", "3", "3d2", "3s"]
    assert fc.state_dict()["local_perceptron.permutation"].shape == (20,)
    plain = SetSharingFC((4, 5), 2, [1, 3])
    assert {name.removeprefix("local_perceptron.") for name in plain.state_dict()} == {
        *("weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"),
        *(f"convs.{k}.weight" for k in (1, 3)),
        *(f"norms.{k}.{n}" for k in (1, 3) for n in ("weight", "bias", "running_mean", "running_var")),
        *(f"norms.{k}.num_batches_tracked" for k in (1, 3)),
    }


def blocks(kernels, seed=0, sizes=((4, 5), (4, 5), (5, 4))) -> list[RepMLPBlock]:
    torch.manual_seed(seed)
    return [RepMLPBlock(8, size, 2, kernels) for size in sizes]


@pytest.mark.parametrize(
    ("plain", "shuffled"), [([1, 3], [1, "3s"]), ([3, 5], ["3s", 5]), (["3d2", 5], ["3d2s", "5s"])]
)
def test_a_shuffled_branch_starts_from_the_values_of_the_plain_one(plain, shuffled):
    """The control differs by the order of positions alone: every other bit, and the random state afterwards."""
    first = blocks(plain)
    state = torch.get_rng_state()
    second = blocks(shuffled)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first, second, strict=True):
        values = {re.sub(r"((?:convs|norms)\.[\dxd]+)s\.", r"\1.", name): value for name, value in b.named_parameters()}
        assert sum(p.numel() for p in a.parameters()) == sum(p.numel() for p in b.parameters())
        for name, value in a.named_parameters():
            assert torch.equal(value, values[name]), name


def test_the_order_of_a_shuffled_grid_is_the_seeds_and_the_sizes():
    orders = [b.channel_perceptron.local_perceptron.permutation for b in blocks([1, "3s", "5s"])]
    for order in orders:
        assert order.dtype == torch.int64 and sorted(order.tolist()) == list(range(20))
        assert not torch.equal(order, torch.arange(20))
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    again, other = (blocks(["3s"], seed)[0].channel_perceptron.local_perceptron.permutation for seed in (0, 1))
    assert torch.equal(orders[0], again) and not torch.equal(orders[0], other)


def test_the_order_goes_with_the_weights_and_is_never_cast():
    trained, fresh = (blocks([1, "3s"], seed)[0].eval() for seed in (0, 1))
    x = torch.randn(2, 8, 4, 5)
    assert not torch.equal(trained(x), fresh(x))
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(trained(x), fresh(x)) and torch.equal(copy.deepcopy(trained)(x), fresh(x))
    order = trained.channel_perceptron.local_perceptron.permutation
    for cast in (fresh.half(), fresh.bfloat16(), fresh.double(), fresh.to("cpu", torch.float16, non_blocking=True)):
        found = cast.channel_perceptron.local_perceptron.permutation
        assert found.dtype == torch.int64 and torch.equal(found, order)
    assert (fresh.bfloat16()(x.bfloat16()).float() - trained(x)).norm() < 0.05 * trained(x).norm()


def test_shuffled_branches_on_meta():
    with torch.device("meta"):
        net = blocks([1, "3s"])[0].eval()
        assert net(torch.randn(2, 8, 9, 5)).shape == (2, 8, 9, 5)
    assert all(t.is_meta for t in (*net.parameters(), *net.buffers()))
    made = net.to_empty(device="cpu")
    torch.manual_seed(0)
    for module in made.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    order = blocks([1, "3s"])[0].channel_perceptron.local_perceptron.permutation
    assert torch.equal(made.channel_perceptron.local_perceptron.permutation, order)
    net.load_state_dict(blocks([1, "3s"], seed=3)[0].state_dict(), assign=True)
    net(torch.randn(2, 8, 4, 5))


def test_shuffled_branches_need_their_grid():
    with pytest.raises(ValueError, match="branch 3x3s: a shuffled grid needs the size of the map"):
        LocalPerceptron(2, (1, "3s"))
    with pytest.raises(ValueError, match=r"got maps of size \(5, 4\)"):
        LocalPerceptron(2, (1, "3s"), (4, 5))(torch.zeros(1, 2, 5, 4))


@pytest.mark.parametrize("kernels", [[1], [3], [1, "1x5"], ["3d2", "3x1"], ["3s"], [1, "3d2s", "1x3"]])
def test_taps_are_where_the_merged_matrix_has_weights(kernels):
    fc = SetSharingFC((5, 6), 2, kernels, norm=False).eval()
    with torch.no_grad():
        fc.weight.zero_()
        for conv in fc.local_perceptron.convs.values():
            conv.weight.fill_(1.0)
        matrix = fc.merged()[0][0].view(5, 6, 5, 6)
    for point in ((0, 0), (2, 3), (4, 5), (3, 0)):
        assert torch.equal(fc.local_perceptron.taps(point), matrix[point] != 0)
    with pytest.raises(ValueError, match="lies outside the map"):
        fc.local_perceptron.taps((5, 0))


def test_bad_shapes_are_refused():
    with pytest.raises(ValueError, match="share_sets=3 does not divide channels=8"):
        RepMLPBlock(8, (4, 4), 3)
    with pytest.raises(ValueError, match="at least one share-set"):
        SetSharingFC((4, 4), 0)
    with pytest.raises(ValueError, match="16 share-sets have to divide the channels"):
        SetSharingFC((4, 4), 16)(torch.zeros(2, 24, 4, 4))
    with pytest.raises(ValueError, match=r"size \(2, 8\)"):
        SetSharingFC((4, 4), 2)(torch.zeros(2, 4, 2, 8))
    with pytest.raises(ValueError, match="reduction"):
        GlobalPerceptron(6)
    with pytest.raises(ValueError, match="running statistics"):
        batch_norm_stats(torch.nn.BatchNorm2d(4, track_running_stats=False))


@pytest.mark.parametrize("contiguous", [True, False])
def test_an_optimizer_made_before_merging_trains_the_merged_weight(contiguous):
    layer = SetSharingFC((4, 4), 2, (1, 3)).eval()
    if not contiguous:
        layer.weight.data = layer.weight.data.transpose(1, 2).clone().transpose(1, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    weight = layer.weight
    layer.reparameterize()
    assert layer.weight is weight and layer.bias.requires_grad
    optimizer.add_param_group({"params": [layer.bias]})  # which is new
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    layer(torch.randn(2, 4, 4, 4)).square().sum().backward()
    optimizer.step()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * p.grad)
        assert p.grad.any()


def test_a_bias_that_is_there_stays_the_same_parameter():
    layer = SetSharingFC((4, 4), 1, (1, 3), bias=True, norm=False).eval()
    parameters = layer.weight, layer.bias
    layer.reparameterize()
    assert layer.weight is parameters[0] and layer.bias is parameters[1]
