"""Merged networks outside this library: torch.export, ONNX, ONNX Runtime, int8.

What is exported is always a merged copy (RepMLPNet Section 3), so no branch and no batch norm of one is in a file. The
batch size stays free. `onnx`, `onnxscript` and `onnxruntime` are asked for when they are needed: they come with
`pip install 'repmlp[export]'`.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from timm.models.mlp_mixer import MlpMixer
from timm.utils import reparameterize_model
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from repmlp.cost import dtype_of
from repmlp.imports import need
from repmlp.models.repmlp_pure import PureMLP
from repmlp.models.repmlp_resnet import RepMLPResNet
from repmlp.models.repmlpnet import RepMLPNet
from repmlp.sizes import height_width

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

INPUT, OUTPUT, BATCH = "images", "logits", "batch"  # names in an ONNX file
OPSET_MIN = 18  # the oldest in which torch writes what torch.export traced
PRODUCTS = ("Conv", "Gemm", "MatMul")  # ONNX operators with weights: what is quantised
ONNX_LIMIT = 2**31  # bytes that one protobuf file can hold


class Quantised(NamedTuple):
    """How many nodes of a kind compute in int8, by the scales of their weights, and how many were left in float32."""

    per_channel: dict[str, int]
    per_tensor: dict[str, int]
    left: dict[str, int]

    def __str__(self) -> str:
        kinds = (
            ("in int8 with a scale for each output channel", self.per_channel),
            ("in int8 with one scale for the whole weight", self.per_tensor),
            ("left in float32", self.left),
        )
        said = (", ".join(f"{n} {op}" for op, n in sorted(nodes.items())) + f" {how}" for how, nodes in kinds if nodes)
        return "; ".join(said) or "nothing to quantise"


def image_size(model: nn.Module, config: Mapping[str, Any] | None = None) -> tuple[int, int]:
    """Return the size (height, width) in pixels of the images that a network is made for.

    config: of the network, which tells for models of timm that take any size; without it, timm's own setting.
    Raises ValueError where neither tells.
    """
    if isinstance(model, (RepMLPNet, RepMLPResNet, PureMLP)):
        return model.img_size
    if isinstance(model, MlpMixer):
        return model.stem.img_size
    if side := (config or {}).get("img_size"):
        return height_width(side)
    if cfg := getattr(model, "pretrained_cfg", None):
        return tuple(cfg["input_size"][-2:])
    raise ValueError(f"{type(model).__name__} does not tell the size of its images: give img_size")


def to_exported_program(model: nn.Module, img_size: int | tuple[int, int], in_chans: int = 3) -> ExportedProgram:
    """Merge a copy of a network and trace it with torch.export, the batch size free.

    model: in evaluation mode, of any floating-point dtype, which its images then have too; its branches are merged by
        timm's reparameterize_model, if it has any left.
    img_size: side of the images in pixels, or (height, width).
    in_chans: channels of the images.
    Raises ValueError in training mode.

    >>> program = to_exported_program(net, 224)
    >>> torch.export.save(program, "model.pt2")
    >>> torch.export.load("model.pt2").module()(images)
    """
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() before exporting it")
    height, width = height_width(img_size)
    device = next(model.parameters()).device
    # two: a batch of one would be taken for a constant
    images = torch.zeros(2, in_chans, height, width, device=device, dtype=dtype_of(model))
    with torch.no_grad():
        return torch.export.export(
            reparameterize_model(model), (images,), dynamic_shapes=({0: Dim(BATCH, min=1)},), strict=False
        )


def to_onnx(program: ExportedProgram, path: Path | str, opset: int | None = None) -> None:
    """Write a traced network as one ONNX file, input "images" (batch, C, H, W), output "logits" (batch, num_classes).

    program: from to_exported_program.
    path: of the file.
    opset: version of ONNX's operators, for what is to read the file; None for torch's own choice.
    Raises ModuleNotFoundError where a package is missing; ValueError for 2 GB or more, which one file cannot hold, and
    for an opset that the network cannot be written in.
    """
    if opset is not None and (isinstance(opset, bool) or not isinstance(opset, int) or opset < OPSET_MIN):
        raise ValueError(
            f"opset={opset!r}: use a whole number >= {OPSET_MIN}, or None for torch's own choice; older ones can be "
            "written by torch.onnx.export(deploy(model), images, path, dynamo=False, opset_version=...)"
        )
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    if size >= ONNX_LIMIT:
        raise ValueError(
            f"the weights take {size / 1e9:.1f} GB, one ONNX file holds less than 2.1 GB: use torch.export"
        )
    need("export", "onnx", "onnxscript")
    import onnx

    if opset is not None and opset > onnx.defs.onnx_opset_version():
        raise ValueError(f"opset={opset}: the installed onnx knows no newer than {onnx.defs.onnx_opset_version()}")
    written = torch.onnx.export(
        program,
        dynamo=True,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: BATCH},),  # the name of the axis; that its size is free stands in the program
        opset_version=opset,
        optimize=True,
        verbose=False,
    )
    found = written.model.opset_imports.get("")
    if opset is not None and found != opset:
        raise ValueError(f"opset={opset}: torch can write this network in opset {found}, not in that one")
    written.save(str(path), external_data=False)


def onnx_session(path: Path | str, threads: int | None = None) -> InferenceSession:
    """Open an ONNX file in ONNX Runtime, on the CPU.

    threads: of one operator; None for torch's number.
    Raises FileNotFoundError, ModuleNotFoundError, or ValueError where the file is no model that ONNX Runtime can run,
    or one that takes batches of one size only.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no ONNX file at {path}")
    need("export", "onnx", "onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3  # errors: its warnings are of nodes that it leaves unoptimised
    if products_saturate():
        options.add_session_config_entry("session.x64quantprecision", "1")  # a slower way that is exact
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class
        raise ValueError(f"ONNX Runtime cannot open {path}: {' '.join(str(error).split())}") from error
    if isinstance(batch := session.get_inputs()[0].shape[0], int):
        raise ValueError(f"{path} takes batches of {batch} only: export it with a free batch size")
    return session


@functools.cache
def products_saturate() -> bool:
    """Say whether ONNX Runtime's products of uint8 and int8 are wrong on this processor, by doing one.

    On x86 without VNNI they add two products in 16 bits, which is too few. Taking the exact way everywhere costs half
    the speed of int8 on processors with AMX, so it is taken where it is needed.
    """
    import onnxruntime
    from onnx import TensorProto, helper

    depth = 64
    x, out = (
        helper.make_tensor_value_info(name, kind, [1, depth])
        for name, kind in (("x", TensorProto.UINT8), ("out", TensorProto.INT32))
    )
    largest = helper.make_tensor("weight", TensorProto.INT8, [depth, depth], [127] * depth**2)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "weight"], ["out"])], "one", [x], [out], [largest]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET_MIN)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": np.full((1, depth), 255, np.uint8)})[0]
    return bool((found != depth * 255 * 127).any())


