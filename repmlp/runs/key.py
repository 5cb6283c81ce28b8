"""The key of a run: a hash of everything that determines its result, which names its record and its folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from repmlp import branches
from repmlp.runs.settings import ALWAYS, CHANGED, NEVER, PARTS, Data

if TYPE_CHECKING:
    import pandas as pd


def config_key(config: Mapping[str, Any]) -> str:
    """Return twelve hex digits that stand for everything in `config`, whatever the order of its keys."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


# Fields of `data` that say where the images come from and who decodes them, not which they are.
PATHS = tuple(each.name for each in dataclasses.fields(Data) if each.metadata["key"] == NEVER)


def _kept(part: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a part that stand in a key, spelt as they are given; what `part` does not list stands."""
    rules = {each.name: each.metadata for each in dataclasses.fields(part)}
    kept = {}
    for name, value in values.items():
        rule = rules.get(name, {"key": ALWAYS})
        later = rule["key"] == CHANGED or values.get("name") in rule.get("later_in", ())
        neutral = later and value == rule["neutral"]
        if rule["key"] != NEVER and not neutral:
            kept[name] = value
    return kept


def determining(config: Mapping[str, Any]) -> dict[str, Any]:
    """Pick what determines the result of a run: not paths, devices, folders or how often it is looked at.

    config: of a run or of its record, in plain values. The settings say themselves what they have to do with a key
    (settings.py): the first records' stand in every key, a later one only where it is not at its neutral value.
    """
    parts = {name: _kept(PARTS[name], config[name]) for name in ("model", "data", "recipe")}
    if isinstance(parts["model"].get("kernels"), list):
        parts["model"]["kernels"] = sorted(branches.values(parts["model"]["kernels"]), key=str)
    trainer = config["trainer"]
    # More processes split a batch, and batch norm sees the share of a process unless it is synchronised.
    processes = trainer.get("devices", 1) * trainer.get("num_nodes", 1)
    shared = {} if processes == 1 else {"processes": processes, "sync_batchnorm": trainer.get("sync_batchnorm", False)}
    return {**parts, **shared, "seed": config["seed"], "precision": trainer["precision"]}


def meant_by_absence(name: str) -> Any:
    """Return what a setting is in a run whose `determining` lacks it; NaN for one that such a run does not have.

    name: dotted, e.g. "recipe.mixup".
    """
    part, _, field = name.partition(".")
    rules = {each.name: each.metadata for each in dataclasses.fields(PARTS[part])} if part in PARTS else {}
    return rules[field]["neutral"] if field in rules and rules[field]["key"] == CHANGED else math.nan


def run_key(config: Mapping[str, Any]) -> str:
    """Return the key of a run, the name of its record and of its folder."""
    return config_key(determining(config))


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
