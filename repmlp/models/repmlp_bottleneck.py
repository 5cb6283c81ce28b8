"""The residual blocks with a RepMLP in them.

Paper: RepMLP (arXiv 2105.01883), Section 3.5 and Figure 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repmlp.repmlp_block import RepMLP


class _Residual(nn.Module):
    """x + branch(x), then a ReLU: what both kinds of block share. Subclasses define `branch` and `last_norm`."""

    def __init__(self, drop_path: nn.Module | None):
        super().__init__()
        self.drop_path = drop_path

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if self.drop_path is not None:
            y = self.drop_path(y)
        return self.act(y + x)

    def zero_init_last(self) -> None:
        """Start the last batch norm's weight at 0, as timm's ResNets do: the block adds nothing yet."""
        nn.init.zeros_(self.last_norm.weight)

    def _initialise(self) -> None:
        """Draw convolutions as timm's ResNets do."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class RepMLPBottleneck(_Residual):
    """1x1, 3x3, RepMLP, 3x3, 1x1 convolution, each but RepMLP with a batch norm, ReLU between them; shortcut.

    Paper: RepMLP Section 3.5 and Figure 4, "RepMLP Bottleneck": the 3x3 convolutions change between mid and
    mid/reduction channels, so that FC3, whose size is quadratic in its channels, works on fewer of them.

    channels: of input and output. mid: between the 1x1 and the 3x3 convolutions. reduction: r, divides mid.
    drop_path: of the replaced block, or None. stride: 1; another is refused. repmlp: of RepMLP, see there.
    Input and output (N, C, H, W).
    Raises ValueError where r does not divide mid, for a stride, and as RepMLP does.
    """

    def __init__(
        self, channels: int, mid: int, reduction: int, *, drop_path: nn.Module | None = None, stride: int = 1, **repmlp
    ):
        super().__init__(drop_path)
        inner = _inner_channels(mid, reduction, stride)
        self.conv1 = nn.Conv2d(channels, mid, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = nn.Conv2d(mid, inner, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.repmlp = RepMLP(inner, inner, **repmlp)
        self.conv3 = nn.Conv2d(inner, mid, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(mid)
        self.conv4 = nn.Conv2d(mid, channels, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self._initialise()

    @torch.jit.unused
    @property
    def last_norm(self) -> nn.Module:
        return self.bn4

    def branch(self, x: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(x)))
        x = self.act(self.repmlp(self.act(self.bn2(self.conv2(x)))))
        x = self.act(self.bn3(self.conv3(x)))
        return self.bn4(self.conv4(x))


class RepMLPLight(_Residual):
    """1x1 convolution, RepMLP, 1x1 convolution, the convolutions with a batch norm, ReLU between them; shortcut.

    Paper: RepMLP Section 4.2, "RepMLP Light Block". Arguments as RepMLPBottleneck; the RepMLP has channels/reduction
    channels, and there is no `mid`.
    """

    def __init__(self, channels: int, reduction: int, *, drop_path: nn.Module | None = None, stride: int = 1, **repmlp):
        super().__init__(drop_path)
        inner = _inner_channels(channels, reduction, stride)
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.repmlp = RepMLP(inner, inner, **repmlp)
        self.conv2 = nn.Conv2d(inner, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)
        self._initialise()

    @torch.jit.unused
    @property
    def last_norm(self) -> nn.Module:
        return self.bn2

    def branch(self, x: Tensor) -> Tensor:
        x = self.act(self.repmlp(self.act(self.bn1(self.conv1(x)))))
        return self.bn2(self.conv2(x))


def _inner_channels(channels: int, reduction: int, stride: int) -> int:
    if stride != 1:
        raise ValueError(f"stride={stride}: a RepMLP block keeps the map's size, so leave this block as it is")
    if reduction < 1 or channels % reduction:
        raise ValueError(f"reduction={reduction} does not divide {channels} channels")
    return channels // reduction
