"""Measure whether a segmentation network is worse at the borders of its tiles.

    python experiments/borders.py checkpoint=outputs/STUDY/KEY/model.safetensors data.root=FOLDER
    python experiments/borders.py checkpoint=FILE data.root=FOLDER tile=96      # a ResNet, same grid: the control
    python analysis/plot_borders.py STUDY                        # what was found: all networks of a study side by side

Paper: RepMLPNet Appendix B. RepMLPNet cuts its maps into tiles of the trained size, at every stage the same pixels of
the image, and no FC looks across; a network that suffers from it would be worse near the lines between tiles.

What lies at a line depends on the picture (the road is at the bottom), so one pass over the images says little. Here
every pixel is seen under every phase of the grid. Of each image crops of whole tiles are taken, with the top left
corner at (y, x), y and x in {0, step, ..., tile - step}: natural images without padding, each with a grid that begins
at its own corner; 9 crops of 288x384 for 360x480 pixels, tile 96 and step 32. What counts are the pixels inside all
crops and at least `margin` from every crop's edges, each of them once in every phase.

The distance of a pixel to the nearest line is the smaller one of those along the two axes. Along one axis the phases
of a pixel are `step` apart, so with tile 96 and step 32 it has exactly one phase in each of [0, 16), [16, 32) and
[32, 48), and over both axes 5, 3 and 1 of its 9: in bins of 16 pixels its position in the image cancels. So that it
does in finer bins too, every view of a pixel is compared with the one in which the same pixel lies in the middle of a
tile, at least (tile - step) / 2 pixels from all lines; there is exactly one. near - far in the tables is the accuracy
of all views within 8 pixels of a line less that of the same pixels seen from the middle.

What does not cancel: a pixel in the middle of a tile is nearer to the crop's edge than one at a line inside the crop
in some phases and farther in others, and convolutions feel that edge from afar. A network without tiles, measured
with the same grid, shows how much that is; analysis/plot_borders.py subtracts it.

Errors that hit a whole tile are as frequent in its middle as at its border and show at its edges alone. So the pairs of
neighbouring pixels that a line runs between in some phase are looked at too: how often the two guesses differ where
the line is there, and how often the same two differ where it is elsewhere.

The network is merged first. Written: the counts of every image, results/<study>/borders/<key>.json, and beside it some
images with their guesses, <key>.npz, of which plot_borders.py makes pictures. Relative paths are anchored at the
repository.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from repmlp.runs.key import PATHS
from repmlp.runs.launch import checkpoint_of, device_of, mistakes_in_one_line, run_command
from repmlp.runs.record import write_json
from repmlp.runs.settings import whole

if TYPE_CHECKING:  # torch and what needs it is imported where it is used: --help comes without
    import numpy as np
    from border_counts import Picture
    from torch import Tensor

    from repmlp.data.segmentation import SegmentationInfo
    from repmlp.models.upernet import UperNet

NEAR = 8  # pixels from a line: closer ones are near
BINS = (1, 2, 4, 8)  # widths of bins: those that NEAR is a multiple of
LARGEST = 30_000  # counts in a file, to keep it below 500 kB


@hydra.main(version_base="1.3", config_path="conf", config_name="borders")
def main(config: DictConfig) -> None:
    with mistakes_in_one_line():
        path, results = borders(config)
        print(
            f"{results['model']}, {results['n_images']} images of {results['data']}, tile {results['tile']}: counted "
            f"under {results['views']} phases; python analysis/plot_borders.py {results['study'] or 'STUDY'} says what "
            "was found"
        )
        print(path)


def borders(config: DictConfig) -> tuple[Path, dict[str, Any]]:
    """Measure a network and write what was counted; returns where it is and what is in the file.

    Raises ValueError for settings that cannot be, and for a network or a data set that cannot be measured.
    """
    check(config)
    checkpoint = checkpoint_of(config)
    import numpy as np
    import torch
    from border_counts import measure

    from repmlp.checkpoints import load_model
    from repmlp.data import build_segmentation_data
    from repmlp.models.build import check_num_classes, merged_copy
    from repmlp.models.upernet import UperNet
    from repmlp.runs.provenance import git_state, measured_on

    if config.threads:
        torch.set_num_threads(config.threads)
    device = device_of(config.device)
    net, metadata = load_model(checkpoint)
    if not isinstance(net, UperNet):
        raise ValueError(
            f"{checkpoint} is a {type(net).__name__}: borders of tiles are measured of a UperNet alone; train one with "
            "experiments/segment.py"
        )
    path = output_path(config, metadata)
    tile = tile_of(net, config.tile)
    check_grid(tile, config.step, config.bin)
    settings = OmegaConf.to_container(config.data, resolve=True)
    data = build_segmentation_data(settings, batch_size=1, seed=0, evaluation_only=True)
    data.prepare_data()
    check_num_classes(checkpoint, net, settings["name"], data.info.num_classes)
    data.setup()
    names = data.eval_names
    bins = tile // 2 // config.bin
    if 3 * bins * len(names) > LARGEST:
        raise ValueError(
            f"bin={config.bin}: {bins} distances of {len(names)} images are too much for a small file; use wider bins, "
            "up to bin=8, or fewer images, n_images=N"
        )

    merged = merged_copy(net).to(device)
    pairs = (pair for batch in data.whole_evaluation() for pair in zip(*batch, strict=True))
    samples = ((name, image.to(device), mask) for name, (image, mask) in zip(names, pairs, strict=True))
    drawn = {names[i] for i in np.linspace(0, len(names) - 1, config.pictures).round().astype(int)}
    counts, pictures = measure(merged, samples, tile, config.step, config.margin, config.bin, drawn)
    model = json.loads(metadata["repmlp_model"])
    results = {
        "study": metadata.get("study"),
        "key": metadata.get("key"),
        "model": model.get("name", model["arch"]),
        "tiled": is_tiled(net),
        "data": settings.get("label", settings["name"]),
        "tile": tile,
        **{name: config[name] for name in ("step", "margin", "bin", "block")},
        "near": NEAR,
        "far": (tile - config.step) // 2,
        "views": (tile // config.step) ** 2,
        "n_images": len(names),
        "distances": list(range(0, tile // 2, config.bin)),
        **{name: value.tolist() for name, value in counts._asdict().items()},
        **measured_on(device, ("torch", "timm", "numpy", "segmentation-models-pytorch")),
        **git_state(),
        "config": {"model": model, "data": {name: value for name, value in settings.items() if name not in PATHS}},
    }
    write_json(path, results)
    if pictures:
        write_pictures(path.with_suffix(".npz"), pictures, data.info, tile)
    return path, results


def is_tiled(net: UperNet) -> bool:
    """Tell whether a network cuts its maps into tiles: whether its backbone is a RepMLPNet."""
    from repmlp.models.repmlpnet import RepMLPNet

    return isinstance(net.backbone, RepMLPNet)


def tile_of(net: UperNet, tile: int | None) -> int:
    """Return the side of the tiles: the network's own, or what was said for a network without; ValueError otherwise."""
    if not is_tiled(net):
        if tile is None:
            raise ValueError(
                "this network has no tiles: say tile=N, the tile in pixels of the network that it is compared with"
            )
        return tile
    height, width = net.backbone.img_size
    if height != width:
        raise ValueError(f"the network's tiles are {height}x{width} pixels: only square ones can be measured")
    if tile not in (None, height):
        raise ValueError(f"tile={tile}: the network's own tiles are {height} pixels wide; leave tile=null")
    return height


