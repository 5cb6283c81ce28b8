"""ResNets with RepMLP blocks, built on timm's ResNet.

Paper: "RepMLP: Re-parameterizing Convolutions into Fully-connected Layers for Image Recognition" (arXiv 2105.01883),
Sections 3.5 and 4.2. `import repmlp` registers the networks with timm: `timm.create_model("repmlp_res50_224")` and so
on. `insert` puts the blocks into a ResNet that a user already has.

The first block of a stage, which has a stride or other channels, stays what it was. Stages are called c2 to c5, as in
the paper; they are layer1 to layer4 of timm.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

from repmlp.branches import BranchSpec, values
from repmlp.folding import fold_batch_norms
from repmlp.key_names import unwrap
from repmlp.maps import tiles_of
from repmlp.older_key_names import convert_older
from repmlp.repmlp_block import RepMLP
from repmlp.sizes import height_width

STAGES = {"c2": "layer1", "c3": "layer2", "c4": "layer3", "c5": "layer4"}
# r of the paper's networks, by stage: the RepMLP of a Bottleneck has mid/r channels
BOTTLENECK_REDUCTIONS = {"c2": 2, "c3": 2, "c4": 4, "c5": 4}
LIGHT_REDUCTION = 8  # the RepMLP of a Light block has out/8 channels


class _Residual(nn.Module):
    """x + branch(x), then a ReLU: what both kinds of block share. Subclasses define `branch` and `last_norm`."""

    def __init__(self, drop_path: nn.Module | None):
        super().__init__()
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if self.drop_path is not None:
            y = self.drop_path(y)
        return self.act(y + x)

    def zero_init_last(self) -> None:
        """Start the last batch norm's weight at 0, as timm's ResNets do: the block adds nothing yet."""
        nn.init.zeros_(self.last_norm.weight)

    def _initialise(self) -> None:
        """Draw convolutions as timm's ResNets do."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class RepMLPBottleneck(_Residual):
    """1x1, 3x3, RepMLP, 3x3, 1x1 convolution, each but RepMLP with a batch norm, ReLU between them; shortcut.

    Paper: RepMLP Section 3.5 and Figure 4, "RepMLP Bottleneck": the 3x3 convolutions change between mid and
    mid/reduction channels, so that FC3, whose size is quadratic in its channels, works on fewer of them.

    channels: of input and output. mid: between the 1x1 and the 3x3 convolutions. reduction: r, divides mid.
    drop_path: of the replaced block, or None. stride: 1; another is refused. repmlp: of RepMLP, see there.
    Input and output (N, C, H, W).
    Raises ValueError where r does not divide mid, for a stride, and as RepMLP does.
    """

    def __init__(
        self, channels: int, mid: int, reduction: int, *, drop_path: nn.Module | None = None, stride: int = 1, **repmlp
    ):
        super().__init__(drop_path)
        inner = _inner_channels(mid, reduction, stride)
        self.conv1 = nn.Conv2d(channels, mid, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = nn.Conv2d(mid, inner, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.repmlp = RepMLP(inner, inner, **repmlp)
        self.conv3 = nn.Conv2d(inner, mid, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(mid)
        self.conv4 = nn.Conv2d(mid, channels, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self._initialise()

    @torch.jit.unused
    @property
    def last_norm(self) -> nn.Module:
        return self.bn4

    def branch(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        x = self.act(self.repmlp(self.act(self.bn2(self.conv2(x)))))
        x = self.act(self.bn3(self.conv3(x)))
        return self.bn4(self.conv4(x))


class RepMLPLight(_Residual):
    """1x1 convolution, RepMLP, 1x1 convolution, the convolutions with a batch norm, ReLU between them; shortcut.

    Paper: RepMLP Section 4.2, "RepMLP Light Block". Arguments as RepMLPBottleneck; the RepMLP has channels/reduction
    channels, and there is no `mid`.
    """

    def __init__(self, channels: int, reduction: int, *, drop_path: nn.Module | None = None, stride: int = 1, **repmlp):
        super().__init__(drop_path)
        inner = _inner_channels(channels, reduction, stride)
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.repmlp = RepMLP(inner, inner, **repmlp)
        self.conv2 = nn.Conv2d(inner, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self._initialise()

    @torch.jit.unused
    @property
    def last_norm(self) -> nn.Module:
        return self.bn2

    def branch(self, x: Tensor) -> Tensor:
        x = self.act(self.repmlp(self.act(self.bn1(self.conv1(x)))))
        return self.bn2(self.conv2(x))


def _inner_channels(channels: int, reduction: int, stride: int) -> int:
    if stride != 1:
        raise ValueError(f"stride={stride}: a RepMLP block keeps the map's size, so leave this block as it is")
    if reduction < 1 or channels % reduction:
        raise ValueError(f"reduction={reduction} does not divide {channels} channels")
    return channels // reduction


def insert(
    model: ResNet,
    img_size: int | tuple[int, int],
    stages: str | Sequence[str] = ("c3", "c4"),
    *,
    block: str = "bottleneck",
    reductions: int | Sequence[int] | None = None,
    groups: int | Sequence[int] = 8,
    partition: int | tuple[int, int] = 7,
    kernels: Iterable[BranchSpec | int | str] = (1, 3, 5),
    blocks: Sequence[int] | None = None,
    global_perceptron: bool = True,
    global_reductions: int | Sequence[int] = 1,
    zero_init_last: bool = True,
    inference_mode: bool = False,
    inplace: bool = False,
) -> ResNet:
    """Replace the stride-1 bottlenecks of chosen stages of a timm ResNet by RepMLP blocks with fresh weights.

    Paper: RepMLP Sections 3.5 and 4.2. All other layers keep their weights. In a dilated network (output_stride=8) the
    new blocks have no dilation, as in the paper's PSPNet (Section 4.4).

    model: a timm ResNet of Bottlenecks, no wrapper. img_size: pixels, of the images that it will see.
    stages: some of "c2", "c3", "c4", "c5". block: "bottleneck" or "light".
    reductions: r of each stage; None for the paper's, 2, 2, 4, 4 from c2 to c5 (Light blocks: 8).
    groups: g of each stage. partition: side of a partition in cells, or (h, w). kernels: branches of the Local
    Perceptron, see repmlp.branches. blocks: which blocks of each stage, counted from 0; None for all but the first.
    global_perceptron: False for none. global_reductions: of FC1 and FC2, for each stage.
    zero_init_last: start the blocks as identities. inference_mode: build the merged form.
    inplace: change the model itself, otherwise a deep copy.
    One number stands for every stage where a sequence is allowed.
    Returns the model.
    Raises TypeError for another kind of model; ValueError, before anything is changed, for a stage or block that does
    not exist, is there twice, or has a stride or other channels, and as the blocks do.
    """
    _check_resnet(model)
    stages = _check_stages(stages)
    if block not in ("bottleneck", "light"):
        raise ValueError(f"block={block!r}: use 'bottleneck' or 'light'")
    if reductions is None:
        reductions = [BOTTLENECK_REDUCTIONS[s] if block == "bottleneck" else LIGHT_REDUCTION for s in stages]
    reductions, groups, global_reductions = (
        _for_each(stages, name, given)
        for name, given in (("reductions", reductions), ("groups", groups), ("global_reductions", global_reductions))
    )
    size = (partition, partition) if isinstance(partition, int) else tuple(partition)
    maps = map_sizes(model, img_size)
    model = model if inplace else copy.deepcopy(model)
    new: list[tuple[nn.Sequential, int, nn.Module]] = []
    for stage, r, g, global_reduction in zip(stages, reductions, groups, global_reductions, strict=True):
        layer = getattr(model, STAGES[stage])
        chosen = range(1, len(layer)) if blocks is None else blocks
        for index in chosen:
            if not 0 <= index < len(layer):
                raise ValueError(f"block {index} of {stage} does not exist: it has {len(layer)}, counted from 0")
            settings = {
                "map_size": maps[stage],
                "size": size,
                "groups": g,
                "kernels": kernels,
                "global_perceptron": global_perceptron,
                "global_reduction": global_reduction,
                "inference_mode": inference_mode,
            }
            try:
                new.append((layer, index, _replacement(layer[index], block, r, **settings)))
            except ValueError as error:
                raise ValueError(f"{stage}, block {index}: {error}") from None
    for layer, index, replacement in new:
        if zero_init_last:
            replacement.zero_init_last()
        layer[index] = replacement
    return model


def _replacement(old: nn.Module, block: str, reduction: int, **repmlp: Any) -> nn.Module:
    """Return a fresh RepMLP block in the place of a Bottleneck of timm's, on its device, in its dtype and mode."""
    if not isinstance(old, Bottleneck):
        raise ValueError(f"it is a {type(old).__name__}, and only timm's Bottlenecks are replaced")
    if old.stride != 1 or old.downsample is not None:
        raise ValueError(f"it has stride {old.stride} and changes the map's size or channels, so that it has to stay")
    if old.se is not None:
        raise ValueError("it has an attention layer, which a RepMLP block has not")
    weight = old.conv1.weight
    with weight.device:
        if block == "light":
            new = RepMLPLight(weight.shape[1], reduction, drop_path=old.drop_path, **repmlp)
        else:
            new = RepMLPBottleneck(
                weight.shape[1], old.conv2.out_channels, reduction, drop_path=old.drop_path, **repmlp
            )
    return new.to(weight.dtype).train(old.training)


class RepMLPResNet(ResNet):
    """timm's ResNet with RepMLP blocks in chosen stages.

    Paper: RepMLP Section 4.2. Defaults are its RepMLP-Res50 for 224 pixels: 41,071,144 parameters and 3.950 G
    multiply-accumulates while training, 40,871,528 and 3.891 G with every batch norm folded.

    layers: blocks of the four stages. img_size: pixels, a number or (height, width). stages, block, reductions, groups,
    partition, kernels, global_perceptron, global_reductions, inference_mode: see `insert`.
    resnet: timm's own arguments, such as num_classes, in_chans, output_stride, drop_path_rate, channels, base_width.
    Input (N, in_chans, H, W), output (N, num_classes).
    Raises ValueError as `insert` does.
    """

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 6, 3),
        *,
        img_size: int | tuple[int, int] = 224,
        stages: str | Sequence[str] = ("c3", "c4"),
        block: str = "bottleneck",
        reductions: int | Sequence[int] | None = None,
        groups: int | Sequence[int] = 8,
        partition: int | tuple[int, int] = 7,
        kernels: Iterable[BranchSpec | int | str] = (1, 3, 5),
        global_perceptron: bool = True,
        global_reductions: int | Sequence[int] = 1,
        zero_init_last: bool = True,
        inference_mode: bool = False,
        **resnet: Any,
    ):
        super().__init__(Bottleneck, layers, zero_init_last=zero_init_last, **resnet)
        self.img_size = height_width(img_size)
        insert(
            self,
            img_size,
            stages,
            block=block,
            reductions=reductions,
            groups=groups,
            partition=partition,
            kernels=kernels,
            global_perceptron=global_perceptron,
            global_reductions=global_reductions,
            zero_init_last=zero_init_last,
            inference_mode=inference_mode,
            inplace=True,
        )

    def reparameterize(self) -> None:
        """Merge every RepMLP; the batch norms of the convolutions stay, see repmlp.fold_batch_norms."""
        for module in self.modules():
            if isinstance(module, RepMLP):
                module.reparameterize()


class Resized(NamedTuple):
    """What `resize_partitions` returns: the model, and by name the Global Perceptrons that are fresh or gone."""

    model: nn.Module
    fresh: list[str]
    removed: list[str]


def resize_partitions(
    model: ResNet, img_size: int | tuple[int, int], global_reductions: Mapping[str, int] | None = None
) -> Resized:
    """Return a copy of a ResNet with RepMLP blocks for images of another size; the original stays as it is.

    Paper: RepMLP Section 4.4, where weights for 320 pixels go into PSPNet at 713. Partitions keep their size, so that
    FC3 and the branches keep their weights. FC1 and FC2 depend on how many partitions a map has: where that changes
    they are fresh and have to be trained; the batch norm before them, one number a channel, keeps its weights.

    model: a timm ResNet with RepMLP blocks, no wrapper. img_size: pixels.
    global_reductions: of fresh FC1 and FC2, by stage ("c3"); a stage that is not named keeps its own.
    Raises TypeError for another kind of model, ValueError where a partition is larger than a map, for a stage that does
    not exist, and for a merged model that would need fresh layers.
    """
    _check_resnet(model)
    if global_reductions:
        _check_stages(list(global_reductions))
    model = copy.deepcopy(model)
    maps = map_sizes(model, img_size)
    fresh, removed = [], []
    for stage, layer in STAGES.items():
        for name, module in getattr(model, layer).named_modules():
            if isinstance(module, RepMLP):
                change = module.set_map_size(maps[stage], (global_reductions or {}).get(stage))
                changed = {"fresh": fresh, "removed": removed}.get(change, [])
                changed.append(f"{layer}.{name}.global_perceptron")
    if isinstance(model, RepMLPResNet):
        model.img_size = height_width(img_size)
    return Resized(model, fresh, removed)


def map_sizes(model: ResNet, img_size: int | tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Return (H, W) of the maps of every stage for images of a size: "c2" to "c5"."""
    height, width = height_width(img_size)
    strides = {info["module"]: info["reduction"] for info in model.feature_info}
    # every convolution with a stride rounds up
    return {stage: (-(-height // strides[name]), -(-width // strides[name])) for stage, name in STAGES.items()}


def check_images(model: ResNet, img_size: int | tuple[int, int]) -> None:
    """Raise ValueError where images of a size have another number of partitions than the RepMLP blocks are built for.

    FC1 and FC2 of a Global Perceptron depend on that number. A ResNet without such blocks takes images of any size.
    """
    maps = map_sizes(model, img_size)
    for stage, module in _of_one_size(model):
        there, here = tiles_of(maps[stage], module.size), module.partitions
        if there != here:
            height, width = height_width(img_size)
            raise ValueError(
                f"images of {height}x{width} pixels have {there[0]}x{there[1]} partitions in {stage}, and the RepMLP "
                f"blocks there are built for {here[0]}x{here[1]}"
            )


def takes_any_size(model: nn.Module) -> bool:
    """Say whether a network has no RepMLP block that is built for one number of partitions."""
    return not isinstance(model, ResNet) or not any(_of_one_size(model))


def _of_one_size(model: ResNet) -> Iterator[tuple[str, RepMLP]]:
    """Give the RepMLPs that are built for one number of partitions, each with its stage."""
    for stage, layer in STAGES.items():
        for module in getattr(model, layer).modules():
            if isinstance(module, RepMLP) and not module.any_map:
                yield stage, module


def _check_resnet(model: nn.Module) -> None:
    if not isinstance(model, ResNet):
        raise TypeError(f"takes a timm ResNet itself, no wrapper; got {type(model).__name__}")


def _check_stages(stages: str | Sequence[str]) -> list[str]:
    stages = [stages] if isinstance(stages, str) else list(stages)
    for stage in stages:
        if stage not in STAGES:
            raise ValueError(f"stages={stages}: {stage!r} does not exist, use some of {', '.join(STAGES)}")
        if stages.count(stage) > 1:
            raise ValueError(f"stages={stages}: {stage} stands there twice")
    return stages


def _for_each(stages: Sequence[str], name: str, given: int | Sequence[int]) -> list[int]:
    """Return one number a stage; ValueError where there are more or fewer."""
    numbers = [given] * len(stages) if isinstance(given, int) else list(given)
    if len(numbers) != len(stages):
        raise ValueError(f"{name}={numbers}: use one number, or one for each of the stages {', '.join(stages)}")
    return numbers


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Bring the older released weights, or ours, into our names; timm calls it with pretrained=True.

    Raises ValueError where the weights are merged or folded and the model is not.
    """
    weights, own = _in_our_names(state_dict), model.state_dict()
    if "conv1.bias" in weights and "conv1.bias" not in own:
        raise ValueError("these weights have no batch norms: read them with repmlp.load, which builds such a net")
    merged = [any(name.endswith(".partition_perceptron.bias") for name in names) for names in (weights, own)]
    if merged == [True, False]:
        raise ValueError("these weights are merged and the model is not: create it with inference_mode=True")
    return weights


def from_weights(state_dict: Mapping[str, Any]) -> ResNet:
    """Build the network that weights of the older code, or ours, are of, in evaluation mode, and load them.

    Paper: RepMLP Section 4.2. Read off the names and shapes: blocks, stages, kind of block, r, g, partitions, branches,
    classes, and whether the file is written while training or converted (then the network has no batch norms).
    Maps and partitions are taken to be square, because weights hold h*w alone.
    Raises ValueError where they are of no network of this kind.
    """
    weights = _in_our_names(state_dict)
    with torch.device("meta"):
        model = RepMLPResNet(**arguments_of(weights))
    if "conv1.bias" in weights:
        model = fold_batch_norms(model.eval())
    expected = model.state_dict()
    for name in dict.fromkeys([*expected, *weights]):
        if name not in weights and name.endswith("num_batches_tracked"):
            weights[name] = torch.zeros((), dtype=torch.long)
        elif name not in weights or name not in expected:
            raise ValueError(f"{name} is {'missing' if name not in weights else 'unexpected'}")
        elif weights[name].shape != expected[name].shape:
            found, needed = tuple(weights[name].shape), tuple(expected[name].shape)
            raise ValueError(f"{name} is {found}, the other weights need {needed}")
    model.to_empty(device="cpu").load_state_dict(weights)
    return model.eval()


def load_older_backbone(backbone: ResNet, state_dict: Mapping[str, Any]) -> list[str]:
    """Load a classifier's weights into a backbone for images of another size or stride, in place.

    Paper: RepMLP Section 4.4, where RepMLP-Res50-g4/8 for 320 pixels goes into PSPNet at 713. FC1 and FC2 depend on
    how many partitions a map has; where they are of another shape than the weights' they stay fresh, and a Global
    Perceptron that the weights lack stays fresh as a whole. The classifier is ignored where the backbone has none.

    backbone: a ResNet with RepMLP blocks, no wrapper. state_dict: of a whole network, of the older code or ours.
    Returns the names of the modules that stay fresh.
    Raises TypeError for another kind of model; ValueError, before anything is changed, as checkpoint_filter_fn does and
    for any other difference, naming the first.
    """
    _check_resnet(backbone)
    weights, own = checkpoint_filter_fn(state_dict, backbone), backbone.state_dict()
    chosen, fresh = {}, {}
    for name, tensor in own.items():
        module, _, rest = name.partition(".global_perceptron.")
        found = weights.get(name)
        if found is not None and found.shape == tensor.shape:
            chosen[name] = found
        elif found is None and name.endswith("num_batches_tracked") and name[:-19] + "running_mean" in weights:
            chosen[name] = torch.zeros_like(tensor)
        elif rest.startswith("fc") or (rest and f"{module}.global_perceptron.fc1.weight" not in weights):
            chosen[name] = tensor
            whole = f"{module}.global_perceptron"
            fresh[f"{whole}.{rest[:3]}" if f"{whole}.fc1.weight" in weights else whole] = None
        else:
            there = "missing" if found is None else tuple(found.shape)
            raise ValueError(f"{name} is {there} there and {tuple(tensor.shape)} here: build the same network")
    for name in weights:
        if name not in own and not name.startswith("fc.") and ".global_perceptron." not in name:
            raise ValueError(f"{name} is missing here: build the same network")
    backbone.load_state_dict(chosen)
    return list(fresh)


def arguments_of(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Infer the arguments of RepMLPResNet from its weights, in our names.

    Reads the first RepMLP block of each stage only: whether the others agree shows when the weights are loaded.
    Raises ValueError for weights that are of no such network.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in weights:
            raise ValueError(f"{name} is missing")
        return tuple(weights[name].shape)

    blocks = [{name.split(".")[1] for name in weights if name.startswith(f"{layer}.")} for layer in STAGES.values()]
    planes = [shape(f"{layer}.0.conv3.weight")[0] // Bottleneck.expansion for layer in STAGES.values()]
    if not all(blocks) or not all(planes):
        raise ValueError("these weights have no four stages of blocks")
    found: dict[str, list[Any]] = {"stages": [], "reductions": [], "groups": [], "global_reductions": []}
    sides, kinds, kernels = set(), set(), set()
    # of the image's side: what the number of partitions leaves open
    above, most = [0], []
    for i, (stage, layer) in enumerate(STAGES.items()):
        first = next((name for name in weights if re.match(rf"{layer}\.\d+\.repmlp\.", name)), None)
        if first is None:
            continue
        block = first.partition(".repmlp.")[0]
        repmlp = f"{block}.repmlp"
        fc3 = f"{repmlp}.partition_perceptron.weight"
        groups, _, columns = shape(fc3)
        outer, inner = shape(f"{block}.conv1.weight")[1], shape(f"{block}.conv2.weight")[1]
        kinds.add("bottleneck" if f"{block}.conv4.weight" in weights else "light")
        if "bottleneck" in kinds:
            outer, inner = inner, shape(f"{block}.conv2.weight")[0]
        side = math.isqrt(columns * groups // inner)
        if side**2 * inner != columns * groups:
            raise ValueError(f"{fc3}: {columns * groups / inner:g} positions of a partition are no square number")
        sides.add(side)
        found["stages"].append(stage)
        found["groups"].append(groups)
        found["reductions"].append(outer // inner)
        hidden, features = inner, inner
        if f"{repmlp}.global_perceptron.fc1.weight" in weights:
            hidden, features = shape(f"{repmlp}.global_perceptron.fc1.weight")
        found["global_reductions"].append(features // max(1, hidden))
        rows = math.isqrt(features // inner)
        if rows**2 * inner != features:
            raise ValueError(f"{repmlp}: {features / inner:g} partitions are no square number")
        above.append(max((rows - 1) * side, side - 1) * 4 * 2**i)
        most.append(rows * side * 4 * 2**i)
        names = (re.match(rf"{re.escape(repmlp)}\.\w+\.local_perceptron\.convs\.(\w+)\.", name) for name in weights)
        kernels |= {int(m[1]) if m[1].isdigit() else m[1] for m in names if m}
    if len(sides) != 1 or len(kinds) != 1:
        raise ValueError("these weights have no RepMLP block, or blocks of several kinds or partitions")
    gates = any(".global_perceptron." in name for name in weights)
    img_size = min(most) if gates else max(most)  # without Global Perceptrons any map goes through
    if gates and img_size <= max(above):
        raise ValueError("no image has as many partitions in every stage as the Global Perceptrons of these weights")
    return {
        "layers": tuple(len(each) for each in blocks),
        "channels": tuple(planes),
        "base_width": 64 * shape("layer1.0.conv2.weight")[0] // planes[0],
        "img_size": img_size,
        "block": kinds.pop(),
        "partition": sides.pop(),
        "kernels": values(kernels),
        "global_perceptron": gates,
        "num_classes": shape("fc.weight")[0] if "fc.weight" in weights else 0,
        "in_chans": shape("conv1.weight")[1],
        "inference_mode": any(name.endswith(".partition_perceptron.bias") for name in weights),
        **found,
    }


def _in_our_names(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Take a state dict out of the dictionaries and prefixes that training scripts put round it, and rename it."""
    return convert_older(unwrap(state_dict))


def _cfg(img_size: int) -> dict[str, Any]:
    """Describe a variant to timm; evaluation as for timm's ResNets."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, img_size, img_size),
        "pool_size": (-(-img_size // 32), -(-img_size // 32)),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "fixed_input_size": True,
        "license": "mit",
    }


default_cfgs = generate_default_cfgs(
    {
        "repmlp_res50_224": _cfg(224),
        "repmlp_res50_light_224": _cfg(224),
        "repmlp_res50_light_g4_224": _cfg(224),
        "repmlp_res50_g8_8_320": _cfg(320),
        "repmlp_res50_g8_16_320": _cfg(320),
        "repmlp_res50_g4_8_320": _cfg(320),
    }
)


def _create(variant: str, pretrained: bool, variant_kwargs: dict[str, Any], **kwargs: Any) -> RepMLPResNet:
    """Build a variant: its own arguments, changed by those that the user gives."""
    return build_model_with_cfg(
        RepMLPResNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **{**variant_kwargs, **kwargs}
    )


LARGE = {"partition": 10, "kernels": (1, 3, 5, 7)}  # for 320 pixels


@register_model
def repmlp_res50_224(pretrained: bool = False, **kwargs: Any) -> RepMLPResNet:
    """RepMLP-Res50, g = 8 in c3 and c4: 41.1M parameters, 3.95 G MACs; top-1 on ImageNet 78.55 % (paper)."""
    return _create("repmlp_res50_224", pretrained, {"groups": 8}, **kwargs)


@register_model
def repmlp_res50_light_224(pretrained: bool = False, **kwargs: Any) -> RepMLPResNet:
    """RepMLP-Res50 with Light blocks, g = 8: 58.4M parameters, 3.03 G MACs; top-1 on ImageNet 77.14 % (paper)."""
    return _create("repmlp_res50_light_224", pretrained, {"block": "light", "groups": 8}, **kwargs)


@register_model
def repmlp_res50_light_g4_224(pretrained: bool = False, **kwargs: Any) -> RepMLPResNet:
    """RepMLP-Res50 with Light blocks, g = 4, as in the released file: 87.0M parameters, 3.30 G MACs."""
    return _create("repmlp_res50_light_g4_224", pretrained, {"block": "light", "groups": 4}, **kwargs)


@register_model
def repmlp_res50_g8_8_320(pretrained: bool = False, **kwargs: Any) -> RepMLPResNet:
    """RepMLP-Res50-g8/8 for 320 pixels, g = 8 in c3 and c4: 72.5M parameters, 8.40 G MACs."""
    return _create("repmlp_res50_g8_8_320", pretrained, {**LARGE, "groups": (8, 8)}, **kwargs)


@register_model
def repmlp_res50_g8_16_320(pretrained: bool = False, **kwargs: Any) -> RepMLPResNet:
    """RepMLP-Res50-g8/16 for 320 pixels, g = 8 in c3 and 16 in c4: 59.5M parameters, 8.31 G MACs."""
    return _create("repmlp_res50_g8_16_320", pretrained, {**LARGE, "groups": (8, 16)}, **kwargs)


@register_model
def repmlp_res50_g4_8_320(pretrained: bool = False, **kwargs: Any) -> RepMLPResNet:
    """RepMLP-Res50-g4/8 for 320 pixels, g = 4 in c3 and 8 in c4: 87.9M parameters, 8.85 G MACs."""
    return _create("repmlp_res50_g4_8_320", pretrained, {**LARGE, "groups": (4, 8)}, **kwargs)
