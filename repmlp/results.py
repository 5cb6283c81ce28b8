"""One JSON record a run: its key, an atomic write, and all records of a folder as one DataFrame."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    "classification": frozenset(("top1_pct", "top5_pct", "top1_merged_pct")),
    "segmentation": frozenset(("miou_pct", "pixel_accuracy_pct", "class_iou_pct", "miou_merged_pct")),
}


class BadRecord(ValueError):
    """A record file that is truncated or lacks a field."""


def config_key(config: Mapping[str, Any]) -> str:
    """Return twelve hex digits that stand for everything in `config`, whatever the order of its keys."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def branch_label(kernels: Iterable[int]) -> str:
    """Write the sizes of branches as tables and progress lines show them: "1x1+3x3", or "none"."""
    return "+".join(f"{k}x{k}" for k in kernels) or "none"


# Fields of `data` that say where the images come from and who decodes them, not which they are.
PATHS = ("root", "download", "workers", "eval_batch_size")
# Settings that came later, at the value that changes nothing: left out, so that older records keep their keys.
NEUTRAL = {
    "model": {"drop_path_rate": 0.0, "arguments": None, "backbone": None},
    "recipe": {"mixup": 0.0, "cutmix": 0.0, "ema_decay": 0.0, "decay_all": False},
    "data": {"n_eval": None, "label": "imagenet", "randaugment": None},
}


def determining(config: Mapping[str, Any]) -> dict[str, Any]:
    """Pick what determines the result of a run: not paths, devices, folders or how often it is looked at."""
    parts = {
        name: {k: v for k, v in config[name].items() if k not in ignored and NEUTRAL[name].get(k, ...) != v}
        for name, ignored in (("model", ("name",)), ("data", PATHS), ("recipe", ()))
    }
    if isinstance(parts["model"].get("kernels"), list):
        parts["model"]["kernels"] = sorted(parts["model"]["kernels"], key=str)
    trainer = config["trainer"]
    # More processes split a batch, and batch norm sees the share of a process unless it is synchronised.
    processes = trainer.get("devices", 1) * trainer.get("num_nodes", 1)
    shared = {} if processes == 1 else {"processes": processes, "sync_batchnorm": trainer.get("sync_batchnorm", False)}
    return {**parts, **shared, "seed": config["seed"], "precision": trainer["precision"]}


def cell_key(config: Mapping[str, Any]) -> str:
    """Return the key of everything but the seed: runs may be averaged only where it is the same."""
    return config_key({k: v for k, v in determining(config).items() if k != "seed"})


def by_setting(records: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Split records by data, recipe and precision: only what is left may stand in one table.

    Returns (suffix for a file name, records); the suffix is "" where there is one setting.
    """
    keys = [
        config_key({k: v for k, v in determining(config).items() if k not in ("model", "seed")})
        for config in records["config"]
    ]
    groups = list(records.groupby(keys))
    return [("" if len(groups) == 1 else f"_{key[:6]}", rows) for key, rows in groups]


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

    A damaged record is named in a warning and left out. Columns: the fields of the records and `key`.
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
            rows.append({**record, "key": path.stem})
    return pd.DataFrame(rows)
