"""Locality Injection for vision MLPs: train with convolutions beside fully-connected layers, deploy without them."""

import repmlp.small_mlps  # noqa: F401  (registers its networks with timm)
from repmlp.deploy import DeployedRepMLPNet, deploy
from repmlp.inject import BatchNormStats, Branch, conv_to_fc, fuse_bn, merge_branches
from repmlp.layers import GlobalPerceptron, LocalPerceptron, RepMLPBlock, SetSharingFC
from repmlp.models import build_model, load_model, save_model
from repmlp.repmlpnet import RepMLPNet
from repmlp.resize import resize
from repmlp.resmlp import ResMLP
from repmlp.universal import InjectedLinear, inject_locality, merge_locality

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
