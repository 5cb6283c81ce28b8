"""The words of the paper's kernel heatmap, which repmlp.kernel_figure draws: networks and data as people name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NETWORKS = {"repmlpnet": "RepMLPNet", "resmlp": "ResMLP", "gmlp": "gMLP", "repmlp": "RepMLP", "upernet": "UperNet"}
DATA = {
    "cifar100": "CIFAR-100", "imagenet": "ImageNet", "imagenette160": "Imagenette-160", "camvid": "CamVid",
    "cityscapes": "Cityscapes", "patterns": "the embedded patterns",
}  # fmt: skip


def network_words(config: Mapping[str, Any]) -> str:
    """Name a network as people do: repmlpnet_small is "RepMLPNet small"."""
    name = str(config.get("name") or config.get("variant") or config.get("arch") or "a network")
    first, _, rest = name.partition("_")
    return f"{NETWORKS.get(first, first)} {rest.replace('_', ' ')}".strip()
