"""Measure whether a segmentation network is worse at the borders of its tiles.

    python experiments/borders.py checkpoint=outputs/STUDY/KEY/model.safetensors data.root=FOLDER
    python experiments/borders.py checkpoint=FILE data.root=FOLDER tile=96      # a ResNet, same grid: the control
    python analysis/plot_borders.py STUDY                                       # all networks of a study side by side

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
tile, at least (tile - step) / 2 pixels from all lines; there is exactly one. near - far in the summary is the accuracy
of all views within 8 pixels of a line less that of the same pixels seen from the middle.

What does not cancel: a pixel in the middle of a tile is nearer to the crop's edge than one at a line inside the crop
in some phases and farther in others, and convolutions feel that edge from afar. A network without tiles, measured
with the same grid, shows how much that is; analysis/plot_borders.py subtracts it.

Errors that hit a whole tile are as frequent in its middle as at its border and show at its edges alone. So the pairs of
neighbouring pixels that a line runs between in some phase are looked at too: how often the two guesses differ where
the line is there, and how often the same two differ where it is elsewhere.

Intervals are 95 % by bootstrap over images, and over blocks of consecutive ones; the wider, second one is the honest
one where the images are frames of a video. Neither knows what another seed of the training would have brought.

The network is merged first. Written: the counts of every image and the summary, results/<study>/borders/<key>.json;
beside it a small sheet of pictures, <key>.png; larger ones beside the checkpoint, borders/<image>.png. Relative paths
are anchored at the repository.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from repmlp.checkpoints import load_model
from repmlp.data import build_segmentation_data
from repmlp.data.segmentation import IGNORED, SegmentationInfo
from repmlp.models.build import check_num_classes, merged_copy
from repmlp.models.repmlpnet import RepMLPNet
from repmlp.models.upernet import STRIDE, UperNet, distance_to_borders
from repmlp.runs.key import PATHS
from repmlp.runs.launch import device_of, mistakes_in_one_line, run_command
from repmlp.runs.provenance import device_name, git_state, processor, versions
from repmlp.runs.record import write_json
from repmlp.statistics import bootstrap_weights, interval, pooled

NEAR = 8  # pixels from a line: closer ones are near
BINS = (1, 2, 4, 8)  # widths of bins: those that NEAR is a multiple of
LARGEST = 30_000  # counts in a file, to keep it below 500 kB


class Layout(NamedTuple):
    """How the crops lie in images of one size, and which pixels count.

    size: (h, w) of a crop. corners: (y, x) of each of the P crops in the image, row by row. rows, columns: of the
    image, those that count. distances: (P, rows, columns), of each pixel to the nearest line in each crop. far: from
    this distance on a pixel is in the middle of a tile.
    """

    size: tuple[int, int]
    corners: list[tuple[int, int]]
    rows: slice
    columns: slice
    distances: Tensor
    far: int


class Counts(NamedTuple):
    """What was seen, by image and bin of distances: (images, bins), whole numbers.

    correct, labelled: views of pixels with a label, and those with the right guess among them. correct_far: those of
    the same views whose pixel has the right guess where it is in the middle of a tile. differing: (images,), pixels
    whose guess is not the same in all phases. seams: (images, 4), see count_seams.
    """

    correct: np.ndarray
    labelled: np.ndarray
    correct_far: np.ndarray
    differing: np.ndarray
    seams: np.ndarray


class Picture(NamedTuple):
    """The crop at the image's corner: name, image (3, h, w), truth and guess (h, w)."""

    name: str
    image: Tensor
    truth: Tensor
    guess: Tensor


@hydra.main(version_base="1.3", config_path="conf", config_name="borders")
def main(config: DictConfig) -> None:
    with mistakes_in_one_line():
        path, results = borders(config)
        print(sentence(results))
        print(path)


