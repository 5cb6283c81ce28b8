"""What experiments/borders.py counted, and what it says: accuracy near the lines between tiles and far from them.

Intervals are 95 % by bootstrap over images, and over blocks of consecutive ones; the wider, second one is the honest
one where the images are frames of a video. Neither knows what another seed of the training would have brought.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from repmlp.statistics import bootstrap_weights, interval, pooled

COUNTS = ("correct", "labelled", "correct_far", "seams", "differing")
SETTING = ("data", "tile", "step", "margin", "bin", "block", "near", "far", "n_images")


def load(folder: Path) -> list[dict[str, Any]]:
    """Read what was counted for every network, those with tiles first; with counts as arrays
    and what `summarise` says of them.

    Raises ValueError where there is nothing, a file is damaged, or two were not counted over the same pixels.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text())
            for name in ("model", "key", "tiled", "distances", "views", *SETTING):
                record[name]  # or KeyError
            record |= {name: np.array(record[name]) for name in COUNTS if name in record or name != "differing"}
            found.append({**record, "summary": summarise(record), "path": path})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is none of borders.py's files ({error}): run it again") from error
    if not found:
        raise ValueError(f"nothing was counted in {folder}: run experiments/borders.py checkpoint=FILE first")
    first = found[0]
    for other in found[1:]:
        for name in SETTING:
            if other[name] != first[name]:
                raise ValueError(
                    f"{first['path']} has {name}={first[name]} and {other['path']} {name}={other[name]}: "
                    "run experiments/borders.py with the same settings for all networks"
                )
        if not np.array_equal(other["labelled"], first["labelled"]):
            raise ValueError(f"{first['path']} and {other['path']} are of different images: run one of them again")
    names = [record["model"] for record in found]
    for record in found:
        again = names.count(record["model"]) > 1
        record["label"] = f"{record['model']} {record['key']}" if again else record["model"]
    return sorted(found, key=lambda record: (not record["tiled"], record["label"]))


def summarise(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return accuracy over all views, near a line, of the same pixels seen from the middle of a tile, and near - far.

    record: counts as arrays, of (images, bins), seams (images, 4) and differing (images,), and the setting.
    Percent and percentage points; intervals [low, high] over images and over blocks of them, None where there are fewer
    than two. differing_pct: pixels whose guess is not the same in all phases. seam_pct, no_seam_pct: neighbours whose
    guesses differ across a line, and the same neighbours where the line is elsewhere; seam_interval: of the first less
    the second, over blocks.
    """
    block, seams = record["block"], record["seams"]
    near = np.array(record["distances"]) < record["near"]
    # (images, bins) -> (images,)
    correct, labelled, far = (record[name][:, near].sum(axis=1) for name in ("correct", "labelled", "correct_far"))
    found = {
        "accuracy_pct": pooled(record["correct"].sum(axis=1), record["labelled"].sum(axis=1)),
        "near_pct": pooled(correct, labelled),
        "far_pct": pooled(far, labelled),
        "near_minus_far_points": pooled(correct - far, labelled),
    }
    if "differing" in record:
        found["differing_pct"] = record["differing"].sum() / (record["labelled"].sum() / record["views"])
    found["seam_pct"], found["no_seam_pct"] = pooled(seams[:, 1::2], seams[:, ::2])
    found["seam_interval"] = None
    if len(labelled) > block:
        samples = pooled(seams[:, 1::2], seams[:, ::2], bootstrap_weights(len(labelled), block))
        found["seam_interval"] = interval(samples[:, 0] - samples[:, 1])
    for name, size in (("interval_images", 1), ("interval_blocks", block)):
        found[name] = None
        if len(labelled) > size:
            found[name] = interval(pooled(correct - far, labelled, bootstrap_weights(len(labelled), size)))
    rounded = {name: None if value is None else (100 * value).round(4).tolist() for name, value in found.items()}
    # the first files hold no such count, but what came of it
    return rounded if "differing" in record else {**rounded, "differing_pct": record["summary"]["differing_pct"]}


def sentence(record: Mapping[str, Any]) -> str:
    """Say what was found of a network."""
    found = record["summary"]
    over = {"images": "over images", "blocks": f"over blocks of {record['block']}"}
    intervals = [
        f"{found[f'interval_{name}'][0]:+.2f} to {found[f'interval_{name}'][1]:+.2f} {words}"
        for name, words in over.items()
        if found[f"interval_{name}"]
    ]
    return (
        f"{record['model']}, {record['n_images']} images of {record['data']}, tile {record['tile']}: accuracy "
        f"{found['accuracy_pct']:.2f} %; within {record['near']} pixels of a border {found['near_pct']:.2f} %, the "
        f"same pixels at least {record['far']} away {found['far_pct']:.2f} %, difference "
        f"{found['near_minus_far_points']:+.2f} points"
        + (f" (95 %: {', '.join(intervals)})" if intervals else "")
        + "; "
        f"{found['differing_pct']:.2f} % of the pixels are not guessed the same in all {record['views']} phases; "
        f"neighbours differ {found['seam_pct']:.2f} % of the time across a line, the same ones "
        f"{found['no_seam_pct']:.2f} % where it is elsewhere"
    )


def differences(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Return near - far of every network and that less the control's, in points; one row a network.

    Columns: difference, low, high; over_control, control_low, control_high, NaN for controls and where there is none.
    The control is the mean of the networks without tiles, over the same images and the same resamples.
    """
    weights = bootstrap_weights(records[0]["n_images"], records[0]["block"])
    near = np.array(records[0]["distances"]) < records[0]["near"]
    found, samples = [], []
    for record in records:
        # (images, bins) -> (images,)
        part = (record["correct"] - record["correct_far"])[:, near].sum(axis=1)
        whole = record["labelled"][:, near].sum(axis=1)
        found.append(100 * pooled(part, whole))
        samples.append(100 * pooled(part, whole, weights))
    controls = [i for i, record in enumerate(records) if not record["tiled"]]
    rows = []
    for i, record in enumerate(records):
        low, high = interval(samples[i])
        over, over_low, over_high = (float("nan"),) * 3
        if controls and record["tiled"]:
            over = found[i] - np.mean([found[c] for c in controls])
            over_low, over_high = interval(samples[i] - np.mean([samples[c] for c in controls], axis=0))
        rows.append([float(each) for each in (found[i], low, high, over, over_low, over_high)])
    columns = ["difference", "low", "high", "over_control", "control_low", "control_high"]
    return pd.DataFrame(rows, columns=columns, index=[record["label"] for record in records])
