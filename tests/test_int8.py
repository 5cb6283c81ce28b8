"""int8 with scales found as activations come: against whole numbers multiplied by numpy, and the float32 net."""

import platform
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import randomise_norms
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from repmlp import RepMLPNet, deploy
from repmlp.export import count_quantised, onnx_session, products_saturate, run_onnx, to_exported_program, to_onnx
from repmlp.int8 import quantize_dynamic, rounded_rows
from repmlp.models.mixers import build_resmlp


def write(path: Path, node: onnx.NodeProto, shape: tuple, weight: np.ndarray, **more: np.ndarray) -> None:
    """Write a file of one product of an input x and a constant w."""
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape[1:]])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    tensors = [numpy_helper.from_array(array, name) for name, array in {"w": weight, **more}.items()]
    graph = helper.make_graph([node], "product", values, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)


def by_hand(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x (..., N, K) times weight (..., K, M), both cut to whole numbers, in float64."""
    low, high = min(x.min(), 0), max(x.max(), 0)
    scale = np.float32(high - low) / np.float32(255) or 1
    zero = np.rint(np.clip(-low / scale, 0, 255))
    whole = np.clip(np.rint(x / scale) + zero, 0, 255) - zero
    scales = np.abs(weight).max(axis=-2, keepdims=True) / np.float32(127)
    return whole.astype(np.float64) @ np.rint(weight / scales) * scales * scale


PRODUCTS = {  # name: node, shape of x, shape of the weight as (..., K, M), how it is laid out in the file
    "share-sets": (helper.make_node("MatMul", ["x", "w"], ["y"]), (2, 5, 9), (2, 9, 9), lambda w: w),
    "matrix": (helper.make_node("MatMul", ["x", "w"], ["y"]), (2, 5, 9), (9, 4), lambda w: w),
    "on the left": (helper.make_node("MatMul", ["w", "x"], ["y"]), (2, 9, 5), (9, 4), lambda w: w.T.copy()),
    "linear": (helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1), (6, 9), (9, 4), lambda w: w.T.copy()),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_those_of_whole_numbers(name, tmp_path):
    node, shape, weight_shape, layout = PRODUCTS[name]
    rng = np.random.default_rng(0)
    x, weight = (rng.standard_normal(s).astype(np.float32) for s in (shape, weight_shape))
    bias = rng.standard_normal(4).astype(np.float32)
    write(tmp_path / "one.onnx", node, shape, layout(weight), **({"b": bias} if node.op_type == "Gemm" else {}))
    counts = quantize_dynamic(tmp_path / "one.onnx", tmp_path / "int8.onnx")
    assert counts.per_channel == {node.op_type: 1} and not counts.per_tensor and not counts.left
    found = run_onnx(onnx_session(tmp_path / "int8.onnx", 1), torch.from_numpy(x)).numpy()
    if name == "on the left":
        expected = by_hand(x.swapaxes(1, 2), weight).swapaxes(1, 2)
    else:
        expected = by_hand(x, weight) + (bias if node.op_type == "Gemm" else 0)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()


@given(
    st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.floats(1e-6, 1e6), st.booleans(), st.integers(0, 2**16)
)
def test_rounding_is_half_a_scale_of_its_own_row(sets, k, m, size, zero, seed):
    weight = np.random.default_rng(seed).standard_normal((sets, k, m)).astype(np.float32)
    weight[0, :, 0] *= 0 if zero else size  # a row apart
    whole, scales = rounded_rows(weight)
    assert whole.dtype == np.int8 and whole.shape == weight.shape and scales.shape == (sets, 1, m)
    assert (np.abs(weight - whole.astype(np.float64) * scales) <= scales * (0.5 + 1e-4)).all()
    expected = np.abs(weight).max(axis=1, keepdims=True) / 127
    assert np.allclose(scales, np.where(expected == 0, 1, expected), rtol=1e-6)


@pytest.fixture(scope="module")
def net() -> RepMLPNet:
    torch.manual_seed(0)
    net = RepMLPNet(channels=(16, 32), blocks=(1, 1), share_sets=(4, 8), num_classes=10)
    with torch.no_grad():
        randomise_norms(net)
        net.stages[0][0].block.channel_perceptron.weight[1, 3] *= 300  # one row of one set is far larger
    return net.eval()


@torch.no_grad()
def test_deployed_net_in_int8(net, tmp_path):
    deployed = deploy(net)
    to_onnx(to_exported_program(deployed, 32), tmp_path / "model.onnx")
    counts = quantize_dynamic(tmp_path / "model.onnx", tmp_path / "int8.onnx")
    # a unit: FC3, two layers of the FFN, two of the Global Perceptron; the classifier; stem and down-sampling stay
    assert sum(counts.per_channel.values()) == 11 and not counts.per_tensor and counts.left == {"Conv": 2}
    assert sum(count_quantised(tmp_path / "model.onnx").left.values()) == 13
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    matrices = [deployed.stages[i][0].weight.transpose(1, 2).numpy() for i in (0, 1)]
    stacks = [
        (w, tensors[n.removesuffix("_weight") + "_scales"])
        for n, w in tensors.items()
        if w.ndim == 3 and w.dtype == np.int8
    ]
    assert len(stacks) == 2
    for (whole, scales), weight in zip(stacks, matrices, strict=True):
        assert scales.shape == (weight.shape[0], 1, weight.shape[2]), "a scale for each row of each FC3 matrix"
        assert np.abs(whole * scales - weight).max() <= 0.51 * scales.max()
        assert (np.abs(whole).max(axis=1) == 127).all(), "no row is spoilt by another"
    images = torch.randn(20, 3, 32, 32)
    expected, found = deployed(images), run_onnx(onnx_session(tmp_path / "int8.onnx", 1), images)
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert (tmp_path / "int8.onnx").stat().st_size < 0.4 * (tmp_path / "model.onnx").stat().st_size
    assert run_onnx(onnx_session(tmp_path / "int8.onnx", 1), images[:3]).shape == (3, 10)


@torch.no_grad()
def test_a_net_whose_weights_stand_on_the_left(tmp_path):
    """ResMLP multiplies positions from the left; all but the patch embedding is quantised there too."""
    net = build_resmlp(32, 2, 1, 8, init_std=0.3, num_classes=10).eval()
    to_onnx(to_exported_program(net, 32), tmp_path / "model.onnx")
    counts = quantize_dynamic(tmp_path / "model.onnx", tmp_path / "int8.onnx")
    assert counts.left == {"Conv": 1} and sum(counts.per_channel.values()) == 4
    images = torch.randn(8, 3, 32, 32)
    found = run_onnx(onnx_session(tmp_path / "int8.onnx", 1), images)
    assert (found - net(images)).norm() < 0.05 * net(images).norm()


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    weight = np.full((9, 4), np.nan, np.float32)
    write(tmp_path / "one.onnx", helper.make_node("MatMul", ["x", "w"], ["y"], name="fc"), (2, 5, 9), weight)
    with pytest.raises(ValueError, match="fc: its weights are no finite numbers"):
        quantize_dynamic(tmp_path / "one.onnx", tmp_path / "int8.onnx")
    assert not (tmp_path / "int8.onnx").exists()


@pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64", reason="Linux on x86 lists what the processor has"
)
def test_products_saturate_on_processors_without_vnni_alone():
    flags = Path("/proc/cpuinfo").read_text().split()
    assert products_saturate() == (not {"avx512_vnni", "avx_vnni"} & set(flags))
