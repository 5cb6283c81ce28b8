"""Tables and figures of a study that no longer come out of its records: they go when the others are made anew."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

SETTING = r"(_[0-9a-f]{6})?"  # by_setting's part of a name
# what commands make of records alone, by the stem of its file
TABLES = re.compile(rf"(table(_segmentation)?{SETTING}|settings|contrasts|runs)\.(md|csv|tex)")
CURVES = re.compile(rf"curves(_segmentation)?{SETTING}\.(png|pdf)")
GAINS = re.compile(r"gains\.(md|csv|tex|png|pdf)")
STEPS = re.compile(r"steps\.(md|csv|tex|png|pdf)")


def remove(folder: Path, kinds: Iterable[re.Pattern[str]], made: Iterable[str] = ()) -> list[Path]:
    """Remove the files of some kinds from a study's folder, but those whose stem is among `made`, and say so."""
    kept, gone = set(made), []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.stem not in kept and any(kind.fullmatch(path.name) for kind in kinds):
            path.unlink()
            gone.append(path)
            print(f"removed {path}: no records of it any more")
    return gone


def whole(folder: Path, records: int) -> bool:
    """Say whether so many records are all that a study's folder holds: none is damaged and was left out.

    Where one is, nothing goes: what was made of it cannot be made anew.
    """
    return len(list(folder.glob("records/*.json"))) == records
