"""The networks that are measured, with random weights, and the forms that they are brought into."""

from __future__ import annotations

import copy
from collections.abc import Callable

import timm
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from repmlp import RepMLP, RepMLPNet, deploy, fold_batch_norms
from repmlp.cost import count_params
from repmlp.models.build import merged_copy
from repmlp.models.mixers import build_resmlp
from repmlp.products import usual_product

from .plain_net import PlainRepMLPNet
from .settings import MODELS

CONSTRUCTORS: dict[str, Callable[..., nn.Module]] = {"repmlpnet_cifar": RepMLPNet, "resmlp12_cifar": build_resmlp}


def build(name: str, img_size: int, kernels: tuple[int, ...] = (1, 3)) -> nn.Module:
    """Build a network with random weights, in evaluation mode; kernels: of the branches of ours."""
    torch.manual_seed(0)
    if name in CONSTRUCTORS:
        return CONSTRUCTORS[name](kernels=kernels).eval()
    fixed = {"img_size": img_size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    return timm.create_model(name, **fixed, **({"kernels": kernels} if name.startswith("repmlpnet") else {})).eval()


def is_ours(name: str) -> bool:
    """Tell whether a network has branches to merge, and so several forms."""
    return name in CONSTRUCTORS or name.startswith("repmlpnet")


def configuration(name: str) -> DictConfig:
    """Read a network of conf/model/, which may be another one with changes."""
    own = OmegaConf.load(MODELS / f"{name}.yaml")
    bases = [configuration(base) for base in own.pop("defaults", []) if base != "_self_"]
    return OmegaConf.merge(*bases, own)


def in_form(model: nn.Module, form: str) -> nn.Module | None:
    """Bring one of our networks into a form; None where it has none such."""
    if form == "train-time":
        return model
    if form == "merged":
        return merged_copy(model)
    if not isinstance(model, RepMLPNet):
        return None
    if form == "plain":
        return PlainRepMLPNet(in_form(model, "merged"))
    if form == "deployed":
        return deploy(model)
    # deployed-linear: where that is what suits the processor, it would be the deployed form once more
    return None if usual_product() == "linear" else deploy(model, products="linear")


def params(model: nn.Module) -> int:
    """Count the learnable parameters; all of them in a deployed network, which has none that learn."""
    return count_params(model) or sum(p.numel() for p in model.parameters())


def fused(model: nn.Module) -> nn.Module:
    """Fold the batch norms that follow a convolution, as the paper does for CNNs, in timm's layers too."""
    if any(isinstance(m, RepMLP) for m in model.modules()):
        return fold_batch_norms(model)  # which merges the blocks first; their partitions are not traced

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, nn.BatchNorm2d) or super().is_leaf_module(module, name)

    if not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        return model
    model = copy.deepcopy(model)
    graph = Tracer().trace(model)
    modules = dict(model.named_modules())
    for node in graph.nodes:
        norm = modules.get(node.target) if node.op == "call_module" else None
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        before = node.args[0]
        conv = modules.get(before.target) if before.op == "call_module" else None
        if isinstance(conv, nn.Conv2d) and len(before.users) == 1:
            model.set_submodule(before.target, fuse_conv_bn_eval(conv, norm))
            # timm's BatchNormAct2d ends with dropout and an activation
            rest = nn.Sequential(norm.drop, norm.act) if hasattr(norm, "act") else nn.Identity()
            model.set_submodule(node.target, rest)
    return model.eval()
