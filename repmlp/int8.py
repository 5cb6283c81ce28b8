"""int8 without calibration: an ONNX file whose products take whole numbers, activations scaled as they come.

Each product with a weight (the set-sharing FCs, the layers of the FFN and of the Global Perceptron, the classifier) has
a weight in int8 with a scale for each output: for each row of each FC3 matrix, for each channel elsewhere. Its input is
cut to uint8 between its smallest and its largest value, found anew for each batch, so no images are needed beforehand
(repmlp.export.quantize_int8 takes them). What lies between the products stays float32, and so do convolutions, here a
few embeddings: ONNX Runtime has no quick product for them without scales that are known beforehand.

The file holds ONNX's own operators (DynamicQuantizeLinear, MatMulInteger); ONNX Runtime fuses them. The scale of an
activation is that of the whole batch, so the logits of an image depend a little on the images beside it.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from repmlp.export import PRODUCTS, Quantised
from repmlp.imports import need

if TYPE_CHECKING:
    import onnx

LARGEST = 127  # of an int8 weight: -128 is left out, so that the scale is the same on both sides


def quantize_dynamic(path: Path | str, out: Path | str) -> Quantised:
    """Write an ONNX file anew with its products in int8, the scales of activations found as they come.

    path: of a file of float32, from `repmlp.export.to_onnx`; best of the deployed form, which has no batch norms.
    out: of the file that is written.
    Returns how many nodes were quantised, by kind. Raises ModuleNotFoundError where a package is missing; ValueError
    for weights that are no finite numbers.

    >>> to_onnx(to_exported_program(repmlp.deploy(net), 224), "model.onnx")
    >>> print(quantize_dynamic("model.onnx", "int8.onnx"))
    >>> logits = run_onnx(onnx_session("int8.onnx"), images)  # (N, 3, 224, 224) -> (N, 1000)
    """
    need("export", "onnx", "onnxruntime")
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        # constants are folded, so that a weight is one; the shapes, which torch wrote already, are not inferred anew
        quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        model = onnx.load(prepared)
    writer = _Writer(model.graph)
    for node in list(model.graph.node):
        writer.take(node)
    writer.finish()
    onnx.checker.check_model(model)
    onnx.save(model, str(out))
    return Quantised(dict(writer.quantised), {}, dict(writer.left))


def rounded_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round a weight (..., K, M) to int8 with a scale for each output m: returns int8 (..., K, M), scales (..., 1, M).

    |weight - rounded * scales| is at most half a scale; an output of zeros has the scale 1.
    """
    scales = np.abs(weight).max(axis=-2, keepdims=True) / LARGEST
    scales = np.where(scales == 0, 1, scales).astype(np.float32)
    return np.rint(weight / scales).clip(-LARGEST, LARGEST).astype(np.int8), scales


