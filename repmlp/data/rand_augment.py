"""RandAugment for batches on the training device: every image draws its own two operations.

torchvision's v2.RandAugment draws one operation for a whole batch. Here the draws are made on the CPU, the images
sorted by what they drew, and each operation done once, on its share of the batch; on a CPU every image becomes, bit for
bit, what torchvision makes of it alone. Nothing waits for the device: torchvision's affine, rotate and adjust_sharpness
would, as they send constants there at each call, so those three are done here, all warps in one sampling.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

WARPS = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
ENHANCEMENTS = ("Brightness", "Color", "Contrast", "Sharpness")  # signed too: less or more of it
UNSIGNED = ("Posterize", "Solarize", "AutoContrast", "Equalize")
OPERATIONS = ("Identity", *WARPS, *ENHANCEMENTS, *UNSIGNED)
MOST = 30  # the largest magnitude
# Two codes an operation, all equally likely: OPERATIONS[code // 2], with sign + or - where it has one. GROUPS[code] is
# what does it: 0 nothing, 1 one sampling for all warps, from 2 on RandAugment.changes.
GROUPS = torch.tensor(
    [0] * 2
    + [1] * 2 * len(WARPS)
    + [2 + i for i in range(2 * len(ENHANCEMENTS))]
    + [2 + 2 * len(ENHANCEMENTS) + i // 2 for i in range(2 * len(UNSIGNED))]
)


def check_magnitude(magnitude: int | None) -> None:
    """Raise ValueError for a magnitude that is neither None nor a whole number from 0 to 30."""
    if magnitude is None:
        return
    if isinstance(magnitude, bool) or not isinstance(magnitude, int) or not 0 <= magnitude <= MOST:
        raise ValueError(f"data.randaugment={magnitude!r}: use a magnitude from 0 to {MOST}, or null for none")


def grey(mean: Sequence[float]) -> list[int]:
    """Return what fills the places outside an image, 0 to 255 a channel: the mean of the data set (0 to 1)."""
    return [round(255 * value) for value in mean]


class RandAugment:
    """Two of 14 operations on each image of a batch, drawn with replacement; where one has a sign, that too.

    Paper: Cubuk et al., "RandAugment", 2020; operations and strengths are those of torchvision's v2.RandAugment(2,
    magnitude) with bilinear interpolation.

    magnitude: 0 to 30. size: (height, width) of the images, at least 3. fill: 0 to 255 a channel, for places outside
    an image. device: that of the images.
    Raises ValueError for a magnitude out of range.
    """

    def __init__(self, magnitude: int, size: tuple[int, int], fill: Sequence[int], device: torch.device | str = "cpu"):
        check_magnitude(magnitude)
        self.grids = sampling_grids(magnitude, *size).to(device)
        # how much of each pixel comes from inside the image, 0 to 1
        self.inside = sample(torch.ones(len(self.grids), 1, *size, device=device), self.grids)
        self.fill = torch.tensor(fill, dtype=torch.float32).view(1, -1, 1, 1).to(device)
        enhance = strength(magnitude, 0.9)
        self.changes = [
            *(partial(TF.adjust_brightness, brightness_factor=1 + sign * enhance) for sign in (1, -1)),
            *(partial(TF.adjust_saturation, saturation_factor=1 + sign * enhance) for sign in (1, -1)),
            *(partial(TF.adjust_contrast, contrast_factor=1 + sign * enhance) for sign in (1, -1)),
            *(partial(adjust_sharpness, factor=1 + sign * enhance) for sign in (1, -1)),
            partial(TF.posterize, bits=8 - round(4 * magnitude / MOST)),
            partial(TF.solarize, threshold=255 * strength(magnitude, 0.0, least=1.0)),
            TF.autocontrast,
            TF.equalize,
        ]

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment images (B, 3, H, W) uint8 -> the same shape; generator: on the CPU."""
        for codes in self.draw(len(images), generator):
            images = self.apply(images, codes)
        return images

    @staticmethod
    def draw(batch: int, generator: torch.Generator) -> Tensor:
        """Draw the code of each operation and sign, as GROUPS has them: (2, B) on the CPU."""
        return torch.randint(len(GROUPS), (2, batch), generator=generator)

    def apply(self, images: Tensor, codes: Tensor) -> Tensor:
        """Do one operation on each of the images (B, 3, H, W) uint8; codes: (B,) on the CPU."""
        order = codes.argsort(stable=True)
        sizes = GROUPS[codes].bincount(minlength=2 + len(self.changes)).tolist()
        # one small transfer, which does not wait for the device
        order, back, codes = torch.stack([order, order.argsort(), codes[order]]).to(images.device, non_blocking=True)
        same, warped, *changed = images[order].split(sizes)
        warped = self.warp(warped, codes[len(same) : len(same) + len(warped)] - 2)  # the codes of Identity are 0 and 1
        changed = [change(part) for change, part in zip(self.changes, changed, strict=True) if len(part)]
        return torch.cat([same, warped, *changed])[back]

    def warp(self, images: Tensor, which: Tensor) -> Tensor:
        """Warp each of the images (B, 3, H, W) uint8 by grid number `which` (B,)."""
        sampled = sample(images.float(), self.grids[which])
        return ((sampled - self.fill) * self.inside[which] + self.fill).round().to(images.dtype)


