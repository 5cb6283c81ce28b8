"""What may be asked of the benchmark, and the networks that it names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch

from repmlp.models.upernet import STRIDE
from repmlp.runs.settings import whole

from .older_networks import OLDER

WHAT = ("inference", "branches", "training", "merging", "conv_to_fc", "scaling", "segmentation", "precision", "older")
FORMS = ("plain", "train-time", "merged", "deployed-linear", "deployed")
ENGINES = ("eager", "compile", "onnxruntime", "openvino")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CIFAR = ("repmlpnet_cifar", "resmlp12_cifar")  # networks of ours for 32 pixels, which are not in timm's registry
MODELS = Path(__file__).resolve().parents[1] / "conf/model"


def check(options: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting that cannot be."""
    for name, known in (("what", WHAT), ("forms", FORMS)):
        if not isinstance(options[name], list) or any(value not in known for value in options[name]):
            raise ValueError(f"{name}={options[name]}: use a list of {', '.join(known)}")
    for name, known in (("engine", ENGINES), ("dtype", DTYPES), ("device", ("auto", "cpu", "cuda"))):
        if options[name] not in known:
            raise ValueError(f"{name}={options[name]!r}: use {', '.join(known)}")
    if options["device"] == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: torch finds no GPU here; use cpu")
    if options["engine"] in ("onnxruntime", "openvino") and options["dtype"] != "float32":
        raise ValueError(f"engine={options['engine']} runs in float32 alone, not in dtype={options['dtype']}")
    for name in ("batch_sizes", "training_batch_sizes"):
        if not all(type(n) is int and n > 0 for n in options[name]):
            raise ValueError(f"{name}={options[name]}: use a list of whole numbers, 1 or more")
    for name, least in (("threads", 1), ("rounds", 1), ("warmup", 0)):
        if options[name] is not None or name != "threads":
            whole(name, options[name], least)
    if "precision" in options["what"] and options["device"] == "cuda":
        raise ValueError("what=[precision] device=cuda: ONNX Runtime measures on a CPU here; use device=cpu")
    check_scaling(options)
    for name in options["older_models"]:
        if name not in OLDER:
            raise ValueError(f"older_models: {name!r} is none of {', '.join(OLDER)}")
    for text in options["models"] + options["training_models"] + options["precision_models"]:
        parse(text)
    for text in options["segmentation_models"]:
        parse_upernet(text)


def check_scaling(options: Mapping[str, Any]) -> None:
    """Raise ValueError for points to which no exponent can be fitted, or of which a layer cannot be made."""
    lists = {name: options[f"scaling_{name}"] for name in ("sides", "channels", "share_sets")}
    for name, points in lists.items():
        whole_numbers = isinstance(points, list) and all(type(n) is int and n > 0 for n in points)
        if not whole_numbers or len(set(points)) < 3 or points != sorted(set(points)):
            raise ValueError(f"scaling_{name}={points}: use a list of three or more growing whole numbers")
    channels, sets = (lists[name][(len(lists[name]) - 1) // 2] for name in ("channels", "share_sets"))
    for c, s in [*((c, sets) for c in lists["channels"]), *((channels, s) for s in lists["share_sets"])]:
        if c % s:
            raise ValueError(f"scaling_channels, scaling_share_sets: {s} share-sets do not divide {c} channels")


def parse(text: str) -> tuple[str, int]:
    """Split NAME or NAME@PIXELS; ValueError for an unknown network."""
    name, _, size = text.partition("@")
    if name in CIFAR:
        return name, 32
    if not timm.is_model(name) or (size and not size.isdigit()):
        raise ValueError(f"models: {text!r} is no network of timm or ours (NAME or NAME@PIXELS)")
    return name, int(size) if size else timm.get_pretrained_cfg(name).input_size[-1]


def parse_upernet(text: str) -> tuple[str, tuple[int, int]]:
    """Split NAME@HEIGHTxWIDTH; ValueError for an unknown network, or a size that it cannot take."""
    found = re.fullmatch(r"(upernet\w*)@([1-9]\d*)x([1-9]\d*)", text)
    if not found or not (MODELS / f"{found[1]}.yaml").is_file():
        raise ValueError(f"segmentation_models: {text!r} is no upernet of experiments/conf/model/ (NAME@HEIGHTxWIDTH)")
    height, width = int(found[2]), int(found[3])
    if height % STRIDE or width % STRIDE:
        raise ValueError(f"segmentation_models: {text!r}: height and width have to be multiples of {STRIDE}")
    return found[1], (height, width)
