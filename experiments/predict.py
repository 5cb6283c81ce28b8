"""Tell the classes of images in a folder: a CSV with names and probabilities.

    python experiments/predict.py checkpoint=outputs/train_imagenette160/KEY/model.safetensors images=FOLDER

The network is merged first (merged=false leaves it as it was trained). Class names, normalisation and image size are
those that stand beside the weights; a file that has none says classes by number, with ImageNet's normalisation. Images
of any size, in FOLDER and the folders in it; an image that cannot be read is named and left out, and makes the exit
status 1.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2

from repmlp.checkpoints import open_checkpoint
from repmlp.export import image_size
from repmlp.models.build import merged_copy
from repmlp.runs.launch import device_of, mistakes_in_one_line, place, run_command


@hydra.main(version_base="1.3", config_path="conf", config_name="predict")
def main(config: DictConfig) -> None:
    with mistakes_in_one_line():
        unreadable = predict(config)
    if unreadable:
        sys.exit(f"error: {len(unreadable)} image(s) could not be read, e.g. {unreadable[0]}; the others are written")


@torch.inference_mode()
def predict(config: DictConfig) -> list[Path]:
    """Write the CSV; returns the images that could not be read."""
    for name, value in (("checkpoint", config.checkpoint), ("images", config.images)):
        if not value:
            raise ValueError(f"which {name}? pass {name}={'FILE' if name == 'checkpoint' else 'FOLDER'}")
    folder = place(config.images)
    if not folder.is_dir():
        raise ValueError(f"images={config.images}: there is no such folder (looked for {folder})")
    files = [f for f in sorted(folder.rglob("*")) if f.suffix.lower() in IMG_EXTENSIONS and not f.name.startswith(".")]
    if not files:
        raise ValueError(f"images={config.images}: no images in {folder}")
    model, settings, metadata = open_checkpoint(place(config.checkpoint))
    if not hasattr(model, "num_classes") or settings["arch"] in ("upernet", "pspnet"):
        raise ValueError(f"{config.checkpoint} labels pixels: this command tells classes of whole images")
    device = device_of(config.device)
    model = (merged_copy(model) if config.merged else model).to(device).eval()
    names = json.loads(metadata.get("classes", "[]")) or [str(number) for number in range(model.num_classes)]
    transform = transform_of(metadata, image_size(model, settings))
    out = place(config.out)
    unreadable: list[Path] = []
    with open(out, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "class", "probability", *(f"p({name})" for name in names)])
        for paths, images in batches(files, transform, config.batch_size, unreadable):
            for path, probabilities in zip(paths, model(images.to(device)).softmax(dim=1).cpu(), strict=True):
                best = int(probabilities.argmax())
                numbers = [f"{float(p):.6f}" for p in probabilities]
                writer.writerow([path.relative_to(folder).as_posix(), names[best], numbers[best], *numbers])
    print(f"{len(files) - len(unreadable)} images -> {out}")
    return unreadable


def transform_of(metadata: Mapping[str, str], size: tuple[int, int]) -> v2.Transform:
    """Return what brings an image to (3, H, W), as evaluation did: shorter side resized, middle cropped, normalised."""
    numbers = json.loads(metadata.get("normalisation", "{}"))
    mean, std = numbers.get("mean", IMAGENET_DEFAULT_MEAN), numbers.get("std", IMAGENET_DEFAULT_STD)
    interpolation = json.loads(metadata.get("data", "{}")).get("interpolation") or "bilinear"
    return v2.Compose(
        [
            v2.Resize(min(size), interpolation=v2.InterpolationMode(interpolation)),
            v2.CenterCrop(size),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )


def batches(
    files: list[Path], transform: v2.Transform, size: int, unreadable: list[Path]
) -> Iterator[tuple[list[Path], Tensor]]:
    """Give images in batches, (B, 3, H, W); those that cannot be read go to `unreadable`."""
    for start in range(0, len(files), size):
        paths, images = [], []
        for path in files[start : start + size]:
            try:
                with Image.open(path) as image:
                    images.append(transform(image.convert("RGB")))
                paths.append(path)
            except Exception:  # Pillow has no error type of its own: a damaged file fails in any of a dozen ways
                unreadable.append(path)
        if paths:
            yield paths, torch.stack(images)


if __name__ == "__main__":
    run_command(main, Path(__file__).resolve().parents[1])
