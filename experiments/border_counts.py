"""Count what a segmentation network gets right by distance from the borders of its tiles, for borders.py.

borders.py says what is counted and why.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from repmlp.data.scaled_crop import IGNORED
from repmlp.models.upernet import distance_to_borders


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
