"""Draw accuracy over a number for locality, for every run of this project, and say how well the one ranks the other.

    python analysis/plot_locality.py                          # -> results/locality.png and .pdf; locality.md
    python analysis/plot_locality.py --study kernels_cifar100 --study sharing_cifar100

The number is `repmlp.locality.locality_index`, the mean over a network's spatial layers: 0 for a flat kernel, 1 where
all weight is on the output point itself. Once for the merged kernel, once for the FC alone. Runs are compared with runs
of the same network, data and recipe only.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from figures import save
from table_parts import emit

from repmlp.locality import locality_index
from repmlp.results import by_setting, load_records
from repmlp.statistics import interval, rank_correlation, rank_correlation_samples

ROOT = Path(__file__).resolve().parents[1]
KINDS = {"injected": "merged kernel", "trained": "FC alone"}
LEAST = 4  # runs; of fewer a rank correlation says nothing
LEAST_FOR_INTERVAL = 10
NOTE = (
    "Rank correlation (Spearman) of top-1 with the locality index: the mean over the spatial layers of how much "
    "nearer to the output point its |weight| lies than a flat kernel's (0 flat, 1 all on the point). Ranks within runs "
    "of one network, data and recipe alone. Interval: 95 %, runs drawn anew within these groups, from 10 runs on; "
    "chance: share of random pairings that correlate at least as much. Runs with other branches differ in locality by "
    "construction; the rows without and with branches keep these apart."
)


def with_index(records: pd.DataFrame) -> pd.DataFrame:
    """Add the mean locality index of each run's layers, before and after injection, and the group that it belongs to.

    Runs without spatial layers are left out, and a run that two studies hold counts once.
    """
    records = records[[bool(layers) for layers in records["locality"]]]
    records = records.drop_duplicates(subset="key")
    for kind in KINDS:
        records = records.assign(
            **{
                kind: [
                    float(np.mean([locality_index(layer[kind], layer["size"]) for layer in layers]))
                    for layers in records["locality"]
                ]
            }
        )
    names = pd.Series("", index=records.index)
    for number, (_, rows) in enumerate(by_setting(records), start=1):
        for (model, data, n_train), of_model in rows.groupby(["model", "data", "n_train"]):
            names[of_model.index] = f"{model}, {data}, {n_train:,} images, setting {number}"
    return records.assign(group=names)


def correlations(records: pd.DataFrame) -> pd.DataFrame:
    """Return the table of rank correlations: over all groups, without and with branches, and of each group."""
    branches = records["kernels"].map(len) > 0
    parts = {
        "all": records,
        "all, runs without branches": records[~branches],
        "all, runs with branches": records[branches],
        **dict(list(records.groupby("group"))),
    }
    table = []
    for name, rows in parts.items():
        groups = [of_group for _, of_group in rows.groupby("group") if len(of_group) > 1]
        n = sum(map(len, groups))
        row = {"runs": name, "n": n, "groups": len(groups)}
        for kind, words in KINDS.items():
            pairs = [(of_group[kind].to_numpy(), of_group["top1_pct"].to_numpy()) for of_group in groups]
            rho = rank_correlation(pairs) if n >= LEAST else float("nan")
            row[words] = "-"
            if rho == rho:
                samples, chance = rank_correlation_samples(pairs)
                between = "({:+.2f} to {:+.2f})".format(*interval(samples)) if n >= LEAST_FOR_INTERVAL else "(few runs)"
                row[words] = f"{rho:+.2f} {between}, chance {chance:.3f}"
        table.append(row)
    return pd.DataFrame(table)


def draw(records: pd.DataFrame, table: pd.DataFrame, stem: Path) -> list[Path]:
    """Draw top-1 less the mean of its group over the index, merged kernel and FC alone; hollow: without branches."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained", sharey=True)
    for axis, (kind, words) in zip(axes, KINDS.items(), strict=True):
        for number, (group, rows) in enumerate(records.groupby("group")):
            for bare, face in ((True, "none"), (False, f"C{number}")):
                some = rows[(rows["kernels"].map(len) == 0) == bare]
                label = None if bare else f"{group} (n={len(rows)})"
                above = some["top1_pct"] - rows["top1_pct"].mean()
                axis.scatter(some[kind], above, s=28, facecolors=face, edgecolors=f"C{number}", label=label)
        axis.set_title(f"{words}: rank correlation {table[words].iloc[0]}", fontsize=10)
        axis.set_xlabel("locality index, mean over spatial layers")
        axis.axhline(0, color="black", lw=0.8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("top-1 less the mean of its group, points")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=7)
    figure.suptitle("Does locality predict accuracy? One point a run; hollow: no branches")
    return save(figure, stem)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--study", action="append", help="this study alone; may be given several times")
    options = parser.parse_args(argv)
    records = pd.concat([load_records(options.results, study) for study in options.study or [None]], ignore_index=True)
    records = with_index(records) if len(records) else records
    if not len(records):
        studies = ", ".join(options.study or ["any study"])
        sys.exit(f"error: no records with spatial layers of {studies} in {options.results}")
    table = correlations(records)
    emit("locality", "Locality and accuracy", NOTE, table, options.results)
    for path in draw(records, table, options.results / "locality"):
        print(path)


if __name__ == "__main__":
    main()
