"""What may stand beside a fully-connected layer: convolutions of a shape, on the map as it is or on a shuffled one.

A branch is written as people say it:

    3        3x3; "3" and "3x3" are the same branch
    "1x3"    one row of three columns; "3x1" the other way round
    "3d2"    3x3, dilated by 2: nine taps, two cells apart
    "3s"     3x3 on the map after one fixed random permutation of its positions, undone afterwards: the parameters,
             multiply-accumulates and batch norm of 3 and an equally regular neighbourhood, but not the image's. It is
             the control for every claim about locality

and combinations ("1x3d2", "5s", "3d2s").
"""

from __future__ import annotations

import dataclasses
import numbers
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# How depth-wise branches may be computed beside a layer: the same numbers at another speed, see branches_by()
WAYS = ("channels", "sets", "matrix")

PATTERN = re.compile(r"(?P<height>\d+)(?:x(?P<width>\d+))?(?:d(?P<dilation>\d+))?(?P<shuffled>s)?")


@dataclass(frozen=True)
class BranchSpec:
    """A kind of branch: a "same"-padded, stride-1 convolution and the grid that it works on.

    shape: (height, width) of the kernel in taps, odd. dilation: cells from one tap to the next. shuffled: whether it
    sees the map in a fixed random order of its positions.
    Raises ValueError for a shape or dilation that is not of positive whole numbers, or an even side.
    """

    shape: tuple[int, int]
    dilation: int = 1
    shuffled: bool = False

    def __post_init__(self) -> None:
        if min(self.shape) < 1 or self.dilation < 1 or any(side % 2 == 0 for side in self.shape):
            raise ValueError(
                f"branch {self.label}: its sides have to be odd numbers (1, 3, 5, ...), its dilation 1 or more"
            )
        if self.shape == (1, 1) and (self.dilation > 1 or self.shuffled):
            raise ValueError(f"branch {self.label}: one tap has no neighbours to dilate or to shuffle; write 1")

    @property
    def value(self) -> int | str:
        """Return how configurations, keys and files spell it: a number where a number says it all, else the label."""
        plain = self.shape[0] == self.shape[1] and self.dilation == 1 and not self.shuffled
        if plain:
            return self.shape[0]
        side = str(self.shape[0]) if self.shape[0] == self.shape[1] else f"{self.shape[0]}x{self.shape[1]}"
        return side + self._suffix

    @property
    def label(self) -> str:
        """Return how tables and progress lines show it: "3x3", "1x3", "3x3d2", "3x3s"."""
        return f"{self.shape[0]}x{self.shape[1]}{self._suffix}"

    @property
    def _suffix(self) -> str:
        return (f"d{self.dilation}" if self.dilation > 1 else "") + ("s" if self.shuffled else "")

    @property
    def padding(self) -> tuple[int, int]:
        """Return the zero padding of each side, with which the map keeps its size."""
        return tuple(self.dilation * (side // 2) for side in self.shape)

    def fits(self, size: Sequence[int]) -> bool:
        """Say whether the branch is of use on a map of size (h, w), or a sequence (n,).

        It is not where, along a side, its dilation leaves no tap but the middle one on the map. Nothing else counts:
        the outer taps of a larger kernel may lie off the map, and so may all neighbours of an undilated one where the
        map is one cell high or wide, because published networks have 3x3 branches on maps of one cell.
        """
        sides = zip(self.shape[-len(size) :], size, strict=True)
        return self.dilation == 1 or all(side == 1 or self.dilation < length for side, length in sides)

    def along_sequence(self) -> BranchSpec:
        """Return the branch as it works on a sequence, where k and 1xk both mean k taps along it: always as k.

        Raises ValueError for another shape.
        """
        height, width = self.shape
        if height not in (1, width):
            raise ValueError(f"branch {self.label} on a sequence, which has one dimension: use k for k taps along it")
        return dataclasses.replace(self, shape=(width, width))

    @property
    def order(self) -> tuple:
        """Return what branches are sorted by: on the map itself first, then by taps and by how far they reach."""
        height, width = self.shape
        return (self.shuffled, height * width, self.dilation, height)


def parse(branch: BranchSpec | int | str) -> BranchSpec:
    """Read one branch; ValueError for anything that is none."""
    if isinstance(branch, BranchSpec):
        return branch
    if isinstance(branch, numbers.Integral) and not isinstance(branch, bool):
        return BranchSpec((int(branch), int(branch)))
    found = PATTERN.fullmatch(branch) if isinstance(branch, str) else None
    if found is None:
        raise ValueError(
            f'branch {branch!r}: use a size such as 3, or "1x3", "3d2" (dilated by 2), "3s" (shuffled grid)'
        )
    height = int(found["height"])
    return BranchSpec(
        (height, int(found["width"] or height)), int(found["dilation"] or 1), found["shuffled"] is not None
    )


def parse_all(branches: Iterable[BranchSpec | int | str], size: Sequence[int] | None = None) -> tuple[BranchSpec, ...]:
    """Read a set of branches, sorted.

    size: of the map that they work on, (h, w), or (n,) for a sequence (see BranchSpec.along_sequence); None where it
    does not matter.
    Raises ValueError for one that is none, is there twice, or is of no use on the map (see BranchSpec.fits).
    """
    if isinstance(branches, (str, numbers.Number)):
        raise ValueError(f"kernels={branches!r}: use a list, e.g. [1,3], and [] for none")
    branches = tuple(branches)
    try:
        specs = [parse(branch) for branch in branches]
        if size is not None and len(size) == 1:
            specs = [spec.along_sequence() for spec in specs]
    except ValueError as error:
        raise ValueError(f"kernels={list(branches)}: {error}") from None
    for spec in specs:
        if specs.count(spec) > 1:
            raise ValueError(f"kernels={list(branches)}: the branch {spec.label} stands there twice")
        if size is not None and not spec.fits(size):
            shortest = min(n for side, n in zip(spec.shape[-len(size) :], size, strict=True) if side > 1)
            raise ValueError(
                f"kernels={list(branches)}: of the branch {spec.label} only middle taps ever lie on a map of "
                f"{'x'.join(map(str, size))}; use a dilation below {max(shortest, 2)}"
            )
    return tuple(sorted(specs, key=lambda spec: spec.order))


def check_published(branches: Iterable[BranchSpec | int | str]) -> None:
    """Raise ValueError for a branch that the published code lacks: it has undilated squares on the map itself."""
    for spec in parse_all(branches):
        if not isinstance(spec.value, int):
            raise ValueError(
                f"a net with the branch {spec.label} cannot be written: the authors' code has plain square ones only; "
                "write the merged net"
            )


def values(branches: Iterable[BranchSpec | int | str]) -> list[int | str]:
    """Return a set of branches as configurations, keys and files spell it, sorted."""
    return [spec.value for spec in parse_all(branches)]


def order(branches: Iterable[BranchSpec | int | str]) -> tuple:
    """Return what sets of branches are sorted by in tables and figures: few branches first."""
    specs = parse_all(branches)
    return len(specs), tuple(spec.order for spec in specs)


def label(branches: Iterable[BranchSpec | int | str]) -> str:
    """Write a set of branches as tables and progress lines show it: "1x1+3x3", or "none"."""
    return "+".join(spec.label for spec in parse_all(branches)) or "none"
