"""Locality Injection against torch's own convolution, in float64, over generated shapes."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from repmlp.reparam import BatchNormStats, Branch, conv_to_fc, fuse_bn, merge_branches

some_shapes = settings(max_examples=40, derandomize=True)

geometry = st.fixed_dictionaries(
    {
        "h": st.integers(1, 9),
        "w": st.integers(1, 9),
        "kh": st.sampled_from([1, 3, 5, 7]),
        "kw": st.sampled_from([1, 3, 5, 7]),
        "groups": st.integers(1, 3),
        "out_per_group": st.integers(1, 3),
        "in_per_group": st.integers(1, 3),
        "dilation": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "shuffled": st.booleans(),
        "seed": st.integers(0, 2**16),
    }
)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def apply_fc(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Apply grouped FC matrices to maps, by definition: no reshape of the library is reused."""
    n, _, h, w = x.shape
    groups = weight.shape[0]
    outputs = []
    for group, chunk in enumerate(x.chunk(groups, dim=1)):
        out = chunk.flatten(1) @ weight[group].T
        outputs.append((out if bias is None else out + bias[group]).view(n, -1, h, w))
    return torch.cat(outputs, dim=1)


def random_norm(channels: int, dtype: torch.dtype = torch.float64) -> BatchNormStats:
    return BatchNormStats(
        torch.randn(channels, dtype=dtype),
        torch.rand(channels, dtype=dtype) + 0.2,
        torch.randn(channels, dtype=dtype),
        torch.randn(channels, dtype=dtype),
        1e-5,
    )


def apply_norm(x: torch.Tensor, norm: BatchNormStats) -> torch.Tensor:
    return F.batch_norm(x, norm.mean, norm.var, norm.weight, norm.bias, False, 0.0, norm.eps)


