"""Locality Injection for other people's MLPs: branches beside every square token-mixing `nn.Linear` of a model.

Paper: RepMLPNet (arXiv 2112.11081), Section 5.2, does this to ResMLP. All channels share the layer, so a branch is a
convolution with ONE channel that they share too, and a batch norm. Merged, the model has the state-dict keys and shapes
that it had before, so that stock code loads its weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from repmlp.branches import BranchSpec, parse_all
from repmlp.local_perceptron import LocalPerceptron
from repmlp.parameters import check_parameters, set_parameter
from repmlp.reparam import merge_branches


@torch.fx.wrap
def as_maps(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Lay tokens out as maps: (..., C, h*w) -> (N, C, h, w), a view where x is the transpose of (N, h*w, C)."""
    channels = x.shape[-2] if x.dim() > 1 else 1
    return x.reshape(-1, channels, size[0], size[1])


class InjectedLinear(nn.Linear):
    """A token-mixing `nn.Linear` with convolutions beside it: y = Linear(x) + sum_k BN_k(conv_k(x)).

    Paper: RepMLPNet Sections 3.2 and 5.2; the branches are a Local Perceptron with one share-set.

    size: (h, w) of the patch grid, or (n,) for a sequence, where a branch k, or "1xk", has k taps along it; afterwards
    the attribute `size` is (h, w), or (1, n). kernels: branches of any kind, e.g. (1, 3, "3s"), see repmlp.branches; ()
    for none, the form that merging leaves: an nn.Linear that knows its grid.
    zero_init: start the batch norms' weights at 0, so that the branches add nothing yet. device, dtype: of every
    parameter.

    Weight (h*w, h*w), rows = output positions; bias (h*w,); both under the names that nn.Linear gives them.
    Input and output (..., h*w). The dimension before the last one, if there is one, is taken for the channels.
    Raises ValueError for a size or kernels that are none.
    """

    share_sets = 1

    def __init__(
        self,
        size: Sequence[int],
        kernels: Sequence[BranchSpec | int | str] = (1, 3),
        *,
        zero_init: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        h, w = _as_grid(size)
        super().__init__(h * w, h * w, device=device, dtype=dtype)
        self._add_branches(size, kernels, zero_init)

    def _add_branches(self, size: Sequence[int], kernels: Sequence[BranchSpec | int | str], zero_init: bool) -> None:
        """Make the branches, on the device and in the dtype and mode of the layer; arguments as for the class."""
        self.size = _as_grid(size)
        specs = _check_branches(kernels, size)
        if not specs:
            self.register_module("local_perceptron", None)
            return
        with self.weight.device:
            local = LocalPerceptron(1, specs, size)
        if zero_init:
            for norm in local.norms.values():
                nn.init.zeros_(norm.weight)
        self.local_perceptron = local.to(self.weight.dtype).train(self.training)

    @torch.jit.unused
    @property
    def kernels(self) -> tuple[int | str, ...]:
        """Return the branches that are there now, as configurations spell them: () once merged."""
        return () if self.local_perceptron is None else self.local_perceptron.kernels

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, size={self.size}"

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        if self.local_perceptron is None:
            return out
        # (N, C, h, w) -> (..., C, h*w)
        return out + self.local_perceptron(as_maps(x, self.size)).reshape(x.shape)

    def merged(self, branches: bool = True) -> tuple[Tensor, Tensor]:
        """Return weight (1, h*w, h*w) and bias (1, h*w) of the merged layer without changing this one.

        As SetSharingFC.merged, for one share-set. branches: False leaves the convolutions out.
        """
        check_parameters(self)
        local = self.local_perceptron.branches() if branches and self.local_perceptron is not None else []
        # (h*w, h*w) -> (1, h*w, h*w); (h*w,) -> (1, h*w)
        return merge_branches(self.weight.unsqueeze(0), self.bias.unsqueeze(0), local, self.size)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Merge the branches into weight and bias, in place. Does nothing the second time.

        Paper: RepMLPNet Eq. 12-14. Float64 arithmetic, rounded once to the weight's dtype. Weight and bias stay the
        same Parameters, so that an optimizer made before trains them on.
        Raises RuntimeError in training mode, where the batch norms' running statistics are not what forward() uses;
        ValueError for weights that are computed from others (pruning).
        """
        if self.local_perceptron is None:
            return
        self._check_evaluation()
        weight, bias = self.merged()
        # (1, h*w, h*w) -> (h*w, h*w); (1, h*w) -> (h*w,)
        set_parameter(self, "weight", weight.squeeze(0))
        set_parameter(self, "bias", bias.squeeze(0))
        self.local_perceptron = None

    def _to_linear(self) -> None:
        """Merge, and turn this very module back into a plain nn.Linear."""
        self.reparameterize()
        del self.local_perceptron, self.size
        self.__class__ = nn.Linear

    def _check_evaluation(self) -> None:
        """Raise RuntimeError where there are branches to merge, but in training mode."""
        if self.training and self.local_perceptron is not None:
            raise RuntimeError("the model is in training mode: call model.eval() before merging the branches")


def inject_locality(
    model: nn.Module,
    kernels: Sequence[BranchSpec | int | str] = (1, 3),
    *,
    size: Sequence[int] | None = None,
    layers: str | Sequence[str] | None = None,
    zero_init: bool = False,
    inplace: bool = False,
) -> nn.Module:
    """Put convolutions with batch norms beside every square token-mixing `nn.Linear` of a model.

    Paper: RepMLPNet Sections 3.2 and 5.2. A layer is never chosen by its shape: channel-mixing ones can be square too.

    model: any nn.Module; load pretrained weights first. kernels: the branches, of any kind (see repmlp.branches); ()
    for none: the layers compute what they did, and know their grid (for profiles and resizing).
    size: (h, w) of the patch grid, or (n,) for a sequence (1-D branches); None to ask the model's timm PatchEmbed.
    layers: dotted names of the layers, or patterns such as "blocks.*.token_mix" (as fnmatch: * matches dots too); None
    for those of timm's ResMLP and gMLP blocks. Their input has to be (..., tokens), tokens in the order (y, x).
    zero_init: start the batch norms' weights at 0: the model computes exactly what it did until it is trained.
    inplace: change `model` itself, otherwise a deep copy. Weights and biases stay the same Parameters, for an optimizer
    that has them; the new parameters have to be added to it.

    >>> net = inject_locality(timm.create_model("resmlp_12_224"), (1, 3))
    >>> mine = inject_locality(my_mlp, (3,), size=(14, 14), layers="blocks.*.token_mix")  # (..., 196) -> (..., 196)
    >>> torch.save(mine.state_dict(), "training.pt")  # as it is trained; to load it, inject the same into my_mlp first
    >>> torch.save(merge_locality(mine.eval()).state_dict(), "merged.pt")  # for my_mlp as it was

    Returns the model, whose chosen layers are now InjectedLinear; modules used in several places stay tied.
    Raises ValueError, before anything is changed, where there is no layer to be found, a pattern matches nothing, the
    grid is unknown, a branch is of no use on it, or a chosen layer is no plain square nn.Linear with bias over exactly
    that grid, has branches already, or shares its weight with another layer.
    """
    if not inplace:
        model = copy.deepcopy(model)
    chosen = _known_layers(model) if layers is None else _named_layers(model, layers)
    size = _patch_grid(model) if size is None else size
    grid = _as_grid(size)
    specs = _check_branches(kernels, size)
    for name, layer in chosen.items():
        _check_layer(name, layer, grid)
    _check_parameters_unshared(model, chosen)
    for layer in dict.fromkeys(chosen.values()):  # a tied layer has several names
        # The very same module, of another class from now on, as torch's own parametrizations do: whoever holds it, its
        # parameters or a hook on it (a tied block, an optimizer) still holds the right one.
        layer.__class__ = InjectedLinear
        layer._add_branches(size, specs, zero_init)
    return model


def merge_locality(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Merge every injected layer and make it a plain `nn.Linear` again.

    Paper: RepMLPNet Eq. 12-14. Float64 arithmetic, rounded once. The state dict has the keys and shapes that it had
    before inject_locality, so the stock model loads it strictly and computes the same.

    model: from inject_locality, in evaluation mode. inplace: change `model` itself, otherwise a deep copy.
    Raises ValueError where no layer is injected; RuntimeError in training mode, before anything is changed.
    """
    injected = [module for module in model.modules() if isinstance(module, InjectedLinear)]
    if not injected:
        raise ValueError("the model has no injected layers to merge: was it made by inject_locality?")
    for layer in injected:
        layer._check_evaluation()
    if not inplace:
        model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, InjectedLinear):
            module._to_linear()
    return model


