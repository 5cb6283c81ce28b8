"""Numbers of layers, as merging reads and writes them."""

from __future__ import annotations

from torch import Tensor, nn

from repmlp.reparam import BatchNormStats


def is_batch_norm(module: nn.Module) -> bool:
    """Say whether a module is a batch norm: torch's, for one process or several, or timm's frozen one."""
    frozen = all(hasattr(module, name) for name in ("running_mean", "running_var", "eps"))
    return isinstance(module, nn.modules.batchnorm._BatchNorm) or frozen


def batch_norm_stats(norm: nn.Module) -> BatchNormStats:
    """Read the evaluation-time numbers of a batch norm, see is_batch_norm.

    Raises ValueError where it keeps none, or has an activation in it, as timm's BatchNormAct2d may.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("a batch norm without running statistics cannot be merged")
    act = getattr(norm, "act", None)
    if act is not None and not isinstance(act, nn.Identity):
        raise ValueError(f"a {type(norm).__name__} with {type(act).__name__} in it is not linear and cannot be merged")
    check_parameters(norm)
    return BatchNormStats(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


def check_parameters(module: nn.Module) -> None:
    """Raise ValueError where weight or bias of a layer are computed from other parameters.

    So they are under torch.nn.utils.prune, weight_norm, spectral_norm and parametrize: written over, they would be
    computed anew in the next forward(), and what stands there now may be stale.
    """
    for name in ("weight", "bias"):
        if hasattr(module, name) and name not in module._parameters and name not in module._buffers:
            raise ValueError(
                f"{name} of {type(module).__name__} is computed from other parameters (pruning, weight norm, a "
                "parametrization): make it permanent first, by torch.nn.utils.prune.remove, remove_weight_norm or "
                "parametrize.remove_parametrizations"
            )


def set_parameter(module: nn.Module, name: str, value: Tensor) -> None:
    """Write a merged weight or bias into the Parameter that is there, which optimizers hold; a new one where none is.

    A new bias asks for gradients where the weight does.
    """
    parameter = getattr(module, name)
    if parameter is None:
        module.register_parameter(name, nn.Parameter(value, requires_grad=module.weight.requires_grad))
    elif parameter.data_ptr() != value.data_ptr():
        parameter.copy_(value)
