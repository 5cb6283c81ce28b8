"""How long a step of training takes on a GPU, by the way it is run: what the first call of experiments/gpu measured."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pandas as pd

from repmlp.branches import label as branch_label

# modes of experiments/gpu/rows.py, in its order: what they are
WAYS = {
    "eager": "eager",
    "compiled": "compiled",
    "graphed": "compiled, the network as CUDA graphs",
    "captured": "one CUDA graph",
    "captured-compiled": "one CUDA graph, compiled",
    "captured-compiled-sets": "one CUDA graph, compiled, branches by share-sets",
    "captured-compiled-matrix": "one CUDA graph, compiled, branches as matrices",
}
FIRST = 2  # of the epochs noted: the first one starts, the second one compiles


def load(folder: Path) -> pd.DataFrame:
    """Read steps/*.json, one row a way of training: its device, its network, a step's seconds in each timed epoch."""
    rows = []
    for path in sorted(folder.glob("steps/*.json")):
        told = json.loads(path.read_text())
        for name, epochs in told["probes"].items():
            model, branches, mode = name.split()
            steps = [epoch["train"] / told["steps_an_epoch"] for epoch in epochs[FIRST:]]
            if steps:
                label = branch_label(json.loads(branches))
                found = {"device": told["device"], "model": model, "branches": label, "mode": mode, "steps": steps}
                of_run = {name: told[name] for name in ("batch", "steps_an_epoch")}
                rows.append(found | of_run | {"run": path.stem, "torch": told["versions"]["torch"]})
    return pd.DataFrame(rows)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Make the table: milliseconds a step, images a second and the ratio to eager of the same run."""
    made = []
    rows = rows.assign(place=rows["mode"].map(list(WAYS).index), step=rows["steps"].map(statistics.median))
    network = ["run", "model", "branches"]
    eager = rows[rows["mode"] == "eager"].set_index(network)["step"].to_dict()
    for _, row in rows.sort_values([*network, "place"]).iterrows():
        step, slow = row["step"], eager.get(tuple(row[network]))
        made.append(
            {
                "device": row["device"],
                "model": row["model"],
                "branches": row["branches"],
                "way": WAYS[row["mode"]],
                "ms a step": f"{1000 * step:.2f} ({1000 * min(row['steps']):.2f} to {1000 * max(row['steps']):.2f})",
                "epochs timed": len(row["steps"]),
                "images/s": f"{row['batch'] / step:.0f}",
                "times eager": f"{slow / step:.2f}" if slow else "",
            }
        )
    return pd.DataFrame(made)


def note(rows: pd.DataFrame) -> str:
    """Say what was timed."""
    versions, batch, steps = (
        " or ".join(map(str, rows[name].unique())) for name in ("torch", "batch", "steps_an_epoch")
    )
    return (
        f"Training of `experiments/ablate.py`, batch {batch}, bfloat16, by epochs of {steps} steps, one run at a time: "
        f"median (least to most). All ways of a network in one call, torch {versions}. One CUDA graph: forward pass, "
        "loss, backward pass, clipping and update are replayed as one. A way of which one or two epochs were timed was "
        "stopped for lack of time; one that is absent was not compiled in time."
    )