def borders(config: DictConfig) -> tuple[Path, dict[str, Any]]:
    """Measure a network, write the results and draw pictures; returns where they are and what is in the file."""
    _check(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    device = device_of(config.device)
    checkpoint = Path(config.checkpoint).expanduser()
    net, metadata = load_model(checkpoint)
    if not isinstance(net, UperNet):
        raise ValueError(f"{checkpoint} is a {type(net).__name__}, no segmentation network: train one with segment.py")
    path = output_path(config, metadata)
    tile = tile_of(net, config.tile)
    _check_grid(tile, config.step, config.bin)
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
        "tiled": isinstance(net.backbone, RepMLPNet),
        "data": settings.get("label", settings["name"]),
        "tile": tile,
        **{name: config[name] for name in ("step", "margin", "bin", "block")},
        "near": NEAR,
        "far": (tile - config.step) // 2,
        "views": (tile // config.step) ** 2,
        "n_images": len(names),
        "summary": summarise(counts, tile, config.step, config.bin, config.block),
        "distances": list(range(0, tile // 2, config.bin)),
        **{name: getattr(counts, name).tolist() for name in ("correct", "labelled", "correct_far", "seams")},
        "device": device_name(device),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "versions": versions(("torch", "timm", "numpy", "segmentation-models-pytorch")),
        **git_state(),
        "config": {"model": model, "data": {name: value for name, value in settings.items() if name not in PATHS}},
    }
    write_json(path, results)
    if pictures:
        titles = ("image", "truth", "prediction")
        rows = {
            picture.name: [as_picture(picture.image, data.info), *colour((picture.truth, picture.guess), data.info)]
            for picture in pictures
        }
        for name, row in rows.items():
            save_panels(checkpoint.parent / "borders" / f"{name}.png", {name: row}, titles, tile, data.info, width=4.0)
        save_panels(path.with_suffix(".png"), rows, titles, tile, data.info, width=2.0)
    return path, results


def lay_out(size: tuple[int, int], tile: int, step: int, margin: int) -> Layout:
    """Lay crops of whole tiles into images of a size, (H, W).

    Raises ValueError where the images are too small to see every counted pixel under every phase.
    """
    height, width = ((length - (tile - step)) // tile * tile for length in size)
    least = tile + 2 * margin  # a tile's width of pixels inside the margins meets every distance
    if min(height, width) < least:
        needed = -(-least // tile) * tile + tile - step
        raise ValueError(
            f"images {size[0]} pixels high and {size[1]} wide are too small for tile={tile}, step={step} and "
            f"margin={margin}, which need {needed} both ways: use a smaller margin or other images"
        )
    corners = list(product(range(0, tile, step), repeat=2))
    # the last crop's first row that counts, and the first crop's last
    rows, columns = (slice(tile - step + margin, length - margin) for length in (height, width))
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    distances = [distance_to_borders(shape, tile, (rows.start - y, columns.start - x)) for y, x in corners]
    return Layout((height, width), corners, rows, columns, torch.stack(distances), (tile - step) // 2)


@torch.no_grad()
def look(net: nn.Module, image: Tensor, layout: Layout) -> Tensor:
    """Guess the classes of every crop of an image: (3, H, W) -> (P, h, w), uint8, on the CPU."""
    height, width = layout.size
    guesses = []
    across = round(len(layout.corners) ** 0.5)
    for start in range(0, len(layout.corners), across):  # a batch a row of crops: all at once can be too much memory
        crops = [image[:, y : y + height, x : x + width] for y, x in layout.corners[start : start + across]]
        guesses.append(net(torch.stack(crops)).argmax(dim=1).to(torch.uint8).cpu())
    return torch.cat(guesses)


def views(guesses: Tensor, layout: Layout) -> Tensor:
    """Cut the pixels that count out of every crop's guesses: (P, h, w) -> (P, rows, columns)."""
    return torch.stack(
        [
            guess[layout.rows.start - y : layout.rows.stop - y, layout.columns.start - x : layout.columns.stop - x]
            for guess, (y, x) in zip(guesses, layout.corners, strict=True)
        ]
    )


def count_seams(seen: Tensor, labelled: Tensor, layout: Layout, tile: int) -> Tensor:
    """Count neighbours that a line runs between in some phase: seen (P, rows, columns), labelled (rows, columns).

    Returns four numbers: views of such pairs across a line and those among them whose guesses differ, then the same of
    the views in which the line is elsewhere. Pairs without a label are left out.
    """
    counts = torch.zeros(4, dtype=torch.int64)
    for axis, side in enumerate((layout.rows, layout.columns)):
        second = [slice(None)] * 2
        first = list(second)
        first[axis], second[axis] = slice(None, -1), slice(1, None)
        differ = seen[(slice(None), *first)] != seen[(slice(None), *second)]
        there = labelled[tuple(first)] & labelled[tuple(second)]
        # (pairs,), where the second pixel lies in the image; (P, pairs), whether it is the first one of a tile
        at = torch.arange(side.start + 1, side.stop)
        line = torch.stack([(at - corner[axis]) % tile == 0 for corner in layout.corners])
        some = line.any(dim=0)
        shape = (-1, len(at), 1) if axis == 0 else (-1, 1, len(at))
        for number, where in enumerate((line, some & ~line)):
            pairs = where.view(shape) & there
            counts[2 * number : 2 * number + 2] += torch.stack([pairs.sum(), (pairs & differ).sum()])
    return counts


def count(guesses: Tensor, mask: Tensor, layout: Layout, tile: int, bin_width: int) -> tuple[Tensor, int, Tensor]:
    """Count one image's views by distance: guesses (P, h, w), mask (H, W).

    Returns correct, labelled and correct_far of Counts as (3, bins), how many labelled pixels' guesses differ, and
    count_seams.
    """
    seen = views(guesses, layout)
    truth = mask[layout.rows, layout.columns]
    labelled = truth != IGNORED
    correct = seen == truth  # no guess is 255
    # (P, rows, columns) -> (rows, columns): one phase alone has the pixel in the middle of a tile
    correct_far = (correct & (layout.distances >= layout.far)).any(dim=0)
    bins = layout.distances // bin_width
    n = int(bins.max()) + 1
    which = (correct, labelled.expand_as(bins), correct_far.expand_as(bins))
    counts = torch.stack([torch.bincount(bins[each], minlength=n) for each in which])
    differing = int(((seen != seen[0]).any(dim=0) & labelled).sum())
    return counts, differing, count_seams(seen, labelled, layout, tile)


def measure(
    net: nn.Module,
    samples: Iterable[tuple[str, Tensor, Tensor]],
    tile: int,
    step: int,
    margin: int,
    bin_width: int,
    keep: Collection[str] = (),
) -> tuple[Counts, list[Picture]]:
    """Count over images under every phase of the grid, and keep the first crop of some.

    net: crops (N, 3, h, w) -> logits (N, K, h, w). samples: name, image (3, H, W) where the network is, mask (H, W) on
    the CPU, 255 for no label. keep: names of the pictures that are wanted.
    Raises ValueError where the images are too small, or where nothing is labelled at some distance.
    """
    layouts: dict[tuple[int, int], Layout] = {}
    counts, differing, seams, pictures = [], [], [], []
    for name, image, mask in samples:
        size = tuple(mask.shape)
        if size not in layouts:
            layouts[size] = lay_out(size, tile, step, margin)
        guesses = look(net, image, layouts[size])
        of_image, different, at_lines = count(guesses, mask, layouts[size], tile, bin_width)
        counts.append(of_image)
        differing.append(different)
        seams.append(at_lines)
        if name in keep:
            there = tuple(slice(0, side) for side in layouts[size].size)
            pictures.append(Picture(name, image[(..., *there)].cpu(), mask[there], guesses[0]))
    # n x (3, bins) -> 3 x (n, bins)
    correct, labelled, correct_far = torch.stack(counts, dim=1).numpy()
    if not labelled.sum(axis=0).all():
        raise ValueError("no pixel is labelled at some distance from the tiles' borders: use more images")
    return Counts(correct, labelled, correct_far, np.array(differing), torch.stack(seams).numpy()), pictures


def summarise(counts: Counts, tile: int, step: int, bin_width: int, block: int) -> dict[str, Any]:
    """Return accuracy over all views, near a line, of the same pixels seen from the middle of a tile, and near - far.

    Percent and percentage points; intervals [low, high] over images and over blocks of them, None where there are fewer
    than two. differing_pct: pixels whose guess is not the same in all phases. seam_pct, no_seam_pct: neighbours whose
    guesses differ across a line, and the same neighbours where the line is elsewhere; seam_interval: of the first less
    the second, over blocks.
    """
    near = np.arange(counts.labelled.shape[1]) * bin_width < NEAR
    # (images, bins) -> (images,)
    correct, labelled, far = (each[:, near].sum(axis=1) for each in counts[:3])
    found = {
        "accuracy_pct": pooled(counts.correct.sum(axis=1), counts.labelled.sum(axis=1)),
        "near_pct": pooled(correct, labelled),
        "far_pct": pooled(far, labelled),
        "near_minus_far_points": pooled(correct - far, labelled),
        "differing_pct": counts.differing.sum() / (counts.labelled.sum() / (tile // step) ** 2),
    }
    found["seam_pct"], found["no_seam_pct"] = pooled(counts.seams[:, 1::2], counts.seams[:, ::2])
    found["seam_interval"] = None
    if len(labelled) > block:
        samples = pooled(counts.seams[:, 1::2], counts.seams[:, ::2], bootstrap_weights(len(labelled), block))
        found["seam_interval"] = interval(samples[:, 0] - samples[:, 1])
    for name, size in (("interval_images", 1), ("interval_blocks", block)):
        found[name] = None
        if len(labelled) > size:
            found[name] = interval(pooled(correct - far, labelled, bootstrap_weights(len(labelled), size)))
    return {name: None if value is None else (100 * value).round(4).tolist() for name, value in found.items()}


def sentence(results: Mapping[str, Any]) -> str:
    """Say what was found."""
    found = results["summary"]
    over = {"images": "over images", "blocks": f"over blocks of {results['block']}"}
    intervals = [
        f"{found[f'interval_{name}'][0]:+.2f} to {found[f'interval_{name}'][1]:+.2f} {words}"
        for name, words in over.items()
        if found[f"interval_{name}"]
    ]
    return (
        f"{results['model']}, {results['n_images']} images of {results['data']}, tile {results['tile']}: accuracy "
        f"{found['accuracy_pct']:.2f} %; within {results['near']} pixels of a border {found['near_pct']:.2f} %, the "
        f"same pixels at least {results['far']} away {found['far_pct']:.2f} %, difference "
        f"{found['near_minus_far_points']:+.2f} points"
        + (f" (95 %: {', '.join(intervals)})" if intervals else "")
        + "; "
        f"{found['differing_pct']:.2f} % of the pixels are not guessed the same in all {results['views']} phases; "
        f"neighbours differ {found['seam_pct']:.2f} % of the time across a line, the same ones "
        f"{found['no_seam_pct']:.2f} % where it is elsewhere"
    )


def tile_of(net: UperNet, tile: int | None) -> int:
    """Return the side of the tiles: the network's own, or what was said for a network without; ValueError otherwise."""
    if not isinstance(net.backbone, RepMLPNet):
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


def as_picture(image: Tensor, info: SegmentationInfo) -> np.ndarray:
    """Undo the normalisation of an image: (3, h, w) -> (h, w, 3), uint8."""
    mean, std = (torch.tensor(each)[:, None, None] for each in (info.mean, info.std))
    return ((image * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def colour(masks: Iterable[Tensor], info: SegmentationInfo) -> list[np.ndarray]:
    """Draw masks in the classes' colours, black where nothing is labelled: (h, w) -> (h, w, 3), uint8."""
    colours = np.zeros((IGNORED + 1, 3), dtype=np.uint8)
    colours[: info.num_classes] = info.colours
    return [colours[mask.numpy()] for mask in masks]


def save_panels(
    path: Path,
    rows: Mapping[str, Sequence[np.ndarray]],
    titles: Sequence[str],
    tile: int,
    info: SegmentationInfo,
    width: float,
) -> None:
    """Draw rows of panels, the lines between tiles on all predictions, and the classes' colours below.

    rows: by name, each image, truth and predictions, (h, w, 3). titles: of the columns. width: inches of a panel.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from PIL import Image

    first = next(iter(rows.values()))
    height = width * first[0].shape[0] / first[0].shape[1]
    figure = Figure((width * len(first) + 0.2, (height + 0.08) * len(rows) + 0.7), layout="constrained")
    axes = figure.subplots(len(rows), len(first), squeeze=False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8)
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, fontsize=6)
        for number, (axis, picture) in enumerate(zip(line, pictures, strict=True)):
            axis.imshow(picture)
            axis.set_xticks([])
            axis.set_yticks([])
            if number > 1:
                for y in range(tile, picture.shape[0], tile):
                    axis.axhline(y - 0.5, color="white", linewidth=0.5)
                for x in range(tile, picture.shape[1], tile):
                    axis.axvline(x - 0.5, color="white", linewidth=0.5)
    patches = [
        Patch(color=np.array(colour) / 255, label=name) for name, colour in zip(info.classes, info.colours, strict=True)
    ]
    figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize=6, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110)
    Image.open(drawn).convert("RGB").quantize(256).save(path, optimize=True)  # a third of the size


def _check(config: DictConfig) -> None:
    """Raise ValueError for a setting that is none."""
    if not config.checkpoint:
        raise ValueError("which checkpoint? pass checkpoint=FILE")
    least = {"step": 1, "margin": 0, "bin": 1, "block": 1, "pictures": 0, "tile": 1, "n_images": 1, "threads": 1}
    for name, smallest in least.items():
        value = config[name]
        if value is None and name in ("tile", "n_images", "threads"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise ValueError(f"{name}={value!r}: use a whole number, {smallest} or more")


def _check_grid(tile: int, step: int, bin_width: int) -> None:
    """Raise ValueError for a tile, a step and bins that do not fit together."""
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
