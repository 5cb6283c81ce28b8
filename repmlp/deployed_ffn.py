"""The FFN of the form for inference, with its residual, in the way that is quickest where it runs.

Paper: RepMLPNet Section 4. Maps are contiguous (N, C, H*W), so the weights stand on the left of the products.
"""

from __future__ import annotations

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor

from repmlp.processor import PRODUCTS
from repmlp.products import by_convolution
from repmlp.tracing import plain

# Bytes of the hidden maps of an FFN that are held at once on a CPU; convolutions write them in new memory each time
_HIDDEN_BYTES, _CONVOLVED_BYTES = 2**24, 2**22
_CONVOLVED_MACS = 2**25  # multiply-accumulates from which an FFN's product is worth what a convolution does besides


@torch.fx.wrap
def ffn_with_residual(
    x: Tensor, first: Tensor, first_bias: Tensor, second: Tensor, products: str = PRODUCTS[0]
) -> Tensor:
    """Return x + FFN(x): (N, C, H*W) -> (N, C, H*W); the residual is what the second product is added to.

    first: (4C, C). first_bias: (4C, 1). second: (C, 4C). products: see repmlp.products.
    """
    n = x.shape[0]
    if not torch.jit.is_scripting():
        if torch.jit.is_tracing() or torch.compiler.is_exporting():
            # (N, C, H*W) -> (N, H*W, C): a weight on the right stays a constant of the file, and one product; on the
            # left, ONNX would have a copy of it for every image
            hidden = F.gelu(F.linear(x.transpose(1, 2), first, first_bias.squeeze(1)))
            return x + F.linear(hidden, second).transpose(1, 2)
        if x.device.type == "cpu" and plain(x, first, first_bias, second):
            if by_convolution(products, x) and n * x.shape[2] * first.numel() >= _CONVOLVED_MACS:
                return _ffn_by_convolution(x, first, first_bias, second)
            at_once = _images_at_once(x, first, _HIDDEN_BYTES)
            if at_once < n:
                return _ffn_by_parts(x, first, first_bias, second, at_once)
    hidden = F.gelu(torch.baddbmm(first_bias, first.expand(n, -1, -1), x))
    return torch.baddbmm(x, second.expand(n, -1, -1), hidden)


def _images_at_once(x: Tensor, first: Tensor, limit: int) -> int:
    """Return of how many images the FFN's hidden maps take at most `limit` bytes, at least one."""
    return max(1, limit // (first.shape[0] * x.shape[2] * x.element_size()))


def _ffn_by_parts(x: Tensor, first: Tensor, first_bias: Tensor, second: Tensor, at_once: int) -> Tensor:
    """As ffn_with_residual, a few images at a time through one buffer that stays in the cache.

    Up to twice as fast on large maps.
    """
    out = torch.empty_like(x)
    buffer = x.new_empty(at_once, first.shape[0], x.shape[2])
    for start in range(0, x.shape[0], at_once):
        part = x[start : start + at_once]
        hidden = buffer[: len(part)]
        torch.baddbmm(first_bias, first.expand(len(part), -1, -1), part, out=hidden)
        torch.ops.aten.gelu_(hidden)
        torch.baddbmm(part, second.expand(len(part), -1, -1), hidden, out=out[start : start + at_once])
    return out


def _ffn_by_convolution(x: Tensor, first: Tensor, first_bias: Tensor, second: Tensor) -> Tensor:
    """As ffn_with_residual, with 1x1 convolutions, a few images at a time whose hidden maps stay in the cache."""
    out = torch.empty_like(x)
    at_once = _images_at_once(x, first, _CONVOLVED_BYTES)
    first, bias, second = first[:, :, None, None], first_bias.flatten(), second[:, :, None, None]
    for start in range(0, x.shape[0], at_once):
        part = x[start : start + at_once].unsqueeze(2)  # (n, C, 1, H*W)
        hidden = F.conv2d(part, first, bias)
        torch.ops.aten.gelu_(hidden)
        torch.add(part, F.conv2d(hidden, second), out=out[start : start + at_once].unsqueeze(2))
    return out
