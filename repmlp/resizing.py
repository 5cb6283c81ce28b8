"""Take a trained network to another image size by interpolating its set-sharing FCs.

Not in the papers, where a larger image goes through in partitions of the trained size (RepMLPNet Section 4) and every
resolution is trained anew. What this costs in accuracy has to be measured for the weights at hand.
"""

from __future__ import annotations

import copy
import warnings

import torch
import torch.nn.functional as F
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

from repmlp.branches import parse_all
from repmlp.injection import InjectedLinear, inject_locality, merge_locality
from repmlp.layers import SetSharingFC
from repmlp.models.repmlpnet import RepMLPNet
from repmlp.sizes import height_width


def resize(model: nn.Module, img_size: int | tuple[int, int]) -> nn.Module:
    """Return a copy of a RepMLPNet, ResMLP or gMLP for images of `img_size` pixels; the original stays as it is.

    With R(a -> b) the matrix of antialiased bicubic interpolation from maps of size a to size b, whose rows sum to 1,
    each FC kernel becomes W' = R(old -> new) W R(new -> old), each FC bias b' = R(old -> new) b: bring the map to the
    trained size, apply the layer, bring the result back. For a larger size R(new -> old) is the transpose of
    R(old -> new) but for the normalisation of rows, so W' is W interpolated over output and input positions alike,
    scaled so that a constant map gets the interpolated response, W' 1 = R(old -> new) W 1. Convolutions and batch norms
    have no size and are copied. Float64 arithmetic, rounded once to the kernel's dtype.

    A branch on a shuffled grid cannot be resized: the order of its positions, which its kernel was trained for, is that
    of the trained size, and another order on the new size would mean nothing to it. Resize the merged net.

    Resize before reparameterize(): in a merged kernel the convolutions would be stretched with the rest, which is
    warned of. Resized weights fit a network built with the new img_size.

    model: a RepMLPNet, or timm's ResMLP or gMLP, with branches or without; itself, no wrapper.

    img_size: side of a square image, or (height, width), in pixels; multiples of the stride of the last map.
    Raises TypeError for another kind of model, ValueError for a size that is no such multiple, a net without FCs, and
    where a shuffled branch would have to be resized, or a dilated one would be of no use (BranchSpec.fits).
    """
    model = copy.deepcopy(model)
    plain = isinstance(model, MlpMixer) and not any(isinstance(m, InjectedLinear) for m in model.modules())
    if plain:
        inject_locality(model, (), inplace=True)  # so that its layers know their grid
    stages, strides = _stages(model)
    if not any(stages):
        raise ValueError(f"this {type(model).__name__} has no set-sharing FCs, so there is nothing to resize")
    sides = height_width(img_size)
    if any(side < 1 or side % strides[-1] for side in sides):
        raise ValueError(
            f"img_size={img_size!r}: use a number of pixels or (height, width), "
            f"multiples of {strides[-1]}, the stride of the last map"
        )
    sizes = [(sides[0] // stride, sides[1] // stride) for stride in strides]
    for fcs, size in zip(stages, sizes, strict=True):
        for fc in fcs:
            _check_branches(fc, size)
    # merged, a layer without a batch norm looks like one that never had branches
    if any(getattr(fc, "norm", None) is None and fc.local_perceptron is None for stage in stages for fc in stage):
        warnings.warn(
            "the model has no branches: convolutions that were merged into its FC kernels, if any, are stretched with "
            "them; resize() the train-time model and reparameterize() the result",
            stacklevel=2,
        )
    for fcs, size in zip(stages, sizes, strict=True):
        for fc in fcs:
            _resize_fc(fc, size)
    if isinstance(model, RepMLPNet):
        model.img_size = sides
    else:
        model.stem.set_input_size(sides)
    return merge_locality(model, inplace=True) if plain else model


def _stages(model: nn.Module) -> tuple[list[list[SetSharingFC | InjectedLinear]], list[int]]:
    """Return the spatial layers and the stride, in pixels, of every stage; an MlpMixer is one stage."""
    if isinstance(model, RepMLPNet):
        stages = list(model.stages)
        strides = [info["reduction"] for info in model.feature_info[: len(stages)]]
    elif isinstance(model, MlpMixer):
        height, width = model.stem.patch_size
        if height != width:
            raise ValueError(f"resize() takes square patches only; the model's are {height}x{width} pixels")
        stages, strides = [model.blocks], [height]
    else:
        raise TypeError(
            f"resize() takes a RepMLPNet, or timm's ResMLP or gMLP, itself, no wrapper; got {type(model).__name__}"
        )
    return [[m for m in stage.modules() if isinstance(m, (SetSharingFC, InjectedLinear))] for stage in stages], strides


@torch.no_grad()
def _resize_fc(fc: SetSharingFC | InjectedLinear, size: tuple[int, int]) -> None:
    """Interpolate weight and bias in place; the same size leaves every bit as it is."""
    if size == fc.size:
        return
    (h, w), (new_h, new_w) = fc.size, size
    there = [_interpolation(h, new_h, fc.weight.device), _interpolation(w, new_w, fc.weight.device)]
    back = [_interpolation(new_h, h, fc.weight.device).T, _interpolation(new_w, w, fc.weight.device).T]
    leading = fc.weight.shape[:-2]  # (S,) of a set-sharing FC, () of a linear layer
    weight = fc.weight.new_empty(*leading, new_h * new_w, new_h * new_w)
    # (h*w, h*w) -> (1, h*w, h*w) of a linear layer
    sets = zip(*(w.view(fc.share_sets, *w.shape[-2:]) for w in (weight, fc.weight.detach())), strict=True)
    for target, source in sets:  # one set at a time: float64 is large
        # (h*w, h*w) -> (h, w, h, w) -> (h', w', h', w') -> (h'*w', h'*w')
        target.copy_(_along_axes(source.double().view(h, w, h, w), [*there, *back]).reshape(target.shape))
    fc.weight = nn.Parameter(weight, requires_grad=fc.weight.requires_grad)
    if fc.bias is not None:
        # (S, h*w) -> (h, w, S) -> (S, h', w') -> (S, h'*w')
        bias = _along_axes(fc.bias.double().view(fc.share_sets, -1).T.reshape(h, w, fc.share_sets), there)
        bias = bias.reshape(*leading, new_h * new_w).to(fc.bias.dtype)
        fc.bias = nn.Parameter(bias, requires_grad=fc.bias.requires_grad)
    fc.size = size
    if isinstance(fc, InjectedLinear):
        fc.in_features = fc.out_features = new_h * new_w
    if fc.local_perceptron is not None:
        fc.local_perceptron.size = size


def _check_branches(fc: SetSharingFC | InjectedLinear, size: tuple[int, int]) -> None:
    """Raise ValueError where a branch of a layer cannot go on to maps of another size."""
    for spec in parse_all(fc.kernels, size):
        if spec.shuffled and size != fc.size:
            raise ValueError(
                f"branch {spec.label}: the order of its shuffled grid belongs to maps of {fc.size[0]}x{fc.size[1]} and "
                f"has no counterpart on {size[0]}x{size[1]}; resize the merged model, after reparameterize()"
            )


def _along_axes(array: Tensor, matrices: list[Tensor]) -> Tensor:
    """Multiply the first axes of an array by a matrix (new, old) each; they end up behind those that had none."""
    for matrix in matrices:
        # the axis in front is summed over, and its resized form appended
        array = torch.tensordot(array, matrix, dims=([0], [1]))
    return array


def _interpolation(old: int, new: int, device: torch.device) -> Tensor:
    """Return antialiased bicubic interpolation from `old` points to `new` as a matrix, (new, old), in float64.

    A map is interpolated along one axis and then along the other, so these two matrices are the whole of it.
    """
    # one row per image, not one column: torch interpolates maps of width 1 wrongly along their height (seen in 2.15)
    rows = torch.eye(old, dtype=torch.float64, device="cpu").view(old, 1, 1, old)
    # (old, 1, 1, old) -> (old, 1, 1, new) -> (new, old)
    return F.interpolate(rows, size=(1, new), mode="bicubic", antialias=True).view(old, new).T.to(device)