def _known_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the token-mixing layers of the blocks whose type is known, by name."""
    # not above: timm, once imported, imports the networks, which need this module
    from timm.models.mlp_mixer import MixerBlock, ResBlock, SpatialGatingUnit

    # which child of a known module mixes tokens; any other layer has to be named
    token_mixing: dict[type[nn.Module], str] = {ResBlock: "linear_tokens", SpatialGatingUnit: "proj"}
    chosen = {}
    for name, module in _named_modules(model):
        if isinstance(module, MixerBlock):
            raise ValueError(
                f"layer {name}: a MixerBlock mixes tokens by an MLP (tokens -> hidden -> tokens), whose layers are "
                "not square, so no convolution fits beside them; use ResMLP or gMLP blocks"
            )
        for kind, child in token_mixing.items():
            if isinstance(module, kind):
                chosen[f"{name}.{child}".removeprefix(".")] = getattr(module, child)
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no token-mixing layers that are known (timm's ResMLP and gMLP have): name "
            'them, e.g. layers=["blocks.*.token_mix"]'
        )
    return chosen


def _named_layers(model: nn.Module, patterns: str | Sequence[str]) -> dict[str, nn.Module]:
    """Return the modules that dotted names or fnmatch patterns choose, by name."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ValueError("layers=[] names no layer: leave it out for timm's ResMLP and gMLP")
    chosen = {}
    for pattern in patterns:
        found = {name: m for name, m in _named_modules(model) if name and fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(f"layers: {pattern!r} matches no module of {type(model).__name__} (see named_modules())")
        chosen |= found
    return chosen


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module by every name that it has: a tied one has several."""
    return model.named_modules(remove_duplicate=False)


def _patch_grid(model: nn.Module) -> tuple[int, int]:
    """Return the grid of the model's timm PatchEmbed, (h, w); ValueError where there is none, or more than one."""
    from timm.layers import PatchEmbed

    grids = {module.grid_size for module in model.modules() if isinstance(module, PatchEmbed)} - {None}
    if len(grids) != 1:
        known = f"PatchEmbeds of several grids {sorted(grids)}" if grids else "no timm PatchEmbed with a fixed grid"
        raise ValueError(f"{type(model).__name__} has {known}: give size=(h, w) in patches, or (n,) for a sequence")
    return grids.pop()


def _as_grid(size: Sequence[int]) -> tuple[int, int]:
    """Return (h, w), or (1, n) for a sequence (n,); ValueError for anything else."""
    numbers = tuple(size) if isinstance(size, Sequence) else ()
    if len(numbers) not in (1, 2) or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in numbers):
        raise ValueError(f"size={size!r}: give (h, w) in patches, or (n,) for a sequence, as positive whole numbers")
    return (1, numbers[0]) if len(numbers) == 1 else (numbers[0], numbers[1])