def strength(magnitude: int, most: float, least: float = 0.0) -> float:
    """Return what a magnitude stands for, `most` at the largest; in float32 steps, as torchvision has them."""
    return float(torch.linspace(least, most, MOST + 1)[magnitude])


def sampling_grids(magnitude: int, height: int, width: int) -> Tensor:
    """Return where each warp, with both signs, takes every pixel from: (10, H, W, 2), as grid_sample wants it.

    Shears hold the top or the left edge; strengths: 0.3 pixels a pixel, 150/331 of a side in whole pixels, 30 degrees.
    """
    angle = math.radians(strength(magnitude, 30.0))
    # by way of an angle in degrees, as torchvision passes it on: the last bit decides how float32 rounds it
    shear = math.tan(math.radians(math.degrees(math.atan(strength(magnitude, 0.3)))))
    across, down = (int(strength(magnitude, 150 / 331 * side)) for side in (width, height))
    cos, sin = math.cos(angle), math.sin(angle)
    both = (1, -1)
    # (x, y) of the source from (x, y, 1) of the target, in pixels from the middle of the image
    sources = [
        *([[1, sign * shear, sign * shear * height / 2], [0, 1, 0]] for sign in both),
        *([[1, 0, 0], [sign * shear, 1, sign * shear * width / 2]] for sign in both),
        *([[1, 0, -sign * across], [0, 1, 0]] for sign in both),
        *([[1, 0, 0], [0, 1, -sign * down]] for sign in both),
        *([[cos, -sign * sin, 0], [sign * sin, cos, 0]] for sign in both),
    ]
    y, x = torch.meshgrid(
        *(torch.arange(side, dtype=torch.float32) - (side - 1) / 2 for side in (height, width)), indexing="ij"
    )
    # (H, W, 3) -> (1, H*W, 3)
    targets = torch.stack([x, y, torch.ones_like(x)], dim=-1).view(1, -1, 3)
    # (10, 2, 3) -> (10, 3, 2), from -1 to 1 along each side
    to_source = torch.tensor(sources).transpose(1, 2) / torch.tensor([width / 2, height / 2])
    # one by one, as torchvision multiplies them: another order of the sums would round otherwise
    grids = torch.cat([targets @ each for each in to_source.split(1)])
    return grids.view(-1, height, width, 2)  # (10, H*W, 2) -> (10, H, W, 2)


def sample(images: Tensor, grids: Tensor) -> Tensor:
    """Sample images (B, C, H, W) bilinearly at grids (B, H, W, 2), with zeros outside."""
    return F.grid_sample(images, grids, mode="bilinear", padding_mode="zeros", align_corners=False)


def adjust_sharpness(images: Tensor, factor: float) -> Tensor:
    """Blend images (B, 3, H, W) uint8 with their smoothed selves: factor 0 smooths, 1 changes nothing, 2 sharpens.

    Smoothed: the mean of 3 x 3 pixels of which the middle one counts five times; the outermost pixels stay as they are.
    """
    pixels = images.float()
    inner = pixels[..., 1:-1, 1:-1]
    smooth = ((F.avg_pool2d(pixels, 3, stride=1, divisor_override=1) + 4 * inner) / 13).round()
    inner.add_(smooth - inner, alpha=1 - factor)
    return pixels.clamp_(0, 255).to(images.dtype)
