"""The comparisons that a sweep names before its runs: which setting goes from what to what, and what is claimed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from repmlp import branches

FIELDS = {"vary", "from", "to", "equivalent_within"}


@dataclass(frozen=True)
class Contrast:
    """One comparison of a study: the cells with `vary` at `to` minus those with it at `before`, all else equal.

    vary: dotted name of a setting, e.g. "model.kernels"; "model" for whole networks, then the values are their names.
    equivalent_within: points of top-1; the claim is then that the two differ by less. None: the claim is that they
    differ.
    """

    vary: str
    before: Any
    to: Any
    equivalent_within: float | None = None

    def matches(self, value: Any, end: Any) -> bool:
        """Say whether a setting's value is one end of the contrast; branches are compared as a set."""
        return _plain(self.vary, value) == _plain(self.vary, end)

    def __str__(self) -> str:
        before, to = (shown(self.vary, value) for value in (self.before, self.to))
        return f"{to} - {before}" if self.vary in ("model", "model.kernels") else f"{self.vary}: {to} - {before}"


def shown(setting: str, value: Any) -> str:
    """Write a setting's value as tables show it."""
    if setting == "model.kernels" and isinstance(value, list):
        return branches.label(value)
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, bool):  # before numbers: 0 == False
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else str(value)


def parse(given: Iterable[Any]) -> list[Contrast]:
    """Read contrasts as a sweep file has them: {vary: SETTING, from: VALUE, to: VALUE, equivalent_within: POINTS}.

    Raises ValueError for one that is no such mapping, naming it.
    """
    found = []
    for each in given:
        if not isinstance(each, Mapping) or not {"vary", "from", "to"} <= each.keys() <= FIELDS:
            raise ValueError(f"{each!r}: use {{vary: SETTING, from: VALUE, to: VALUE, equivalent_within: POINTS}}")
        margin = each.get("equivalent_within")
        if margin is not None and not (isinstance(margin, (int, float)) and margin > 0):
            raise ValueError(f"equivalent_within={margin!r}: use a positive number of points")
        found.append(Contrast(each["vary"], each["from"], each["to"], margin))
    return found


def named_by(sweeps: Iterable[str], folder: Path) -> list[Contrast]:
    """Return the contrasts that sweeps name, each once. sweeps: their names. folder: of the sweep files."""
    wanted, found = set(sweeps), {}
    for path in sorted(folder.rglob("*.yaml")):
        content = yaml.safe_load(path.read_text()) or {}
        if content.get("sweep") in wanted:
            # told apart by their words: the values may be lists, which have no hash
            found |= {(str(each), each.equivalent_within): each for each in parse(content.get("contrasts", []))}
    return list(found.values())


def _plain(setting: str, value: Any) -> str:
    if setting == "model.kernels" and isinstance(value, (list, tuple)):
        return branches.label(value)
    return json.dumps(value)
