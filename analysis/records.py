"""Reading: what tables and figures of a study ask its records for: settings that differ, setups, errors, layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from numbers import Real
from typing import Any

import pandas as pd
import timm

from repmlp.runs.key import determining, meant_by_absence


def standard_error(runs: pd.DataFrame) -> float:
    """Return the standard error of a cell's mean top-1 in points: over seeds, or of the images where n is 1."""
    return runs["top1_pct"].std() / len(runs) ** 0.5 if len(runs) > 1 else of_images(runs)


def of_images(runs: pd.DataFrame) -> float:
    """Return the standard error in points that the number of images evaluated gives a run's top-1, the first one's."""
    p = runs["top1_pct"].iloc[0] / 100
    return 100 * (p * (1 - p) / runs["n_eval"].iloc[0]) ** 0.5


def error_of_difference(cell: pd.DataFrame, other: pd.DataFrame) -> float:
    """Return the standard error of the difference of two cells' mean top-1, in points; of the images where n is 1.

    Over seeds, paired where both cells have the same ones: order and augmentation are the seed's.
    """
    if min(len(cell), len(other)) == 1:
        return sum(of_images(each) ** 2 for each in (cell, other)) ** 0.5
    ours, theirs = (each.set_index("seed")["top1_pct"] for each in (cell, other))
    if set(ours.index) == set(theirs.index):
        return float((ours - theirs).std() / len(ours) ** 0.5)
    return (standard_error(cell) ** 2 + standard_error(other) ** 2) ** 0.5


def differing_settings(records: pd.DataFrame) -> pd.DataFrame:
    """Return the settings in which runs differ, the seed aside: a row a record, a column a setting by its dotted name.

    The network stands as "model.name". A setting at its default stands with it, one that a run does not have is NaN.
    Columns in the order of the configurations.
    """
    described = []
    for record in records.to_dict("records"):
        config = {k: v for k, v in determining(record["config"]).items() if k != "seed"}
        described.append({"model.name": record["model"], **_flat(config)})
    names = dict.fromkeys(name for each in described for name in each)
    names = [n for n in names if len({json.dumps(each[n]) if n in each else None for each in described}) > 1]
    return pd.DataFrame(
        [{n: each.get(n, meant_by_absence(n)) for n in names} for each in described], records.index, dtype=object
    )


def telling_apart(differing: pd.DataFrame) -> list[str]:
    """Return as few of the settings, first ones first, as tell all their combinations apart."""
    texts = differing.map(text_of)
    chosen: list[str] = []
    for name in texts:
        if len(texts[[*chosen, name]].drop_duplicates()) > (len(texts[chosen].drop_duplicates()) if chosen else 1):
            chosen.append(name)
    return chosen


def text_of(value: Any) -> str:
    return json.dumps(value, default=str)


def ordered(value: Any) -> tuple[int, Any]:
    """Give settings of any kind an order: none, numbers, lists, words."""
    if value is None or value != value:
        return (0, 0)
    if isinstance(value, (list, tuple)):
        return (2, tuple(value))
    return (1, value) if isinstance(value, Real) else (3, str(value))


def layers_of(records: pd.DataFrame) -> pd.Series:
    """Return the locality profiles of each run's spatial layers; [] for records that have none."""
    kept = records["locality"] if "locality" in records else pd.Series(None, records.index, dtype=object)
    return pd.Series([layers if isinstance(layers, list) else [] for layers in kept], records.index, dtype=object)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Write nested settings by dotted names, as the command line has them."""
    flat = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def initial_weights(config: Mapping[str, Any]) -> str | None:
    """Return the hash of the file of weights that a run started from, its own or its backbone's; None: from scratch."""
    return config["model"].get("backbone") or config["model"].get("weights")


def start(config: Mapping[str, Any]) -> str:
    """Say what the weights of a run were at its start: "scratch", or the first digits of the hash of their file."""
    weights = initial_weights(config)
    return f"weights {weights[:8]}" if weights else "scratch"


def with_setup(records: pd.DataFrame) -> pd.DataFrame:
    """Add the columns that tell apart what has one name: embedding, tile (side in pixels) and start."""
    setup = []
    for config in records["config"]:
        model = config["model"]
        embedding, tile = "-", "-"
        if model["encoder"].startswith("repmlpnet"):
            side = model.get("embed_kernel") or 2
            embedding = f"{side}x{side}"
            tile = str(model.get("img_size") or timm.get_pretrained_cfg(model["encoder"]).input_size[-1])
        setup.append({"embedding": embedding, "tile": tile, "start": start(config)})
    return records.join(pd.DataFrame(setup, index=records.index))
