"""Maps sorted by share-set, cut into partitions and put together again.

What decides by the size of a map stands in functions that torch.fx keeps as calls, so that its graph decides anew for
each input, as the layers do. A module that imports one has to wrap its name once more.
"""

from __future__ import annotations

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor

from repmlp.tracing import of_size


@torch.fx.wrap
def sets_first(x: Tensor, share_sets: int, size: tuple[int, int]) -> Tensor:
    """Sort maps by share-set: (N, C, h, w) -> (S, N*C/S, h*w), a view where it can be.

    Channel c is member c // S of set c mod S.
    Raises ValueError where S does not divide the channels, or the maps have another size.
    """
    n, c, h, w = x.shape
    if c % share_sets != 0 or h != size[0] or w != size[1]:
        raise ValueError(
            f"got maps of {c} channels and size ({h}, {w}); {share_sets} share-sets have to divide the channels, and "
            f"the size has to be ({size[0]}, {size[1]}) (RepMLPBlock cuts other sizes into partitions)"
        )
    return x.reshape(n * (c // share_sets), share_sets, h * w).transpose(0, 1)


@torch.fx.wrap
def cut_into_tiles(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut maps into h x w partitions, padded with zeros at the bottom and right: (N, C, H, W) -> (N*tiles, C, h, w).

    A map of that size is returned as it is.
    """
    n, c, height, width = x.shape
    h, w = size
    if height == h and width == w:
        return of_size(x, h, w)
    rows, columns = tiles_of((height, width), size)
    x = F.pad(x, (0, columns * w - width, 0, rows * h - height))
    # (N, C, rows*h, columns*w) -> (N*rows*columns, C, h, w): tiles join the batch, never the channels
    return x.view(n, c, rows, h, columns, w).permute(0, 2, 4, 1, 3, 5).reshape(n * rows * columns, c, h, w)


@torch.fx.wrap
def join_tiles(tiles: Tensor, map_size: tuple[int, int]) -> Tensor:
    """Put partitions together again and crop the padding: (N*tiles, C, h, w) -> (N, C, H, W)."""
    m, c, h, w = tiles.shape
    height, width = map_size
    if height == h and width == w:
        return tiles
    rows, columns = tiles_of(map_size, (h, w))
    # (N*rows*columns, C, h, w) -> (N, C, rows*h, columns*w)
    x = tiles.view(m // (rows * columns), rows, columns, c, h, w).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(m // (rows * columns), c, rows * h, columns * w)[:, :, :height, :width]


def tiles_of(map_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return how many rows and columns of h x w partitions cover an H x W map."""
    # no division of negative numbers, which ONNX rounds towards zero
    return (map_size[0] + size[0] - 1) // size[0], (map_size[1] + size[1] - 1) // size[1]
