"""What a model costs: learnable parameters and multiply-accumulates.

The papers call multiply-accumulates (MACs) "FLOPs". torch counts two floating-point operations a MAC.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from repmlp.local_perceptron import LocalPerceptron
from repmlp.sizes import height_width

BATCH_NORMS = (torch.ops.aten._native_batch_norm_legit_no_training, torch.ops.aten.native_batch_norm)


class _Counter(TorchDispatchMode):
    """Adds up what torch's table of operations says of each operation, as its FlopCounterMode does in thrice the time.

    On the meta device a batch norm is some dozens of operations in Python, none of which counts: here its output is
    made at once.
    """

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, kind = kwargs or {}, func._overloadpacket
        if kind in BATCH_NORMS and args[0].is_meta and not kwargs:
            statistics = args[0].new_empty(0)
            return torch.empty_like(args[0]), statistics, statistics
        out = func(*args, **kwargs)
        if kind in flop_registry:
            self.flops += flop_registry[kind](*args, **kwargs, out_val=out)
        return out


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of the images that a network takes: that of its first floating-point parameter, or float32."""
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(dtypes, torch.float32)


def count_params(model: nn.Module) -> int:
    """Count the learnable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def count_params_paper(model: nn.Module) -> int:
    """Count the parameters by the rule that RepMLPNet's Table 5 uses for ResMLP.

    There a branch's batch norm counts four numbers a channel (its running mean and variance too), which gives the
    printed +60, +156 and +216; the table's RepMLPNet rows, +720, +2640 and +3360, count two.
    """
    buffers = 0
    for module in model.modules():
        if isinstance(module, LocalPerceptron):
            buffers += sum(norm.running_mean.numel() + norm.running_var.numel() for norm in module.norms.values())
    return count_params(model) + buffers


def count_params_layers(model: nn.Module) -> int:
    """Count the learnable parameters but for those of norms, the rule of RepMLPNet's Table 2 (there of merged nets)."""
    norms = [m for m in model.modules() if isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm))]
    return count_params(model) - sum(count_params(norm) for norm in norms)


def count_macs(model: nn.Module, img_size: int | tuple[int, int], in_chans: int = 3) -> int:
    """Count the multiply-accumulates of one image of `img_size` pixels, in evaluation mode.

    Convolutions and matrix products only, as in the papers. Works on the meta device: nothing is computed.

    model: any nn.Module, of any floating-point dtype; left as it is.
    img_size: side of the image in pixels, or (height, width).
    in_chans: channels of the image.

    >>> count_macs(repmlp.RepMLPNet(kernels=()), 32)
    468329472

    Raises ValueError for a network that takes images of another size only.
    """
    height, width = height_width(img_size)
    tensors = (*model.parameters(), *model.buffers())
    if not all(t.is_meta for t in tensors) or any(m.training for m in model.modules()):
        model = copy.deepcopy(model).to("meta").eval()
    with torch.no_grad(), _Counter() as counter:
        try:
            model(torch.empty(1, in_chans, height, width, device="meta", dtype=dtype_of(model)))
        except AssertionError as error:  # timm's networks with one size of images
            raise ValueError(f"{type(model).__name__} takes no images of {height}x{width} pixels: {error}") from error
    return counter.flops // 2
