"""Images a second of UperNet with each of its backbones, as trained and merged, one image at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import OmegaConf

from repmlp import RepMLPNet
from repmlp.cost import count_macs
from repmlp.models.build import build_model, merged_copy

from .bench import Bench, Case
from .engines import runner
from .networks import configuration
from .settings import parse_upernet

CITYSCAPES = 19  # classes


def measure(bench: Bench, options: Mapping[str, Any]) -> None:
    engine = options["engine"]
    cases = []
    for text in options["segmentation_models"]:
        name, (height, width) = parse_upernet(text)
        torch.manual_seed(0)
        model = build_model(OmegaConf.to_container(configuration(name)), CITYSCAPES).eval()
        forms = {"train-time": model}
        if isinstance(model.backbone, RepMLPNet):  # others have nothing to merge
            forms["merged"] = merged_copy(model)
        for form, net in forms.items():
            fact = {
                "model": name,
                "form": form,
                "size": f"{height}x{width}",
                "macs": count_macs(net, (height, width)),
                "engine": engine,
            }
            run = runner(net, engine, torch.randn(1, 3, height, width), bench)
            cases.append(Case(f"{text:28s} {form:10s}", fact, run))
    title = f"segmentation, {engine}: {len(cases)} networks"
    bench.measure("segmentation", title, cases, batch_size=1, beside_matmul=True)