def _check_branches(kernels: Sequence[BranchSpec | int | str], size: Sequence[int]) -> tuple[BranchSpec, ...]:
    """Read the branches beside a layer over a grid (h, w) or a sequence (n,), () for none.

    Raises ValueError for what is no list of branches, no branch or there twice, and for one that does not fit the grid.
    """
    if isinstance(kernels, str) or not isinstance(kernels, Sequence):
        raise ValueError(f"kernels={kernels!r}: give the branches, e.g. (1, 3)")
    return parse_all(kernels, size)


def _check_layer(name: str, layer: nn.Module, grid: tuple[int, int]) -> None:
    """Raise ValueError where a layer cannot take branches, or works on other tokens than the grid's."""
    (h, w), kind = grid, type(layer).__name__
    if isinstance(layer, InjectedLinear) and layer.kernels:
        raise ValueError(f"layer {name} is injected already: merge_locality(model) makes it an nn.Linear again")
    if type(layer) not in (nn.Linear, InjectedLinear):  # another subclass may compute something else
        raise ValueError(f"layer {name} is a {kind}: branches go beside a plain nn.Linear only")
    tokens, out = layer.in_features, layer.out_features
    if tokens != out:
        raise ValueError(f"layer {name} maps {tokens} -> {out} tokens: a convolution fits beside a square layer only")
    if layer.bias is None:
        raise ValueError(
            f"layer {name} has no bias: the shift of the branches' batch norms could not be merged without a new key; "
            "build the layer with bias=True"
        )
    if {name for name, _ in layer.named_parameters(recurse=False)} != {"weight", "bias"}:
        raise ValueError(f"layer {name} computes its weight from other parameters (weight norm, pruning): undo that")
    if tokens == h * w + 1:
        raise ValueError(
            f"layer {name} mixes {tokens} tokens, one more than the {h}x{w} grid: a class token has no place on the "
            "map, so no convolution can be injected"
        )
    if tokens != h * w:
        raise ValueError(f"layer {name} mixes {tokens} tokens, the {h}x{w} grid has {h * w}: give the size it works on")


def _check_parameters_unshared(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    """Raise ValueError where another module than the chosen layer has its weight or bias as well.

    Each would get branches of its own, or none, so that they could not be equal any more once merged.
    """
    owners = {id(p): (name, layer) for name, layer in chosen.items() for p in layer.parameters(recurse=False)}
    for other, module in _named_modules(model):
        for parameter in module.parameters(recurse=False):
            name, layer = owners.get(id(parameter), (other, module))
            if layer is not module:
                raise ValueError(
                    f"layer {name} shares its weight or bias with {other}, but merged they would differ: use the same "
                    "nn.Linear in both places, or give each its own Parameters"
                )