def convolve(x: torch.Tensor, kernel: torch.Tensor, g: dict, place: dict, bias=None) -> torch.Tensor:
    """Convolve maps by torch, "same"-padded; on a shuffled grid by moving cell for cell there and back."""
    padding = [d * (k // 2) for d, k in zip(place["dilation"], kernel.shape[2:], strict=True)]
    given = {"padding": padding, "dilation": place["dilation"], "groups": g["groups"]}
    if place["permutation"] is None:
        return F.conv2d(x, kernel, bias, **given)
    moved = torch.stack([x.flatten(2)[:, :, int(i)] for i in place["permutation"]], dim=2).view_as(x)
    y = F.conv2d(moved, kernel, bias, **given)
    back = torch.empty_like(y.flatten(2))
    for here, there in enumerate(place["permutation"].tolist()):
        back[:, :, there] = y.flatten(2)[:, :, here]
    return back.view_as(y)


def draw(g: dict) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Draw maps and a kernel, and say on which grid it works: the arguments dilation and permutation."""
    torch.manual_seed(g["seed"])
    x = torch.randn(2, g["groups"] * g["in_per_group"], g["h"], g["w"], dtype=torch.float64)
    kernel = torch.randn(g["groups"] * g["out_per_group"], g["in_per_group"], g["kh"], g["kw"], dtype=torch.float64)
    return (
        x,
        kernel,
        {
            "dilation": g["dilation"],
            "permutation": torch.randperm(g["h"] * g["w"]) if g["shuffled"] else None,
        },
    )


@some_shapes
@given(geometry)
def test_conv_to_fc_equals_convolution(g):
    x, kernel, place = draw(g)
    weight = conv_to_fc(kernel, (g["h"], g["w"]), groups=g["groups"], **place)
    expected = convolve(x, kernel, g, place)
    assert relative(apply_fc(x, weight), expected) < 1e-12


@some_shapes
@given(geometry)
def test_conv_to_fc_equals_convolved_identity(g):
    """Paper's Eq. 12, literally: the columns are the images of the unit maps; the same bits."""
    _, kernel, place = draw(g)
    h, w, channels = g["h"], g["w"], g["in_per_group"]
    weight = conv_to_fc(kernel, (h, w), groups=g["groups"], **place)
    eye = torch.eye(channels * h * w, dtype=torch.float64).view(-1, channels, h, w)
    for group, part in enumerate(kernel.chunk(g["groups"])):
        columns = convolve(eye, part, {"groups": 1}, place)
        assert torch.equal(weight[group], columns.flatten(1).T)


@some_shapes
@given(geometry, st.booleans(), st.booleans())
def test_merge_branches_equals_the_sum_of_parts(g, with_bias, with_norm):
    x, kernel, place = draw(g)
    rows = g["out_per_group"] * g["h"] * g["w"]
    weight = torch.randn(g["groups"], rows, g["in_per_group"] * g["h"] * g["w"], dtype=torch.float64)
    bias = torch.randn(g["groups"], rows, dtype=torch.float64) if with_bias else None
    channels = kernel.shape[0]
    norm = random_norm(channels) if with_norm else None
    point = torch.randn(channels, g["in_per_group"], 1, 1, dtype=torch.float64)
    branches = [
        Branch(kernel, None, random_norm(channels), **place),
        Branch(point, torch.randn(channels, dtype=torch.float64), random_norm(channels)),
    ]
    expected = apply_fc(x, weight, bias)
    expected = expected if norm is None else apply_norm(expected, norm)
    for branch, there in zip(branches, (place, {"dilation": (1, 1), "permutation": None}), strict=True):
        y = convolve(x, branch.kernel, g, there, branch.bias)
        expected = expected + apply_norm(y, branch.norm)
    merged = merge_branches(weight, bias, branches, (g["h"], g["w"]), norm)
    assert relative(apply_fc(x, *merged), expected) < 1e-12
    # the differentiable form gives the same numbers
    weight.requires_grad_()
    for plain, tracked in zip(merged, merge_branches(weight, bias, branches, (g["h"], g["w"]), norm), strict=True):
        assert relative(tracked.detach(), plain) < 1e-15
    assert merge_branches(weight, bias, branches, (g["h"], g["w"]), norm)[0].requires_grad


@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_merge_by_row_blocks_covers_large_maps(dilation, shuffled, transposed):
    """A map of several row blocks: every block boundary has to be met by the diagonals. In place too."""
    h = w = 40
    x = torch.randn(1, 1, h, w, dtype=torch.float64)
    weight = torch.randn(1, h * w, h * w, dtype=torch.float64)
    weight = weight.mT if transposed else weight
    kernel = torch.randn(1, 1, 7, 7, dtype=torch.float64)
    place = {"dilation": (dilation, dilation), "permutation": torch.randperm(h * w) if shuffled else None}
    expected = apply_fc(x, weight) + convolve(x, kernel, {"groups": 1}, place)
    out = weight if not transposed else None
    merged = merge_branches(
        weight, None, [Branch(kernel, dilation=dilation, permutation=place["permutation"])], (h, w), out=out
    )
    assert relative(apply_fc(x, *merged), expected) < 1e-12


def test_merge_rounds_once_to_float32():
    weight = torch.randn(2, 25, 25)
    kernel = torch.randn(2, 1, 3, 3)
    norm = random_norm(2, torch.float32)
    merged, bias = merge_branches(weight, None, [Branch(kernel, None, norm)], (5, 5), norm)
    wide, wide_bias = merge_branches(weight.double(), None, [Branch(kernel.double(), None, norm)], (5, 5), norm)
    assert merged.dtype == bias.dtype == torch.float32
    assert torch.equal(merged, wide.float()) and torch.equal(bias, wide_bias.float())


def test_merge_leaves_its_inputs_alone():
    weight, kernel = torch.randn(1, 9, 9, dtype=torch.float64), torch.randn(1, 1, 3, 3, dtype=torch.float64)
    before = weight.clone()
    merge_branches(weight, None, [Branch(kernel)], (3, 3))
    assert torch.equal(weight, before)


def test_sequences():
    x, kernel = torch.randn(2, 4, 11, dtype=torch.float64), torch.randn(4, 2, 5, dtype=torch.float64)
    weight = conv_to_fc(kernel, (11,), (2,), groups=2)
    expected = F.conv1d(x, kernel, padding=2, groups=2)
    assert relative(apply_fc(x.unsqueeze(2), weight).squeeze(2), expected) < 1e-12
    merged, bias = merge_branches(torch.zeros_like(weight), None, [Branch(kernel)], (11,))
    assert torch.equal(merged, weight) and not bias.any()


def test_dilated_and_shuffled_sequences():
    x, kernel = torch.randn(2, 4, 11, dtype=torch.float64), torch.randn(4, 2, 5, dtype=torch.float64)
    permutation = torch.randperm(11)
    expected = torch.empty_like(x)
    expected[:, :, permutation] = F.conv1d(x[:, :, permutation], kernel, padding=6, dilation=3, groups=2)
    weight = conv_to_fc(kernel, (11,), (6,), groups=2, dilation=3, permutation=permutation)
    assert relative(apply_fc(x.unsqueeze(2), weight).squeeze(2), expected) < 1e-12
    merged = merge_branches(torch.zeros_like(weight), None, [Branch(kernel, None, None, (3,), permutation)], (11,))[0]
    assert torch.equal(merged, weight)


def test_an_even_kernel_that_is_dilated_evenly_has_a_centre():
    """Two taps, two cells apart, are one cell away on either side: padding 1 gives the map back."""
    x, kernel = torch.randn(1, 1, 5, 6, dtype=torch.float64), torch.randn(1, 1, 2, 1, dtype=torch.float64)
    expected = F.conv2d(x, kernel, padding=(1, 0), dilation=2)
    assert relative(apply_fc(x, conv_to_fc(kernel, (5, 6), (1, 0), dilation=2)), expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shuffled", [False, True])
def test_conv_to_fc_keeps_its_bits_in_every_dtype(dtype, shuffled):
    kernel = torch.nn.Parameter(torch.randn(4, 1, 3, 3, dtype=dtype))
    given = {"groups": 2, "permutation": torch.randperm(30) if shuffled else None}
    found = conv_to_fc(kernel, (5, 6), **given)
    assert found.dtype == dtype and torch.equal(found.double(), conv_to_fc(kernel.double(), (5, 6), **given))
    assert torch.equal(conv_to_fc(kernel.detach(), (5, 6), **given), found)


@pytest.mark.parametrize("shuffled", [False, True])
def test_conv_to_fc_under_tracing(shuffled):
    kernel, order = torch.randn(4, 1, 3, 3), torch.randperm(30) if shuffled else None

    def matrix(kernel, order):
        return conv_to_fc(kernel, (5, 6), permutation=order)

    assert torch.equal(torch.compile(matrix, backend="eager")(kernel, order), matrix(kernel, order))
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(order) if shuffled else None
        assert matrix(mode.from_tensor(kernel), fake).shape == (1, 4 * 30, 30)
    assert matrix(kernel.to("meta"), order.to("meta") if shuffled else None).is_meta


@pytest.mark.parametrize("permutation", [None, torch.tensor([5, 2, 11, 0, 1, 8, 9, 3, 4, 10, 7, 6])])
def test_conv_to_fc_is_differentiable_twice(permutation):
    kernel = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)

    def matrix(kernel):
        return conv_to_fc(kernel, (3, 4), groups=2, dilation=2, permutation=permutation)

    assert torch.autograd.gradcheck(matrix, kernel)
    assert torch.autograd.gradgradcheck(matrix, kernel)


def test_merge_is_differentiable_in_everything():
    weight = torch.randn(1, 9, 9, dtype=torch.float64, requires_grad=True)
    kernel = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    gamma = torch.randn(1, dtype=torch.float64, requires_grad=True)

    def merged(weight, kernel, gamma):
        norm = BatchNormStats(torch.ones(1).double(), torch.ones(1).double(), gamma, None, 1e-5)
        return merge_branches(weight, None, [Branch(kernel, None, norm)], (3, 3), norm)

    assert torch.autograd.gradcheck(merged, (weight, kernel, gamma))


def test_fuse_bn_equals_convolution_and_batch_norm():
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    kernel, bias, norm = torch.randn(6, 2, 3, 3).double(), torch.randn(6).double(), random_norm(6)
    expected = apply_norm(F.conv2d(x, kernel, bias, groups=2), norm)
    assert relative(F.conv2d(x, *fuse_bn(kernel, bias, norm), groups=2), expected) < 1e-12


@pytest.mark.parametrize(
    ("kernel", "size", "padding", "groups", "words"),
    [
        ((1, 1, 2, 2), (4, 4), None, 1, "even kernel"),
        ((1, 1, 3, 3), (4, 4), (0, 0), 1, "does not give back a map"),
        ((1, 1, 3, 3), (4,), None, 1, "dimensions"),
        ((3, 1, 3, 3), (4, 4), None, 2, "groups"),
        ((1, 1, 3, 3), (0, 4), None, 1, "positive"),
    ],
)
def test_bad_geometry_is_refused(kernel, size, padding, groups, words):
    with pytest.raises(ValueError, match=words):
        conv_to_fc(torch.zeros(kernel), size, padding, groups)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dilation": 0}, "dilation="),
        ({"dilation": (1, 2, 3)}, "one for each of the 2 sides"),
        ({"dilation": 2, "padding": (1, 1)}, r"kernel \(3, 3\), dilation \(2, 2\) with padding \(1, 1\)"),
        ({"permutation": torch.arange(11)}, "permutation: needs every whole number from 0 to 11 once"),
        ({"permutation": torch.tensor([*range(11), 0])}, "permutation"),
        ({"permutation": torch.arange(12.0)}, "as int64"),
    ],
)
def test_bad_grids_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        conv_to_fc(torch.zeros(1, 1, 3, 3), (3, 4), **given)


def test_bad_merges_are_refused():
    kernel = torch.zeros(2, 1, 3, 3)
    with pytest.raises(ValueError, match="groups"):
        merge_branches(torch.zeros(2, 16, 16), None, [], (4, 4), groups=3)
    with pytest.raises(ValueError, match="does not fit"):
        merge_branches(torch.zeros(1, 16, 16), None, [Branch(kernel)], (4, 4))
    with pytest.raises(ValueError, match="positions"):
        merge_branches(torch.zeros(1, 15, 15), None, [], (4, 4))
    with pytest.raises(ValueError, match="batch norm"):
        merge_branches(torch.zeros(1, 16, 16), None, [], (4, 4), random_norm(3))
    with pytest.raises(ValueError, match="batch norm"):
        fuse_bn(kernel, None, random_norm(3))
