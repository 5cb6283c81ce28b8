"""UperNet with any timm network as its backbone, and the prediction of whole images.

Paper: RepMLPNet Section 5.3 (Table 6). The decoder is segmentation_models.pytorch's; the auxiliary head follows
mmsegmentation's UperNet. Contract: a network takes images (N, 3, H, W) with H and W multiples of its stride, 32, and
returns logits (N, K, H, W); `predict` takes images of any size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repmlp.branches import BranchSpec, values
from repmlp.models.repmlp_partitions import takes_any_size
from repmlp.models.repmlpnet import RepMLPNet

STRIDE = 32  # of the backbones' last map


class UperNet(nn.Module):
    """UperNet and, for training, a small head on the third of the backbone's four maps.

    upernet: of segmentation_models.pytorch, with `encoder`, `decoder` and `segmentation_head`. num_classes: K.
    auxiliary_channels: inner channels of the auxiliary head, 0 for none.
    forward(): images (N, 3, H, W) -> logits (N, K, H, W). `with_auxiliary` gives both heads' logits.
    """

    def __init__(self, upernet: nn.Module, num_classes: int, auxiliary_channels: int = 256):
        super().__init__()
        self.upernet = upernet
        self.num_classes = num_classes
        self.auxiliary = None
        if auxiliary_channels:
            self.auxiliary = nn.Sequential(
                nn.Conv2d(upernet.encoder.out_channels[-2], auxiliary_channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(auxiliary_channels),
                nn.ReLU(),
                nn.Dropout2d(0.1),
                nn.Conv2d(auxiliary_channels, num_classes, 1),
            )

    @property
    def backbone(self) -> nn.Module:
        """Return the timm network that makes the maps, a RepMLPNet itself and not its wrapper."""
        wrapper = self.upernet.encoder.model
        return wrapper.model if isinstance(getattr(wrapper, "model", None), RepMLPNet) else wrapper

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the parts, so that with_auxiliary() runs what is compiled too; arguments: of torch.compile."""
        for part in (self.upernet.encoder, self.upernet.decoder, self.upernet.segmentation_head):
            part.compile(*args, **kwargs)

    def forward(self, images: Tensor) -> Tensor:
        return self.upernet(images)

    def with_auxiliary(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return logits (N, K, H, W) and the auxiliary head's, (N, K, H/16, W/16), None where there is no such head."""
        maps = self.upernet.encoder(images)
        auxiliary = None if self.auxiliary is None else self.auxiliary(maps[-2])
        return self.upernet.segmentation_head(self.upernet.decoder(maps)), auxiliary


def build_upernet(
    encoder: str,
    num_classes: int,
    *,
    img_size: int | None = None,
    kernels: Sequence[BranchSpec | int | str] = (),
    embed_kernel: int | None = None,
    decoder_channels: int = 512,
    auxiliary_channels: int = 256,
    arguments: Mapping[str, Any] | None = None,
    inference_mode: bool = False,
) -> UperNet:
    """Build UperNet on a timm network, untrained.

    Paper: RepMLPNet Section 5.3. Table 6 has decoder_channels=512 and a ResNet with the deep stem (resnet101c).

    encoder: its name in timm, e.g. "repmlpnet_d256" or "resnet101c"; maps of strides 4, 8, 16 and 32.
    img_size, kernels, embed_kernel: of a RepMLPNet: side of the tiles in pixels (None for the variant's own), branches,
    and the k x k down-sampling between its stages through which tiles communicate (None: the classifier's 2x2).
    arguments: more of the encoder's constructor. inference_mode: with a merged RepMLPNet, to load merged weights into.
    Raises ValueError for an unknown encoder, for img_size, kernels or embed_kernel with another kind of encoder, and
    for a size in pixels that is no multiple of 32; ModuleNotFoundError without segmentation_models.pytorch.
    """
    try:
        import segmentation_models_pytorch as smp
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "UperNet needs segmentation_models.pytorch: pip install 'repmlp[segment]'", name=error.name
        ) from error
    if not timm.is_model(encoder):
        raise ValueError(f"timm has no model {encoder!r}: see timm.list_models()")
    given = dict(arguments or {})
    ours = timm.model_entrypoint(encoder).__module__ == RepMLPNet.__module__
    if ours:
        given |= {"kernels": values(kernels), "embed_kernel": embed_kernel, "inference_mode": inference_mode}
        if img_size is not None:
            given["img_size"] = img_size
    elif kernels or embed_kernel is not None or img_size is not None:
        raise ValueError(
            f"encoder={encoder} is no RepMLPNet: leave kernels=[], embed_kernel=null and img_size=null, got "
            f"{list(kernels)}, {embed_kernel} and {img_size}"
        )
    try:
        upernet = smp.UPerNet(
            f"tu-{encoder}",
            encoder_weights=None,
            decoder_channels=decoder_channels,
            classes=num_classes,
            **given,
        )
    except (RuntimeError, ValueError) as error:
        needs = "" if ours else "; UperNet needs a network with maps of strides 4, 8, 16 and 32"
        raise ValueError(f"encoder={encoder}: {error}{needs}") from error
    return UperNet(upernet, num_classes, auxiliary_channels)


