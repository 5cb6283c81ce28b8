"""What happens to an image and its label map together: scaled, cropped, flipped, made tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from repmlp.data.decoded import to_tensor

IGNORED = 255  # label of the pixels that do not count
JITTER = {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.05}

Transform = Callable[[Image.Image, Image.Image], tuple[Tensor, Tensor]]


def train_transform(crop_size: tuple[int, int], scale: tuple[float, float]) -> Transform:
    """Return scaling, crop, flip and jitter: image, classes -> (3, h, w) float32, normalised, (h, w) uint8.

    crop_size: (h, w). scale: the factor is drawn evenly from it. Where a scaled image is smaller than the crop, it lies
    somewhere in it, surrounded by the mean colour and by 255.
    The order of mmsegmentation's Cityscapes recipe; the jitter is torchvision's, of every second image, and there is no
    second try where a crop is of one class nearly throughout.
    """
    return v2.Compose(
        [
            ScaledCrop(crop_size, scale),
            v2.RandomApply([v2.ColorJitter(**JITTER)], p=0.5),
            *to_tensor(),
            v2.RandomCrop(crop_size, pad_if_needed=True, fill={tv_tensors.Image: 0, tv_tensors.Mask: IGNORED}),
            v2.RandomHorizontalFlip(),
            v2.ToPureTensor(),
        ]
    )


def eval_transform() -> Transform:
    """Return what evaluation sees, the whole image: image, classes -> (3, H, W) float32, normalised, (H, W) uint8."""
    return v2.Compose([_as_tensors, *to_tensor(), v2.ToPureTensor()])


class ScaledCrop:
    """Scale image and classes by one random factor and cut out a random part, at most `size` (height, width) large.

    The same as scaling all and then cropping, but only the part is computed. Bilinear with antialiasing for the image,
    the nearest pixel for classes.
    """

    def __init__(self, size: tuple[int, int], scale: tuple[float, float]):
        self.size, self.scale = size, scale

    def __call__(self, image: Image.Image, mask: Image.Image) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        low, high = self.scale
        factor = low + (high - low) * float(torch.rand(()))
        box, size = [], []  # (left, top), (width, height)
        for side, wanted in zip(image.size, reversed(self.size), strict=True):
            scaled = max(1, round(factor * side))
            part = min(scaled, wanted)
            start = int(torch.randint(scaled - part + 1, ()))
            # whole numbers first: the end never lies beyond the last pixel
            box.append((start * side / scaled, (start + part) * side / scaled))
            size.append(part)
        corners = (box[0][0], box[1][0], box[0][1], box[1][1])
        return _as_tensors(
            image.resize(size, Image.Resampling.BILINEAR, box=corners),
            mask.resize(size, Image.Resampling.NEAREST, box=corners),
        )


def _as_tensors(image: Image.Image, mask: Image.Image) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """Return (3, H, W) and (H, W), uint8, marked as what they are for torchvision's transforms."""
    # (1, H, W) -> (H, W)
    return tv_tensors.Image(v2.functional.pil_to_tensor(image)), tv_tensors.Mask(v2.functional.pil_to_tensor(mask)[0])
