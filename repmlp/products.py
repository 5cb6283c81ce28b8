"""Matrix products over rows in two ways of the same numbers: a linear layer, or a 1x1 convolution.

torch multiplies float32 matrices on a CPU with MKL, which leaves AVX-512 unused on AMD's processors, and convolves with
oneDNN, which uses it: there a 1x1 convolution is the same product, up to twice as fast. On Intel's both are as fast.
16-bit products are oneDNN's either way. Which one a layer takes changes the rounding of its output alone.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repmlp.processor import PRODUCTS, is_amd
from repmlp.tracing import recorded

# Images that the rows are laid out as. A single thread, torch leaves 1x1 convolutions of fewer images to MKL.
IMAGES = 16
Model = TypeVar("Model", bound=nn.Module)


def usual_product() -> str:
    """Return the product that suits this machine: "convolution" on AMD's processors with AVX-512."""
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return "convolution" if wide and onednn and is_amd() else "linear"


def products_by(model: Model, products: str) -> Model:
    """Choose how the layers of a whole model that know both ways multiply on a CPU; returns the model.

    These are the set-sharing FCs and the FFNs of RepMLPNet. Outputs and gradients are the same but for rounding. What
    records the model (torch.compile, torch.export, a trace, TorchScript) sees linear layers whatever was chosen.

    products: "linear", which a model has when it is built, or "convolution"; see usual_product.
    Raises ValueError for another word.
    """
    check_products(products)
    for module in model.modules():
        if hasattr(module, "products"):
            module.products = products
    return model


def check_products(products: str) -> None:
    """Raise ValueError for what is no way to multiply."""
    if products not in PRODUCTS:
        raise ValueError(f"products={products!r}: use {' or '.join(PRODUCTS)}")


def by_convolution(products: str, x: Tensor) -> bool:
    """Say whether a layer that was told a way takes the convolution for this input."""
    return (
        products == "convolution"
        and not recorded(x)
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
    )


def convolved(rows: Tensor, weight: Tensor) -> Tensor:
    """Multiply as a 1x1 convolution of channels-last images: (P, I) x (O, I) -> (P, O), as F.linear does."""
    (p, i), o = rows.shape, weight.shape[0]
    n = IMAGES if p % IMAGES == 0 else 1
    # (P, I) -> (N, I, 1, P/N), channels-last in memory -> (N, O, 1, P/N) -> (P, O)
    images = rows.reshape(n, 1, p // n, i).permute(0, 3, 1, 2)
    return F.conv2d(images, weight.view(o, i, 1, 1)).permute(0, 2, 3, 1).reshape(p, o)


def bare(layer: nn.Module) -> bool:
    """Say whether a linear layer is torch's own and nothing hangs on its call (hooks, pruning), so that its weight is
    all there is to it.
    """
    return type(layer) is nn.Linear and not layer._forward_hooks and not layer._forward_pre_hooks
