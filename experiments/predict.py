"""Tell the classes of own images: a CSV with names and probabilities.

    python experiments/predict.py checkpoint=outputs/train_imagenet/KEY/model.safetensors images=FOLDER
    python experiments/predict.py checkpoint=FILE images=photo.jpg out=guesses/photo.csv merged=false
    python experiments/predict.py checkpoint=FILE images=FOLDER out=pixels.csv   # labels of pixels: maps in pixels/

The network is merged first (merged=false leaves it as it was trained). Class names, normalisation and image size are
those that stand beside the weights; a file that has none tells classes by number, with ImageNet's normalisation. Images
of any size and kind, in FOLDER and all folders below it, hidden ones left out. An image that cannot be read is named
and left out, and makes the exit status 1. A file of the same name is replaced once the new one has rows.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from repmlp.runs.command_line import place
from repmlp.runs.launch import checkpoint_of, device_of, mistakes_in_one_line, run_command
from repmlp.runs.progress import to_stderr, told
from repmlp.runs.settings import whole
from repmlp.trained_on import TrainedOn

if TYPE_CHECKING:  # torch and what needs it is imported where it is used: --help comes without
    from torch import Tensor, nn
    from torchvision.transforms import v2


@hydra.main(version_base="1.3", config_path="conf", config_name="predict")
def main(config: DictConfig) -> None:
    with mistakes_in_one_line():
        unreadable = predict(config)
    if unreadable:
        sys.exit(f"error: {len(unreadable)} image(s) could not be read, named above; the others are written")


def predict(config: DictConfig) -> list[Path]:
    """Write the CSV, and beside it maps where the network labels pixels; returns the images that could not be read.

    Rows are written as they are computed, and what there is of them is kept where something breaks.
    Raises ValueError for settings that cannot be, and where no image can be read.
    """
    check(config)
    checkpoint_of(config)
    folder, files = images_of(config.images)
    import torch

    with torch.inference_mode():
        return write_table(config, folder, files)


def write_table(config: DictConfig, folder: Path, files: list[Path]) -> list[Path]:
    """Write what the network says of some images in a folder; returns those that could not be read."""
    from masks import mask_rows, whole_image, window_of

    from repmlp.checkpoints import open_checkpoint
    from repmlp.data.imagenet import eval_transform
    from repmlp.export import image_size
    from repmlp.models.build import PIXELS, merged_copy

    out = place(config.out)
    model, settings, metadata = open_checkpoint(checkpoint_of(config))
    trained = TrainedOn.from_metadata(metadata)
    device = device_of(config.device)
    model = (merged_copy(model) if config.merged else model).to(device).eval()
    names = trained.class_names or [str(number) for number in range(model.num_classes)]
    interpolation = trained.data.get("interpolation") or "bilinear"
    header, masks = ["image", "class", "probability", *(f"p({name})" for name in names)], None
    if settings["arch"] in PIXELS:
        header, masks = ["image", "labels", *(f"share({name})" for name in names)], out.with_suffix("")
        among = masks == folder or folder in masks.parents or masks in folder.parents
        if place(config.images).is_dir() and among:  # they would be images of the next call
            raise ValueError(f"out={config.out}: the label maps would go to {masks}, among the images: choose another")
        transform, size = whole_image(trained), 1
    else:
        transform = eval_transform(image_size(model, settings), interpolation, trained.mean, trained.std)
        size = config.batch_size

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")  # a file of the same name is there until the new one has rows
    unreadable: list[Path] = []
    written = 0
    try:
        with open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            read = told(batches(folder, files, transform, size, unreadable), len(files))
            if masks is None:
                rows = label_rows(model, read, names)
            else:
                rows = mask_rows(model, read, masks, window_of(trained, model), len(names))
            for row in rows:
                writer.writerow(row)
                file.flush()
                written += 1
    finally:
        if written:
            partial.replace(out)
            print(f"{written} of {len(files)} images -> {out}")
        else:
            partial.unlink(missing_ok=True)
    if not written:
        raise ValueError(f"images={config.images}: none of {len(files)} image(s) could be read, {out} is not written")
    return unreadable


def check(config: DictConfig) -> None:
    """Raise ValueError for settings that cannot be."""
    if not config.images:
        raise ValueError("which images? pass images=FOLDER")
    if not isinstance(config.merged, bool):
        raise ValueError(f"merged={config.merged!r}: use true or false")
    whole("batch_size", config.batch_size, 1)
    out = place(config.out or "")
    if out.is_dir() or out.suffix.lower() != ".csv":  # so that no image or checkpoint is ever replaced
        raise ValueError(f"out={config.out}: name a file that ends in .csv")


def images_of(given: str) -> tuple[Path, list[Path]]:
    """Return a folder and the images in it and below it, relative to it; a single file, whatever its suffix, too.

    Raises ValueError where there is none.
    """
    where = place(given)
    if where.is_file():
        return where.parent, [Path(where.name)]
    if not where.is_dir():
        raise ValueError(f"images={given}: there is no such folder or file (looked for {where})")
    from repmlp.data.files import IMG_EXTENSIONS, images_below

    files = list(images_below(where))
    if not files:
        raise ValueError(f"images={given}: no images in {where} and the folders below it ({', '.join(IMG_EXTENSIONS)})")
    return where, files


def label_rows(
    model: nn.Module, read: Iterable[tuple[list[Path], Tensor]], names: Sequence[str]
) -> Iterator[list[str]]:
    """Give the rows of the table: image, class, its probability, those of all classes."""
    device = next(model.parameters()).device
    for paths, images in read:
        if paths:
            for path, probabilities in zip(paths, model(images.to(device)).softmax(dim=1).cpu(), strict=True):
                best = int(probabilities.argmax())
                numbers = [f"{float(p):.6f}" for p in probabilities]
                yield [path.as_posix(), names[best], numbers[best], *numbers]


def batches(
    folder: Path, files: list[Path], transform: v2.Transform, size: int, unreadable: list[Path]
) -> Iterator[tuple[list[Path], Tensor]]:
    """Give images in batches, (B, 3, H, W); those that cannot be read are told of and go to `unreadable`."""
    import torch

    from repmlp.data.files import read_rgb

    for start in range(0, len(files), size):
        paths, images = [], []
        for path in files[start : start + size]:
            try:
                images.append(transform(read_rgb(folder / path)))
                paths.append(path)
            except ValueError as error:
                to_stderr(f"left out: {error}")
                unreadable.append(path)
        yield paths, torch.stack(images) if images else torch.empty(0)


if __name__ == "__main__":
    run_command(main, Path(__file__).resolve().parents[1])