def output_path(config: DictConfig, metadata: Mapping[str, str]) -> Path:
    """Return where the JSON file goes; ValueError where neither `out` nor the checkpoint says it."""
    if config.out:
        path = Path(config.out).expanduser()
        if path.suffix != ".json":
            raise ValueError(f"out={config.out}: name a file that ends in .json")
        return path
    if not metadata.get("study") or not metadata.get("key"):
        raise ValueError(f"{config.checkpoint} does not say of which run it is: say where to write, out=FILE.json")
    return Path("results") / metadata["study"] / "borders" / f"{metadata['key']}.json"


def write_pictures(path: Path, pictures: Sequence[Picture], info: SegmentationInfo, tile: int) -> None:
    """Write what pictures are made of: images (h, w, 3), truths and guesses (h, w), uint8, and what the classes are."""
    import numpy as np

    arrays = {"tile": np.array(tile), "classes": np.array(info.classes), "colours": np.array(info.colours, np.uint8)}
    arrays["names"] = np.array([picture.name for picture in pictures])
    for number, picture in enumerate(pictures):
        arrays[f"image{number}"] = as_picture(picture.image, info)
        arrays[f"truth{number}"], arrays[f"guess{number}"] = (
            mask.numpy().astype(np.uint8) for mask in (picture.truth, picture.guess)
        )
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        np.savez_compressed(file, **arrays)
    partial.replace(path)


def as_picture(image: Tensor, info: SegmentationInfo) -> np.ndarray:
    """Undo the normalisation of an image: (3, h, w) -> (h, w, 3), uint8."""
    import torch

    mean, std = (torch.tensor(each)[:, None, None] for each in (info.mean, info.std))
    return ((image * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def check(config: DictConfig) -> None:
    """Raise ValueError for a setting that cannot be."""
    least = {"step": 1, "margin": 0, "bin": 1, "block": 1, "pictures": 0, "tile": 1, "n_images": 1, "threads": 1}
    for name, smallest in least.items():
        value = config[name]
        if value is None and name in ("tile", "n_images", "threads"):
            continue
        whole(name, value, smallest)


def check_grid(tile: int, step: int, bin_width: int) -> None:
    """Raise ValueError for a tile, a step and bins that do not fit together."""
    from repmlp.models.upernet import STRIDE

    if tile % STRIDE:
        raise ValueError(f"tile={tile}: use a multiple of {STRIDE}, the networks' stride")
    if tile % step or step == tile or (tile - step) % 2:
        fitting = [each for each in range(1, tile) if tile % each == 0 and (tile - each) % 2 == 0]
        raise ValueError(
            f"step={step}: tile={tile} has to be a multiple of it; use one of {', '.join(map(str, fitting))}"
        )
    far = (tile - step) // 2
    if bin_width not in BINS or far % bin_width:
        fitting = [each for each in BINS if far % each == 0]
        raise ValueError(f"bin={bin_width}: with tile={tile} and step={step} use one of {', '.join(map(str, fitting))}")


if __name__ == "__main__":
    run_command(main, Path(__file__).resolve().parents[1])
