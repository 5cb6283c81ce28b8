"""Build a ResNet with RepMLP blocks out of its weights, or start a backbone from them.

Paper: RepMLP (arXiv 2105.01883), Sections 4.2 and 4.4.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor

from repmlp.branches import values
from repmlp.folding import fold_batch_norms
from repmlp.models.repmlp_partitions import STAGES, check_resnet
from repmlp.models.repmlp_resnet import RepMLPResNet, checkpoint_filter_fn, in_our_names


def from_weights(state_dict: Mapping[str, Any]) -> ResNet:
    """Build the network that weights of the older code, or ours, are of, in evaluation mode, and load them.

    Paper: RepMLP Section 4.2. Read off the names and shapes: blocks, stages, kind of block, r, g, partitions, branches,
    classes, and whether the file is written while training or converted (then the network has no batch norms).
    Maps and partitions are taken to be square, because weights hold h*w alone.
    Raises ValueError where they are of no network of this kind.
    """
    weights = in_our_names(state_dict)
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
    check_resnet(backbone)
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