class _Writer:
    """Takes the nodes of a graph one by one and writes them anew, products with constant weights in int8."""

    def __init__(self, graph: onnx.GraphProto):
        import onnx

        self.onnx, self.graph = onnx, graph
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.ranks = {
            value.name: len(value.type.tensor_type.shape.dim)
            for value in (*graph.value_info, *graph.input)
            if value.type.tensor_type.HasField("shape")
        }
        self.nodes: list[onnx.NodeProto] = []
        self.made: set[str] = set()  # values that several products share: an input once in uint8, once transposed
        self.quantised: Counter[str] = Counter()
        self.left: Counter[str] = Counter()

    def take(self, node: onnx.NodeProto) -> None:
        """Write a node, in int8 where it is a product with a weight that is laid out as this can read."""
        found = self._product(node)
        if found is None:
            if node.op_type in PRODUCTS:
                self.left[node.op_type] += 1
            self.nodes.append(node)
            return
        x, weight, bias, swapped = found
        if not np.isfinite(weight).all():
            raise ValueError(f"{node.name}: its weights are no finite numbers, and have no scales")
        out = node.output[0]
        product = out if bias is None and not swapped else f"{out}_product"
        if swapped:
            x = self._once("Transpose", x, f"{x}_swapped", perm=self._swap(x))
        whole, scales = rounded_rows(weight)
        self._constant(f"{out}_weight", whole)
        self._constant(f"{out}_zero", np.zeros((), np.int8))
        # (..., 1, M) beside (..., K, M); (M,) is what ONNX Runtime fuses for a single matrix
        self._constant(f"{out}_scales", scales if weight.ndim > 2 else scales[0])
        self._once("DynamicQuantizeLinear", x, f"{x}_uint8", f"{x}_scale", f"{x}_zero")
        self._node("MatMulInteger", [f"{x}_uint8", f"{out}_weight", f"{x}_zero", f"{out}_zero"], [f"{out}_int32"])
        self._node("Cast", [f"{out}_int32"], [f"{out}_float"], to=self.onnx.TensorProto.FLOAT)
        self._node("Mul", [f"{x}_scale", f"{out}_scales"], [f"{out}_both_scales"])
        self._node("Mul", [f"{out}_float", f"{out}_both_scales"], [product])
        if bias is not None:
            self._node("Add", [product, bias], [out])
        elif swapped:
            self._node("Transpose", [product], [out], perm=self._swap(node.input[1]))
        self.quantised[node.op_type] += 1

    def finish(self) -> None:
        """Put the nodes into the graph, and leave out the weights that nothing reads any more."""
        used = {name for node in self.nodes for name in node.input} | {value.name for value in self.graph.output}
        kept = [tensor for tensor in self.weights.values() if tensor.name in used]
        for old, new in ((self.graph.node, self.nodes), (self.graph.initializer, kept)):
            del old[:]
            old.extend(new)

    def _product(self, node: onnx.NodeProto) -> tuple[str, np.ndarray, str | None, bool] | None:
        """Return input, weight (..., K, M), bias and whether the weight stood on the left; None for another node."""
        inputs, get = list(node.input), self.onnx.helper.get_attribute_value
        if node.op_type == "Gemm" and inputs[1] in self.weights:
            how = {attribute.name: get(attribute) for attribute in node.attribute}
            if how.get("alpha", 1) != 1 or how.get("beta", 1) != 1 or how.get("transA", 0):
                return None
            weight = self._values(inputs[1])
            bias = inputs[2] if len(inputs) > 2 and inputs[2] else None
            return inputs[0], weight.T if how.get("transB", 0) else weight, bias, False
        if node.op_type == "MatMul" and inputs[1] in self.weights:
            weight = self._values(inputs[1])
            return (inputs[0], weight, None, False) if weight.ndim >= 2 else None
        if node.op_type == "MatMul" and inputs[0] in self.weights and self.ranks.get(inputs[1], 0) >= 2:
            weight = self._values(inputs[0])
            # W x is (x^T W^T)^T
            return (inputs[1], weight.T, None, True) if weight.ndim == 2 else None
        return None

    def _swap(self, name: str) -> list[int]:
        """Return the order of axes in which the last two change places."""
        *front, rows, columns = range(self.ranks[name])
        return [*front, columns, rows]

    def _values(self, name: str) -> np.ndarray:
        return self.onnx.numpy_helper.to_array(self.weights[name])

    def _constant(self, name: str, values: np.ndarray) -> None:
        self.weights[name] = self.onnx.numpy_helper.from_array(np.ascontiguousarray(values), name)

    def _node(self, kind: str, inputs: list[str], outputs: list[str], **attributes: object) -> None:
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, outputs, name=f"{outputs[0]}_node", **attributes))

    def _once(self, kind: str, source: str, *outputs: str, **attributes: object) -> str:
        """Write a node of one input unless it is there; returns the name of its first output."""
        if outputs[0] not in self.made:
            self._node(kind, [source], list(outputs), **attributes)
            self.made.add(outputs[0])
        return outputs[0]
