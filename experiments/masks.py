"""What evaluate.py and predict.py do with a network that labels pixels: mIoU before and after merging, label maps.

Whole images go in, in windows where the network was evaluated in windows when it was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2

from repmlp.data import build_segmentation_data
from repmlp.data.decoded import to_tensor
from repmlp.models.build import check_num_classes
from repmlp.models.pspnet import PSPNet
from repmlp.models.repmlp_partitions import takes_any_size
from repmlp.models.upernet import predict
from repmlp.runs.key import PATHS
from repmlp.runs.progress import told
from repmlp.runs.provenance import measured_on
from repmlp.trained_on import TrainedOn
from repmlp.training.segmenter import compare_merged_masks


def evaluate_masks(config: DictConfig, net: nn.Module, trained: TrainedOn, device: torch.device) -> dict[str, Any]:
    """Run a network and its merged form over the same images.

    Returns what the JSON file holds: all that compare_merged_masks says; images, data, window, device, versions.
    Raises ValueError for what such a network is not measured in: other precisions, an ONNX file.
    """
    for name, neutral in (("precisions", ["float32"]), ("onnx", None), ("calibration_images", None)):
        if config[name] != neutral:
            raise ValueError(f"{name}={config[name]}: a network that labels pixels is evaluated in float32 alone")
    settings = OmegaConf.to_container(config.data, resolve=True)
    data = build_segmentation_data(settings, batch_size=1, seed=0, evaluation_only=True)
    data.prepare_data()
    check_num_classes(config.checkpoint, net, settings["name"], data.info.num_classes)
    data.setup()
    n, window = data.n_images[1], window_of(trained, net)
    metrics = compare_merged_masks(net.to(device), told(data.whole_evaluation(), n), data.info.classes, window)
    return {
        "checkpoint": str(config.checkpoint),
        "data": {name: value for name, value in settings.items() if name not in (*PATHS, "n_train")},
        "images": n,
        "window": window,
        **metrics,
        **measured_on(device, ["torch", "timm"]),
    }


def window_of(trained: TrainedOn, net: nn.Module) -> list[int] | None:
    """Return the (height, width) of windows that a network sees images in, None where it sees them whole.

    Those of its training; where the file does not tell, the one size that a network may be built for.
    """
    if not trained.window and isinstance(net, PSPNet) and not takes_any_size(net.backbone):
        return list(net.backbone.img_size)
    return list(trained.window) or None


def mask_table(results: Mapping[str, Any]) -> str:
    """Write the results as Markdown tables, with what has to be known to read them below."""
    rows = [
        {"network": "as trained, float32", "mIoU %": f"{results['miou_pct']:.2f}"},
        {"network": "merged, float32", "mIoU %": f"{results['miou_merged_pct']:.2f}"},
    ]
    classes = [
        {"class": name, "IoU %": "-" if iou is None else f"{iou:.2f}"} for name, iou in results["class_iou_pct"].items()
    ]
    seen = "whole" if results["window"] is None else "in windows of {}x{} pixels".format(*results["window"])
    told_versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return "\n".join(
        [
            pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True),
            "",
            pd.DataFrame(classes).to_markdown(index=False, disable_numparse=True),
            "",
            f"{results['images']} images of {results['data'].get('label', results['data']['name'])}, {seen}; "
            f"{results['device']}, {results['threads']} thread(s), {told_versions}. IoU of the classes as trained; "
            f"pixel accuracy {results['pixel_accuracy_pct']:.2f} %. Merging changed the logits by "
            f"{results['merge_error']:.1e} (relative) and the guess of {results['merge_disagreements']:,} of "
            f"{results['eval_pixels']:,} pixels.",
        ]
    )


def whole_image(trained: TrainedOn) -> v2.Transform:
    """Return what brings an image of any size to (3, H, W), as evaluation did: normalised, not resized."""
    return v2.Compose(to_tensor(trained.mean, trained.std))


def mask_rows(
    model: nn.Module,
    read: Iterator[tuple[list[Path], Tensor]],
    folder: Path,
    window: Sequence[int] | None,
    classes: int,
) -> Iterator[list[str]]:
    """Write a label map of each image into a folder, and give the rows of the table: image, map, share of each class.

    A map is a PNG of one channel, as large as the image, whose values are the numbers of the classes; it is called as
    the image, with .png behind its whole name.
    """
    device = next(model.parameters()).device
    for paths, images in read:
        for path, image in zip(paths, images, strict=True):
            # (1, K, H, W) -> (H, W)
            mask = predict(model, image[None].to(device), window).argmax(dim=1)[0].to(torch.uint8).cpu()
            target = folder / f"{path.as_posix()}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask.numpy()).save(target)
            shares = np.bincount(mask.flatten().numpy(), minlength=classes) / mask.numel()
            yield [path.as_posix(), f"{folder.name}/{path.as_posix()}.png", *(f"{share:.6f}" for share in shares)]
