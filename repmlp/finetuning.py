"""Start a network from the weights of another: other classes, another image size, more branches.

Not in the papers, which train every network from nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from repmlp.checkpoints import open_checkpoint
from repmlp.models.repmlpnet import RepMLPNet
from repmlp.resizing import resize
from repmlp.trained_on import TrainedOn


def classifier_of(net: nn.Module) -> nn.Module:
    """Return the classifier of a network, timm's `get_classifier()`; ValueError where it does not say which it is."""
    head = net.get_classifier() if hasattr(net, "get_classifier") else None
    if head is None or not any(True for _ in head.parameters()):
        raise ValueError(f"{type(net).__name__} does not say which its classifier is: it has no get_classifier()")
    return head


class Start(NamedTuple):
    """What a network took from a file of weights.

    fresh: names of the modules that keep their own initial values. resized: (height, width) that the weights were
    trained for, where their fully-connected layers were interpolated; None where they were not.
    """

    fresh: tuple[str, ...]
    resized: tuple[int, int] | None

    def __str__(self) -> str:
        words = [f"fresh: {', '.join(self.fresh) or 'nothing'}"]
        if self.resized:
            words.append(f"resized from {self.resized[0]}x{self.resized[1]} pixels (repmlp.resize)")
        return "; ".join(words)


def start_from(net: nn.Module, path: Path | str, classes: Sequence[str] = ()) -> Start:
    """Load the weights of a file into a network, in place, as far as they are the same network's.

    The classifier stays fresh where it has other classes, by their number or by their names, and so do branches that
    the file has not. A RepMLPNet trained at another image size is resized first (see repmlp.resize).

    net: train-time network with `get_classifier()`, as timm's have it. path: what `repmlp.load` reads.
    classes: names of the network's classes, where they are known; compared with those that a file of ours tells.
    Raises FileNotFoundError; ValueError, before anything is changed, where the file holds merged weights, branches that
    the network has not, or another network, naming the first parameter that differs.
    """
    model, _, metadata = open_checkpoint(path)
    trained = TrainedOn.from_metadata(metadata).class_names
    other_classes = bool(trained and classes) and trained != tuple(classes)
    resized = None
    if isinstance(model, RepMLPNet) and isinstance(net, RepMLPNet) and model.img_size != net.img_size:
        resized, model = model.img_size, resize(model, net.img_size)
    own, there = net.state_dict(), model.state_dict()
    head = next(name for name, module in net.named_modules() if module is classifier_of(net))
    fresh: dict[str, None] = {}
    for name in [*own, *(name for name in there if name not in own)]:
        module = name.rpartition(".")[0]
        same = name in own and name in there and own[name].shape == there[name].shape
        if same and not (other_classes and module == head):
            continue
        if module == head and name in own:
            fresh[head] = None
        elif ".local_perceptron." in name and name not in there:
            fresh[module] = None
        elif ".norm." in name and name not in there:
            raise ValueError(
                f"{path}: {name} is missing: the file holds merged weights; start from those before reparameterize()"
            )
        elif ".local_perceptron." in name:
            raise ValueError(f"{path}: it has a branch {module} that the network has not: use the kernels of the file")
        elif name in own and name in there:
            raise ValueError(f"{path}: {name} is {tuple(there[name].shape)} there and {tuple(own[name].shape)} here")
        else:
            raise ValueError(f"{path}: {name} is {'missing' if name in own else 'unexpected'}: it is another network's")
    kept = {name for name in own if name.rpartition(".")[0] in fresh}
    net.load_state_dict({name: own[name] if name in kept else there[name] for name in own})
    return Start(tuple(fresh), resized)
