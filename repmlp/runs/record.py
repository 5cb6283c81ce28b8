"""One JSON record a run: what it holds, an atomic write, what it says, all records of a folder as one DataFrame."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repmlp.runs.key import PATHS
from repmlp.runs.settings import BadSetting

if TYPE_CHECKING:
    import pandas as pd

REQUIRED = frozenset(
    (
        *("study", "sweep", "model", "kernels", "share_sets", "global_perceptron", "data", "n_train", "seed", "epochs"),
        *("batch_size", "merge_error", "params", "macs", "train_seconds", "images_per_second", "device", "threads"),
        *("versions", "commit", "dirty", "config", "curve"),
    )
)
MEASURED = {  # what a record of each task has to hold besides
    "classification": frozenset(("top1_pct", "top1_merged_pct")),
    "segmentation": frozenset(("miou_pct", "pixel_accuracy_pct", "class_iou_pct", "miou_merged_pct")),
}


# settings that say how a command was given, not which run it is
HOW = ("results_dir", "output_dir", "rerun", "reuse", "weights", "backbone", "contrasts")


class BadRecord(ValueError):
    """A record file that is truncated or lacks a field."""


def record_path(results_dir: Path | str, study: str, key: str) -> Path:
    """Return where the record of a run lies: results/<study>/records/<key>.json."""
    return Path(results_dir) / study / "records" / f"{key}.json"


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record, in one step.

    Raises BadRecord where a required field is missing; OSError where the disk is full (the old record survives).
    """
    missing = _required(record) - record.keys()
    if missing:
        raise BadRecord(f"a record needs the fields {', '.join(sorted(missing))}")
    write_json(path, record)


def check_writable(folder: Path, setting: str) -> None:
    """Raise BadSetting, which names a setting, where no file can be written into a folder; it is made where absent."""
    probe = folder / f".{os.getpid()}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadSetting(
            f"{setting}: nothing can be written into {folder} ({error.strerror or error}); name another folder"
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file in one step: a reader sees the old file or the whole new one, whatever happens meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w") as file:
            json.dump(content, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_record(path: Path) -> dict[str, Any]:
    """Read one record; BadRecord where it is truncated or lacks a field."""
    try:
        record = json.loads(path.read_text())
    except ValueError as error:  # a JSON or UTF-8 error
        raise BadRecord(f"{path} is no whole record: {error}") from error
    missing = _required(record) - record.keys() if isinstance(record, dict) else REQUIRED
    if missing:
        raise BadRecord(f"{path} is no whole record: it lacks {', '.join(sorted(missing))}")
    return record


def _required(record: Mapping[str, Any]) -> frozenset[str]:
    """Return the fields that a record has to have; records older than segmentation do not name their task."""
    return REQUIRED | MEASURED.get(record.get("task", "classification"), frozenset())


def load_records(results_dir: Path | str, study: str | None = None, task: str = "classification") -> pd.DataFrame:
    """Read all records of a task below a results folder, or those of one study, as a DataFrame, one run a row.

    A damaged record is named in a warning and left out. Columns: the fields of the records and `key`; `study` is the
    name of the folder, also where it was renamed after the runs.
    """
    import pandas as pd

    root = Path(results_dir)
    rows = []
    for path in sorted(root.glob(f"{study or '*'}/records/*.json")):
        try:
            record = read_record(path)
        except BadRecord as error:
            warnings.warn(f"left out: {error} (run its sweep again)", stacklevel=2)
            continue
        if record.get("task", "classification") == task:
            rows.append({**record, "study": path.parent.parent.name, "key": path.stem})  # the folder is the study
    return pd.DataFrame(rows)


def reached(record: Mapping[str, Any]) -> float:
    """Return what a run reached in percent: top-1, or the mIoU of segmentation."""
    return record["miou_pct"] if record.get("task") == "segmentation" else record["top1_pct"]


def set_aside(path: Path) -> Path:
    """Rename a damaged file so that nothing reads it and nobody loses it."""
    number = 0
    while (aside := path.with_name(f"{path.name}.damaged{number or ''}")).exists():
        number += 1
    path.rename(aside)
    return aside


def published(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the whole configuration but for folders and for how the command was given: records are published."""
    kept = {k: v for k, v in config.items() if k not in HOW}
    return json.loads(json.dumps({**kept, "data": {k: v for k, v in kept["data"].items() if k not in PATHS}}))
