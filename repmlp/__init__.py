"""Locality Injection for vision MLPs: train with convolutions beside fully-connected layers, deploy without them."""

import importlib
from typing import Any

import repmlp.models.face
import repmlp.models.mixers  # noqa: F401  (both register their networks with timm)
from repmlp.checkpoints import load, load_model, load_older, save, save_model
from repmlp.deployment import DeployedRepMLPNet, deploy
from repmlp.folding import fold_batch_norms
from repmlp.injection import InjectedLinear, inject_locality, merge_locality
from repmlp.layers import GlobalPerceptron, LocalPerceptron, RepMLPBlock, SetSharingFC
from repmlp.models.build import build_model
from repmlp.models.repmlp_resnet import RepMLPResNet, insert, load_older_backbone, resize_partitions
from repmlp.models.repmlpnet import RepMLPNet
from repmlp.reparam import BatchNormStats, Branch, conv_to_fc, fuse_bn, merge_branches
from repmlp.repmlp_block import RepMLP
from repmlp.resizing import resize

__version__ = "0.1.0"

ON_DEMAND = ("cost", "export", "finetuning", "locality", "statistics")  # modules, imported when they are first used


def __getattr__(name: str) -> Any:
    if name in ON_DEMAND:
        return importlib.import_module(f"repmlp.{name}")
    raise AttributeError(f"module 'repmlp' has no attribute {name!r}")


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
