"""Locality Injection for vision MLPs: train with convolutions beside fully-connected layers, deploy without them.

Names and modules are imported when they are first used, so that a command that needs no network says its help at once.
Our networks are registered with timm as soon as timm is imported, before or after this package.
"""

import importlib
from typing import TYPE_CHECKING, Any

from repmlp.imports import register_with_timm, submodule

if TYPE_CHECKING:  # for editors and type checkers; HOMES says the same, which a test holds
    from repmlp.checkpoints import load, load_model, load_older, save, save_model
    from repmlp.deployment import DeployedRepMLPNet, deploy
    from repmlp.folding import fold_batch_norms
    from repmlp.injection import InjectedLinear, inject_locality, merge_locality
    from repmlp.layers import GlobalPerceptron, RepMLPBlock, SetSharingFC
    from repmlp.local_perceptron import LocalPerceptron
    from repmlp.models.build import build_model
    from repmlp.models.repmlp_insertion import insert
    from repmlp.models.repmlp_partitions import resize_partitions
    from repmlp.models.repmlp_resnet import RepMLPResNet
    from repmlp.models.repmlp_weights import load_older_backbone
    from repmlp.models.repmlpnet import RepMLPNet
    from repmlp.reparam import BatchNormStats, Branch, conv_to_fc, fuse_bn, merge_branches
    from repmlp.repmlp_block import RepMLP
    from repmlp.resizing import resize

__version__ = "0.1.0"

HOMES = {  # module: the names that this package shows of it
    "checkpoints": ("load", "load_model", "load_older", "save", "save_model"),
    "deployment": ("DeployedRepMLPNet", "deploy"),
    "folding": ("fold_batch_norms",),
    "injection": ("InjectedLinear", "inject_locality", "merge_locality"),
    "layers": ("GlobalPerceptron", "RepMLPBlock", "SetSharingFC"),
    "local_perceptron": ("LocalPerceptron",),
    "models.build": ("build_model",),
    "models.repmlp_insertion": ("insert",),
    "models.repmlp_partitions": ("resize_partitions",),
    "models.repmlp_resnet": ("RepMLPResNet",),
    "models.repmlp_weights": ("load_older_backbone",),
    "models.repmlpnet": ("RepMLPNet",),
    "reparam": ("BatchNormStats", "Branch", "conv_to_fc", "fuse_bn", "merge_branches"),
    "repmlp_block": ("RepMLP",),
    "resizing": ("resize",),
}
_HOME_OF = {name: home for home, names in HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(importlib.import_module(f"repmlp.{_HOME_OF[name]}"), name)
        globals()[name] = value  # the next use takes it as it is
        return value
    return submodule("repmlp", name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})


__all__ = [
    "BatchNormStats",
    "Branch",
    "DeployedRepMLPNet",
    "GlobalPerceptron",
    "InjectedLinear",
    "LocalPerceptron",
    "RepMLP",
    "RepMLPBlock",
    "RepMLPNet",
    "RepMLPResNet",
    "SetSharingFC",
    "build_model",
    "conv_to_fc",
    "deploy",
    "fold_batch_norms",
    "fuse_bn",
    "inject_locality",
    "insert",
    "load",
    "load_model",
    "load_older",
    "load_older_backbone",
    "merge_branches",
    "merge_locality",
    "resize",
    "resize_partitions",
    "save",
    "save_model",
]

register_with_timm()