def predict(net: nn.Module, images: Tensor, window: Sequence[int] | None = None) -> Tensor:
    """Return the logits of whole images of any size: (N, 3, H, W) -> (N, K, H, W).

    Images are padded at the bottom and right to multiples of 32 with zeros, the mean colour of normalised images, and
    the logits are cropped back. window: (height, width) of windows that slide over the padded image by at most two
    thirds of their size (mmsegmentation's habit; a side of 32 pixels by all of it), logits averaged where they overlap;
    None to take the image as a whole. A network that takes images of one size alone (a ResNet with Global Perceptrons)
    sees images that are smaller than a window padded to its size.
    Raises ValueError for a window that is no two multiples of 32.
    """
    height, width = images.shape[2:]
    if window is None:
        return net(_pad(images))[:, :, :height, :width]
    check_window(window)
    images = _pad(images, (1, 1) if takes_any_size(getattr(net, "backbone", net)) else window)
    tops, lefts = (
        _window_starts(length, min(side, length)) for length, side in zip(images.shape[2:], window, strict=True)
    )
    total, seen = 0, images.new_zeros(1, 1, *images.shape[2:])
    for top in tops:
        for left in lefts:
            there = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            logits = net(images[there])
            if isinstance(total, int):
                total = logits.new_zeros(len(images), logits.shape[1], *images.shape[2:])
            total[there] += logits
            seen[there] += 1
    return (total / seen)[:, :, :height, :width]


def check_window(window: Sequence[int] | None) -> None:
    """Raise ValueError for a window that is not None and no two multiples of 32."""
    if window is not None and (
        not isinstance(window, Sequence)
        or len(window) != 2
        or any(not isinstance(side, int) or side < 1 or side % STRIDE for side in window)
    ):
        raise ValueError(f"window={window}: use [height, width], multiples of {STRIDE}")


def _pad(images: Tensor, least: Sequence[int] = (1, 1)) -> Tensor:
    """Pad images with zeros at the bottom and right to multiples of 32, of at least (height, width)."""
    height, width = (max(side + -side % STRIDE, low) - side for side, low in zip(images.shape[2:], least, strict=True))
    return F.pad(images, (0, width, 0, height))


def _window_starts(length: int, side: int) -> list[int]:
    """Return where windows begin, on the stride: at most two thirds of a side apart, the last one at the end."""
    apart = max(STRIDE, side * 2 // 3 // STRIDE * STRIDE)
    return [*range(0, length - side, apart), length - side]


def distance_to_borders(size: tuple[int, int], tile: int, offset: tuple[int, int] = (0, 0)) -> Tensor:
    """Return how far each pixel is from the nearest line of a grid of tiles, in pixels: (H, W), int64.

    Lines run between pixels, at multiples of `tile` counted from the top left corner less `offset`; the two pixels
    beside a line have distance 0. tile: side in pixels. offset: (y, x) of the corner in the grid.
    """
    rows, columns = (
        torch.minimum((at := (torch.arange(length) + start) % tile), tile - 1 - at)
        for length, start in zip(size, offset, strict=True)
    )
    # (H, 1), (1, W) -> (H, W)
    return torch.minimum(rows[:, None], columns[None, :])
