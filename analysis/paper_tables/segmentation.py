"""The paper's Table 6, UperNet on Cityscapes: its costs and mIoU beside ours.

Figures of another data set or recipe than the paper's never stand in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from records import start
from table_parts import mean_std, read_paper

from paper_tables.configurations import is_full_recipe
from paper_tables.counts import upernet_counts
from repmlp.runs.key import cell_key


def table6(records: pd.DataFrame) -> pd.DataFrame:
    """Make Table 6: the paper's costs and ours, the paper's mIoU, and ours by the full recipe on Cityscapes.

    A configuration has a row of its own: runs that start from other weights, or in another precision, are not averaged.
    Raises ModuleNotFoundError without segmentation_models.pytorch.
    """
    paper = read_paper()
    full = [r for r in records.to_dict("records") if is_full_recipe(r)]
    rows = []
    for row in paper[paper["table"] == "6"].itertuples():
        height, width = map(int, row.input.split())
        params, macs = upernet_counts(row.model, (height, width))
        printed = float(row.macs_printed)
        cells: dict[str, dict[int, Mapping[str, Any]]] = {}
        for record in full:
            if record["model"] == row.model:
                # by seed: two studies may hold the same run
                cells.setdefault(cell_key(record["config"]), {})[record["seed"]] = record
        for by_seed in [cells[key] for key in sorted(cells)] or [{}]:
            ours = pd.Series([r["miou_pct"] for r in by_seed.values()], dtype=float)
            first = next(iter(by_seed.values()), None)
            rows.append(
                {
                    "backbone": row.label,
                    "paper MACs G": row.macs_printed,
                    "our MACs G": f"{macs / 1e9:.2f}",
                    "MACs difference %": f"{100 * (macs / 1e9 / printed - 1):+.2f}",
                    "our params": f"{params:,}",
                    "paper mIoU": f"{row.miou_pct:.2f}",
                    "ours on Cityscapes": mean_std(ours),
                    "difference": f"{ours.mean() - row.miou_pct:+.2f}" if len(ours) else "",
                    "our runs": f"{start(first['config'])}, {first['config']['trainer']['precision']}" if first else "",
                }
            )
    return pd.DataFrame(rows)


def note6(records: pd.DataFrame) -> str:
    """Write Table 6's caption, which says where the figures are that do not stand in it."""
    others = sorted({r["study"] for r in records.to_dict("records") if not is_full_recipe(r)})
    where = f": see study {', '.join(others)}" if others else ""
    return (
        "Paper: RepMLPNet Table 6 (UperNet, Cityscapes val, single scale). Our counts: 19 classes, a decoder of 512 "
        "channels, no auxiliary head, RepMLPNet merged; MACs of one image of 1024x2048. 'ours on Cityscapes' and "
        "'difference' hold records of the full recipe alone (all 2,975 images, 216 epochs of 371 steps, a backbone "
        "trained before; last epoch), n = number of seeds; they are empty until such records exist. Runs on CamVid, "
        "from scratch or of another recipe are not comparable with the paper's and have tables of their own"
        f"{where}."
    )


def tables(records: pd.DataFrame) -> dict[str, tuple[str, str, pd.DataFrame]]:
    """Return what there is to write: name of the file -> (title, note, table). records: of segmentation.

    Raises ModuleNotFoundError without segmentation_models.pytorch, which the counts need.
    """
    return {"table6": ("Table 6", note6(records), table6(records))}
