"""The tables of what a study varies besides its networks, and of its runs one by one."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
import wording
from records import differing_settings, ordered
from table_parts import listed, mean_std

from repmlp.runs.contrasts import shown
from repmlp.runs.key import by_setting, run_key


def settings(records: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield (suffix for a file name, words for a title, records) of a study: what may stand in one table.

    The words are the settings in which a study's tables differ; "" where there is one table.
    """
    if not len(records):
        return
    differing = differing_settings(records)
    names = [name for name in differing if not name.startswith("model.")]
    for suffix, runs in by_setting(records):
        values = differing.loc[runs.index[0]]
        words = ", ".join(wording.phrase(name, wording.value(name, values[name])) for name in names)
        yield suffix, f" ({words})" if suffix else "", runs


def settings_table(records: pd.DataFrame) -> pd.DataFrame:
    """Make the table of a study that varies its recipe: a row a configuration, with the settings that differ."""
    differing = differing_settings(records)
    names = list(differing)
    written = pd.DataFrame({name: wording.values(name, differing[name]) for name in names}, records.index)
    places = differing.map(ordered).apply(tuple, axis=1)
    table = [
        {
            **dict(zip(map(wording.name, names), values, strict=True)),
            "top-1": mean_std(of_cell["top1_pct"]),
            "of images": listed(of_cell["n_eval"]),
        }
        for values, of_cell in (
            (written.loc[of_cell.index[0]], of_cell) for _, of_cell in records.groupby(places, sort=True)
        )
    ]
    return pd.DataFrame(table)


def runs_table(records: pd.DataFrame) -> pd.DataFrame:
    """List the runs of a study, one a row: the key that names its record and its folder, and what it differs in."""
    differing = differing_settings(records)
    measured = [name for name in ("top1_pct", "top1_merged_pct", "miou_pct", "train_seconds") if name in records]
    measured = [name for name in measured if records[name].notna().any()]
    return pd.DataFrame(
        {
            "key": [run_key(config) for config in records["config"]],
            "seed": records["seed"],
            **{
                name: differing[name].map(lambda value, name=name: "" if value != value else shown(name, value))
                for name in differing
            },
            **{name: records[name] for name in measured},
        }
    ).sort_values([*differing, "seed"], ignore_index=True)
