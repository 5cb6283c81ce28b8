"""What layers ask of those who record a network instead of running it: torch.jit, torch.fx, torch.compile, torch.func.

A way through a layer that is chosen by the numbers of one input (how many images, how large a map) is right for that
input only. So the choice stands in a function that torch.fx keeps as a call (`torch.fx.wrap`) and that TorchScript
compiles with its conditions; and a way that exists for speed alone is taken only where `plain` says so.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, get_type_hints

import torch
import torch.autograd.forward_ad
import torch.fx
from torch import Tensor, nn

Forward = TypeVar("Forward", bound=Callable)


def _private(path: str) -> Any:
    """Return what torch has under a private name, "torch.MODULE.NAME": there is no public one for it.

    Raises ImportError, so that another torch ends the import with one line and not some forward pass with a riddle.
    """
    try:
        return functools.reduce(getattr, path.split(".")[1:], torch)
    except AttributeError:
        raise ImportError(
            f"repmlp asks torch for {path}, which torch {torch.__version__} does not have: "
            "use a torch between 2.8 and the newest that this repmlp was released with, or a newer repmlp"
        ) from None


# whether a transform of torch.func (vmap, jvp, jacrev, ...) runs this code; None outside of all
peek_interpreter_stack = _private("torch._C._functorch.peek_interpreter_stack")
_private("torch.autograd.forward_ad._current_level")  # changes: read where it is used


def recorded(tensor: Tensor) -> bool:
    """Say whether only the operations on a tensor are recorded, so that its numbers must decide nothing."""
    return type(tensor) not in (Tensor, nn.Parameter) or torch.compiler.is_compiling() or torch.jit.is_tracing()


def plain(*tensors: Tensor) -> bool:
    """Say whether operations on tensors are just carried out: in place and into buffers is as good as any other way.

    False where they are recorded, differentiated (in either direction), cast by autocast, or run by a transform of
    torch.func, some of which refuse what writes into a buffer, and some of which are wrong then.
    """
    return not (
        any(recorded(tensor) for tensor in tensors)
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        or torch.is_autocast_enabled(tensors[0].device.type)
        or peek_interpreter_stack() is not None  # vmap, jvp, jacrev and so on
        or torch.autograd.forward_ad._current_level >= 0
    )


@torch.fx.wrap
def channels_last(x: Tensor) -> Tensor:
    """Lay maps (N, C, H, W) out channels-last in memory; under vmap, which knows no such layout, leave them."""
    if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript skips what stands below this condition alone)
        if peek_interpreter_stack() is not None:
            return x
    return x.contiguous(memory_format=torch.channels_last)


@torch.fx.wrap
def of_size(x: Tensor, height: int, width: int) -> Tensor:
    """Return maps (N, C, H, W), H x W being height x width, so that a trace refuses maps of another size later.

    torch.jit.trace and make_fx record what was done for the maps that they saw, and not why (torch.export and
    torch.compile do, and check). In the trace this is an expansion that
    does nothing, and that no other size has.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102
        if recorded(x) and not torch.compiler.is_compiling():
            return x.expand(-1, -1, height, width)
    return x


def fixed(number: int) -> int:
    """Return a number that is the same for all inputs, such as that of the channels, as a constant of a trace."""
    if not torch.jit.is_scripting():  # noqa: SIM102
        if torch.jit.is_tracing():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", torch.jit.TracerWarning)
                return int(number)
    return number


def readable(forward: Forward) -> Forward:
    """Write the annotations of a network's forward() as types.

    torch.fx copies them into its graph; as strings, which `from __future__ import annotations` makes of them,
    torch.jit.script could not read it.
    """
    forward.__annotations__ = get_type_hints(forward)
    return forward