def run_onnx(session: InferenceSession, images: Tensor) -> Tensor:
    """Run a session on a batch: (B, C, H, W), any dtype and device -> (B, num_classes) float32 on the CPU."""
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.float().cpu().numpy()})[0])


@torch.no_grad()
def quantize_int8(path: Path | str, out: Path | str, calibration: Iterable[Tensor]) -> Quantised:
    """Quantise an ONNX file to int8 after training: static, with QuantizeLinear and DequantizeLinear nodes (QDQ).

    Products with weights (Conv, Gemm, MatMul) are quantised, input, weight and output; what lies between them stays
    float32: norms, activations and sums of residuals in int8 about doubled the error of small nets on CIFAR-100.
    Weights are symmetric int8 with a scale for each output channel, inputs uint8 between the smallest and the
    largest value in calibration. The set-sharing FC is a MatMul with a (S, h*w, h*w) weight, for which ONNX has no
    scales by set and column and ONNX Runtime takes the wrong axis (it then refuses to run): it has one scale.

    calibration: batches (B, C, H, W) of *training* images as the network sees them in evaluation; a few hundred images.
    Returns how many nodes were quantised. Raises ModuleNotFoundError; ValueError without calibration images.
    """
    need("export", "onnx", "onnxruntime")
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    batches = iter(calibration)
    first = next(batches, None)
    if first is None:
        raise ValueError("there are no calibration images: a few hundred training images are needed")

    class Reader(CalibrationDataReader):
        def __init__(self, name: str):
            self.feeds = ({name: batch.float().cpu().numpy()} for batch in itertools.chain([first], batches))

        def get_next(self) -> dict | None:
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        # Constants are folded; the shapes, which torch wrote already, are not inferred anew.
        quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
        graph = onnx.load(prepared).graph
        ranks = {weight.name: len(weight.dims) for weight in graph.initializer}
        stacks = {n.input[1] for n in graph.node if n.op_type == "MatMul" and ranks.get(n.input[1], 2) != 2}
        quantize_static(
            str(prepared),
            str(out),
            Reader(graph.input[0].name),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(PRODUCTS),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={
                "TensorQuantOverrides": {w: [{"quant_type": QuantType.QInt8, "symmetric": True}] for w in stacks}
            },
        )
    return count_quantised(out)


def count_quantised(path: Path | str) -> Quantised:
    """Count the nodes of an ONNX file whose input and weight are dequantised from int8, by kind; see Quantised."""
    need("export", "onnx")
    import onnx

    graph = onnx.load(path).graph
    sizes = {tensor.name: tensor.dims for tensor in graph.initializer}
    scales = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "DequantizeLinear"}
    counts = Quantised(Counter(), Counter(), Counter())
    for node in graph.node:
        if node.op_type not in PRODUCTS:
            continue
        if not all(name in scales for name in node.input[:2]):
            kind = counts.left
        else:
            kind = counts.per_channel if list(sizes[scales[node.input[1]]]) not in ([], [1]) else counts.per_tensor
        kind[node.op_type] += 1
    return Quantised(*map(dict, counts))
