"""Locality Injection for vision MLPs: train with convolutions beside fully-connected layers, deploy without them."""

import repmlp.models.mixers  # noqa: F401  (registers its networks with timm)
from repmlp.deployment import DeployedRepMLPNet, deploy
from repmlp.injection import InjectedLinear, inject_locality, merge_locality
from repmlp.layers import GlobalPerceptron, LocalPerceptron, RepMLPBlock, SetSharingFC
from repmlp.models.build import build_model, load_model, save_model
from repmlp.models.repmlpnet import RepMLPNet
from repmlp.models.resmlp import ResMLP
from repmlp.reparam import BatchNormStats, Branch, conv_to_fc, fuse_bn, merge_branches
from repmlp.resizing import resize

__version__ = "0.1.0"

__all__ = [
    "BatchNormStats",
    "Branch",
    "DeployedRepMLPNet",
    "GlobalPerceptron",
    "InjectedLinear",
    "LocalPerceptron",
    "RepMLPBlock",
    "RepMLPNet",
    "ResMLP",
    "SetSharingFC",
    "build_model",
    "conv_to_fc",
    "deploy",
    "fuse_bn",
    "inject_locality",
    "load_model",
    "merge_branches",
    "merge_locality",
    "resize",
    "save_model",
]
