"""Fold every batch norm of a convolutional network into the convolution before it.

Papers count and time their networks in this form ("conv-BN fused"; RepMLP Section 4.2). `timm.utils` merges RepMLP
blocks alone, which have a reparameterize(); ResNets, their heads and the nets of this library are folded here.
"""

from __future__ import annotations

import torch
from torch import nn

from repmlp.parameters import batch_norm_stats, check_parameters, is_batch_norm
from repmlp.reparam import fuse_bn


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode without batch norms: blocks merged, convolutions with biases in their place.

    A batch norm belongs to the convolution before it in an nn.Sequential, and `bn2` to the `conv2` beside it, as timm's
    ResNets name them. It becomes an Identity, so that names and shapes of all other tensors stay. Float64 arithmetic,
    rounded once to the dtype of the convolution.
    Raises RuntimeError in training mode, ValueError where a batch norm has no such convolution.
    """
    from timm.utils import reparameterize_model  # not above, see repmlp.imports

    if model.training:
        raise RuntimeError("the model is in training mode: call model.eval() before folding its batch norms")
    model = reparameterize_model(nn.ModuleList([model]))  # timm visits children only
    for parent in model.modules():
        for conv_path, norm_name in _pairs(parent):
            _fold(parent.get_submodule(conv_path), getattr(parent, norm_name))
            setattr(parent, norm_name, nn.Identity())
    left = [name.partition(".")[2] for name, module in model.named_modules() if is_batch_norm(module)]
    if left:
        raise ValueError(f"the batch norm {left[0]} stands behind no convolution, so that it cannot be folded")
    return model[0]


def _pairs(parent: nn.Module) -> list[tuple[str, str]]:
    """Return (path of a convolution, name of the batch norm behind it) among the children of a module."""
    children = list(parent.named_children())
    pairs = []
    for name, norm in children:
        if not is_batch_norm(norm):
            continue
        if isinstance(parent, nn.Sequential):
            at = [child for child, _ in children].index(name)
            before = children[at - 1][0] if at else ""
        else:
            before = name.replace("bn", "conv", 1) if name.startswith("bn") else ""
        conv = dict(children).get(before)
        if isinstance(conv, nn.Sequential) and len(conv):  # a stem of several convolutions
            before, conv = f"{before}.{len(conv) - 1}", conv[-1]
        if isinstance(conv, nn.Conv2d):
            pairs.append((before, name))
    return pairs


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: nn.Module) -> None:
    """Put a batch norm into weight and bias of a convolution, in place."""
    check_parameters(conv)
    weight, bias = fuse_bn(conv.weight, conv.bias, batch_norm_stats(norm), torch.float64)
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)
