"""The layers against their definition, merged against train-time, over map sizes and partitions."""

import copy

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise_norms
from hypothesis import given
from hypothesis import strategies as st

from repmlp import RepMLPBlock, SetSharingFC
from repmlp.layers import GlobalPerceptron, LocalPerceptron, batch_norm_stats

shapes = st.fixed_dictionaries(
    {
        "h": st.integers(1, 6),
        "w": st.integers(1, 6),
        "share_sets": st.integers(1, 3),
        "members": st.integers(1, 3),
        "kernels": st.sampled_from([(), (1,), (3,), (1, 3), (1, 3, 5, 7)]),
        "gate": st.booleans(),
        "rows": st.integers(1, 3),
        "columns": st.integers(1, 3),
        "short": st.tuples(st.integers(0, 5), st.integers(0, 5)),
        "seed": st.integers(0, 2**16),
    }
)


def build(g: dict, dtype=torch.float64) -> tuple[RepMLPBlock, torch.Tensor]:
    """Build a block and a map of rows x columns partitions, the last ones perhaps cut short."""
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
                    kernel = fc.local_perceptron.convs[str(k)].weight[share : share + 1]
                    z = F.conv2d(tile.unsqueeze(1), kernel, padding=k // 2).squeeze(1)
                    y = y + norm(z, fc.local_perceptron.norms[str(k)])
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
    ours = LocalPerceptron(share_sets, (1, 3, 5)).double().train()
    plain = copy.deepcopy(ours)
    x = torch.randn(3, 8, 5, 6, dtype=torch.float64)
    view = x.reshape(-1, share_sets, 5, 6)
    expected = sum(plain.norms[k](conv(view)) for k, conv in plain.convs.items()).reshape(x.shape)
    found = ours(x)
    cotangent = torch.randn_like(x)
    (found * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10, msg=name)
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("kernels", [(2,), (-1,), (0,), (3, 3), (1.5,), (True,)])
def test_bad_kernels_are_refused(kernels):
    with pytest.raises(ValueError, match="kernels="):
        RepMLPBlock(8, (4, 4), 2, kernels)


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
