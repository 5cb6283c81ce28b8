"""Patterns: a generated data set of 100 classes = 10 local textures x 10 global arrangements; nothing to download.

An image is sparse white noise filtered by one of ten random zero-mean 5x5 kernels (the texture), whose amplitude is
high in half of the cells of a 4x4 grid and low in the others (the arrangement), painted in a random colour over a
random background, with random contrast and pixel noise. The phase of a texture is random everywhere, so no
position-wise template finds it; all arrangements have the same number of high cells, so no local filter alone finds
those.

What position is good for: with `shift`, each image has its arrangement moved, round the map's edges, by an offset of
its own, so that where a cell is high says nothing and only where it is among the others does.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from repmlp.data.base import DataInfo, check_whole, register
from repmlp.data.resident import ImageSet, ResidentData
from repmlp.randomness import derive_seed

TEXTURES = ARRANGEMENTS = 10
SIDE, GRID = 32, 4
LOW_AMPLITUDE = 0.3  # of the texture in the low cells; the high ones have 1
KERNEL = 5
DENSITY = 0.08  # of the sparse noise: the share of pixels where a copy of the kernel stands
LARGEST_SHIFT = SIDE // 2  # pixels; then every offset on the map is equally probable
ANSWERS = ("both", "texture", "arrangement")
NOISE = 0.1  # standard deviation of the pixel noise, in units of the texture's


@register("patterns")
class PatternsData(ResidentData):
    """The generated set; label = 10 * texture + arrangement.

    n_train, n_test: images that are generated. n_eval: how many of the latter (with holdout: of those held out) are
    used. data_seed: of textures, arrangements and images. shift: pixels; the arrangement of each image, of training and
    of evaluation, is moved cyclically by -shift to shift - 1 in both directions, 16 for anywhere; 0 for none.
    answer: "both", or the half of the label that is asked for: "texture" or "arrangement", ten classes each.
    The rest: see ResidentData.
    Raises ValueError for another answer, and a shift that is no whole number from 0 to 16.
    """

    info = DataInfo(
        num_classes=TEXTURES * ARRANGEMENTS,
        img_size=SIDE,
        mean=(0.5, 0.5, 0.5),
        std=(0.14, 0.14, 0.14),
        parts={
            "texture": torch.arange(TEXTURES * ARRANGEMENTS) // ARRANGEMENTS,
            "arrangement": torch.arange(TEXTURES * ARRANGEMENTS) % ARRANGEMENTS,
        },
    )

    def __init__(
        self,
        *,
        n_train: int = 4000,
        n_test: int = 2000,
        data_seed: int = 0,
        shift: int = 0,
        answer: str = "both",
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_whole("shift", shift, 0)
        if shift > LARGEST_SHIFT:
            raise ValueError(
                f"data.shift={shift}: use at most {LARGEST_SHIFT} pixels, with which any place is as likely"
            )
        if answer not in ANSWERS:
            raise ValueError(f"data.answer={answer!r}: use {', '.join(ANSWERS[:-1])} or {ANSWERS[-1]}")
        self.shift, self.answer = shift, answer
        if answer != "both":
            self.info = dataclasses.replace(self.info, num_classes=len(self.info.parts[answer].unique()), parts={})
        check_whole("n_train", n_train, 1)
        check_whole("n_test", n_test, 1)
        self.sizes = (n_train, n_test)
        self.data_seed = data_seed

    def load(self) -> tuple[ImageSet, ImageSet]:
        parts = []
        for n, name in zip(self.sizes, ("train", "test"), strict=True):
            images = generate(n, self.data_seed, name, self.shift)
            if self.answer != "both":
                images = ImageSet(images.images, type(self).info.parts[self.answer][images.labels])
            parts.append(images.subset(self.pick(images.labels, n)))
        return parts[0], parts[1]


def textures(data_seed: int) -> Tensor:
    """Draw the ten 5x5 kernels: zero mean, unit norm; (10, 1, 5, 5)."""
    generator = torch.Generator().manual_seed(derive_seed(data_seed, "textures"))
    kernels = torch.randn(TEXTURES, KERNEL**2, generator=generator)
    kernels -= kernels.mean(dim=1, keepdim=True)
    # (10, 25) -> (10, 1, 5, 5)
    return (kernels / kernels.norm(dim=1, keepdim=True)).view(TEXTURES, 1, KERNEL, KERNEL)


def arrangements(data_seed: int, shifted: bool = False) -> Tensor:
    """Draw the ten amplitude masks, half of the 4x4 cells high in each, all different; (10, 32, 32).

    shifted: no mask is another one moved by whole cells.
    """
    generator = torch.Generator().manual_seed(derive_seed(data_seed, "arrangements"))
    masks: list[Tensor] = []
    while len(masks) < ARRANGEMENTS:
        mask = torch.full((GRID * GRID,), LOW_AMPLITUDE)
        mask[torch.randperm(GRID * GRID, generator=generator)[: GRID * GRID // 2]] = 1.0
        moves = [(y, x) for y in range(GRID) for x in range(GRID)] if shifted else [(0, 0)]
        moved = [mask.view(GRID, GRID).roll(move, (0, 1)).flatten() for move in moves]
        if not any(torch.equal(each, other) for each in moved for other in masks):
            masks.append(mask)
    # (10, 16) -> (10, 4, 4) -> (10, 32, 32)
    cells = torch.stack(masks).view(ARRANGEMENTS, GRID, GRID)
    return cells.repeat_interleave(SIDE // GRID, dim=1).repeat_interleave(SIDE // GRID, dim=2)


def moved_round(maps: Tensor, offsets: Tensor) -> Tensor:
    """Move maps (N, H, W) cyclically, each by its own (rows, columns) of offsets (N, 2)."""
    n, height, width = maps.shape
    rows = (torch.arange(height) - offsets[:, :1]) % height
    columns = (torch.arange(width) - offsets[:, 1:]) % width
    # (N, 1, 1), (N, H, 1), (N, 1, W) index to (N, H, W)
    return maps[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def generate(n: int, data_seed: int, split: str, shift: int = 0) -> ImageSet:
    """Generate n images (rounded up to whole hundreds), the same number of every class, in random order.

    shift: see PatternsData; everything else about the images stays.
    """
    generator = torch.Generator().manual_seed(derive_seed(data_seed, "images", split))
    per_class = -(-n // (TEXTURES * ARRANGEMENTS))
    labels = torch.arange(TEXTURES * ARRANGEMENTS).repeat(per_class)
    labels = labels[torch.randperm(len(labels), generator=generator)]
    n = len(labels)
    # sparse, with unit variance, so that the field has too
    side = SIDE + KERNEL - 1
    noise = (torch.rand(n, 1, side, side, generator=generator) < DENSITY) / DENSITY**0.5
    kernels, masks = textures(data_seed), arrangements(data_seed, shifted=shift > 0)
    fields = torch.empty(n, 1, SIDE, SIDE)
    for texture in range(TEXTURES):
        chosen = labels // ARRANGEMENTS == texture
        fields[chosen] = F.conv2d(noise[chosen], kernels[texture : texture + 1])
    masks = masks[labels % ARRANGEMENTS]
    if shift:
        drawn = torch.Generator().manual_seed(derive_seed(data_seed, "shifts", split))
        masks = moved_round(masks, torch.randint(-shift, shift, (n, 2), generator=drawn))
    fields *= masks.unsqueeze(1)
    colour = F.normalize(torch.rand(n, 3, 1, 1, generator=generator) + 0.1, dim=1)
    background = 0.3 + 0.4 * torch.rand(n, 3, 1, 1, generator=generator)
    contrast = 0.15 + 0.1 * torch.rand(n, 1, 1, 1, generator=generator)
    pixel_noise = NOISE * torch.randn(n, 3, SIDE, SIDE, generator=generator)
    images = background + contrast * (colour * fields + pixel_noise)
    return ImageSet((images * 255).round().clamp(0, 255).to(torch.uint8), labels)
