"""Make tables and a picture of the benchmark's records: speed, memory, ratios beside the paper's.

    python analysis/make_benchmark.py               # results/benchmark/*.md, .tex, .csv and throughput_*.png

Ratios are taken between records of one run alone (they were measured in turn). The paper's throughput is that of a
2080 Ti at batch 128; what can be compared is the ratio of two networks.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import scaling_tables
import step_tables
from options import Parser
from plots.throughput import draw
from table_parts import emit, read_paper

from repmlp.branches import label as branch_label

ROOT = Path(__file__).resolve().parents[1]
SETTING = ["device", "threads", "dtype", "engine", "batch_size"]
# What the paper says of two networks' throughput: (name, ours, other, images/s of both as printed)
CLAIMS = (
    ("RepMLPNet-T224 / EfficientNet-B1", "repmlpnet_t224", "efficientnet_b1", 1709, 912),
    ("RepMLPNet-D256 / ResNeXt-101", "repmlpnet_d256", "resnext101_32x4d", 715, 450),
    ("RepMLPNet-T224 / ResMLP-S12", "repmlpnet_t224", "resmlp_12_224", 1709, 1895),
    ("RepMLPNet-T224 / ResMLP-S24", "repmlpnet_t224", "resmlp_24_224", 1709, 961),
    ("RepMLPNet-B224 / ResNet-101", "repmlpnet_b224", "resnet101", 816, 606),
    ("RepMLPNet-B256 / MLP-Mixer-B/16", "repmlpnet_b256", "mixer_b16_224", 708, 632),
    ("RepMLPNet-B256 / EfficientNet-B2", "repmlpnet_b256", "efficientnet_b2", 708, 707),
    ("RepMLPNet-B256 / ResMLP-B24", "repmlpnet_b256", "resmlp_big_24_patch16_224", 708, None),
)
NOTE = "Median (quartiles) of {rounds} rounds in which all rows were run in turn. {where}."


def load(folder: Path) -> pd.DataFrame:
    """Read the records of the benchmark, one a row."""
    records = pd.DataFrame([json.loads(path.read_text()) for path in sorted(folder.glob("measured/*.json"))])
    for name in ("img_size", "batch_size"):  # kinds that have none must not make floats of the others'
        if name in records:
            records[name] = records[name].astype("Int64")
    return records


def milliseconds(row: pd.Series) -> str:
    low, high = (1000 * s for s in row["seconds_quartiles"])
    return f"{1000 * row['seconds']:.2f} ({low:.2f} to {high:.2f})"


def mebibytes(size: float) -> str:
    return "" if pd.isna(size) else f"{size / 2**20:.1f}"


def note(rows: pd.DataFrame) -> str:
    """Say how the rows were measured, and on every machine among them."""
    machines: dict[str, dict[str, None]] = {}
    for _, row in rows.iterrows():
        versions = machines.setdefault(f"{device(row)}, {row['threads']} threads", {})
        versions |= {f"{name} {number}": None for name, number in row["versions"].items()}
    rounds = " or ".join(map(str, sorted(set(rows["rounds"]))))
    return NOTE.format(rounds=rounds, where="; ".join(", ".join([name, *v]) for name, v in machines.items()))


def device(row: pd.Series) -> str:
    """Name the GPU, or the processor and what it multiplies with, where the record has it."""
    cpu = row.get("processor")
    if not isinstance(cpu, dict) or not row["device"].endswith("CPU"):
        return row["device"]
    said = [f"family {cpu['family']}", row.get("capability"), "AMX" if cpu["amx"] else "no AMX"]
    return f"{cpu['name']} ({', '.join(text for text in said if isinstance(text, str))})"


def inference_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Make the table of one setting: time, throughput, share of the matrix product's rate, ratio to the baseline."""
    plain = {(r["model"], r["img_size"], r["run"]): r["seconds"] for _, r in rows[rows["form"] == "plain"].iterrows()}
    table = []
    for _, row in rows.sort_values(["macs", "model", "seconds"]).iterrows():
        baseline = plain.get((row["model"], row["img_size"], row["run"]))
        table.append(
            {
                "model": row["model"],
                "input": row["img_size"],
                "form": row["form"],
                "MACs G": f"{row['macs'] / 1e9:.2f}",
                "ms": milliseconds(row),
                "images/s": f"{row['images_per_second']:.1f}",
                "% of matmul": f"{100 * row['share_of_matmul_peak']:.0f}",
                "MiB": mebibytes(row["peak_memory_bytes"]),
                "speed-up over plain": "" if baseline is None else f"{baseline / row['seconds']:.2f}",
            }
        )
    return pd.DataFrame(table)


def claims_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Set ratios of throughput beside the paper's: our network deployed, and in the straightforward form."""
    table = []
    for name, ours, other, paper_ours, paper_other in CLAIMS:
        for run in sorted(set(rows["run"])):
            speed = rows[rows["run"] == run].set_index(["model", "form"])["images_per_second"]
            if (ours, "deployed") not in speed.index or (other, "fused") not in speed.index:
                continue
            peer = speed.loc[(other, "fused")]
            # a network at two input sizes: the first, which is timm's own
            peer = float(peer.iloc[0]) if isinstance(peer, pd.Series) else float(peer)
            plain = (ours, "plain") in speed.index
            table.append(
                {
                    "ratio of images/s": name,
                    "paper": "" if paper_other is None else f"{paper_ours / paper_other:.2f}",
                    "ours, deployed": f"{speed.loc[(ours, 'deployed')] / peer:.2f}",
                    "ours, plain": f"{speed.loc[(ours, 'plain')] / peer:.2f}" if plain else "",
                }
            )
    return pd.DataFrame(table)


def branches_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Make the throughput of training-time networks by branches, each over the bare net's, beside Table 5's."""
    paper = read_paper()
    paper = {(r.model, r.kernels): float(r.throughput) for r in paper[paper["table"] == "5"].itertuples()}
    bare = {(r["model"], r["run"]): r["seconds"] for _, r in rows.iterrows() if not r["kernels"]}
    table = []
    for _, row in rows.sort_values("model", kind="stable").iterrows():
        kernels = tuple(row["kernels"])
        printed = paper.get((row["model"], kernels))
        table.append(
            {
                "model": row["model"],
                "branches": branch_label(kernels),
                "ms": milliseconds(row),
                "images/s": f"{row['images_per_second']:.1f}",
                "share of the bare net's": f"{bare[row['model'], row['run']] / row['seconds']:.2f}",
                "paper images/s": "" if printed is None else f"{printed:.0f}",
                "paper share": "" if printed is None else f"{printed / paper[row['model'], ()]:.2f}",
            }
        )
    return pd.DataFrame(table).sort_values(["model", "branches"], key=lambda c: c.map(_order), kind="stable")


def _order(value: str) -> tuple[int, str]:
    return (0, "") if value == "none" else (1 + value.count("+"), value)


def pairs_table(rows: pd.DataFrame, slow: str) -> pd.DataFrame:
    """Make the table of things that were measured in two ways, ours and a straightforward one (`slow`)."""
    keys = [key for key in ("model", "of", "batch_size", "freed_memory") if key in rows and rows[key].notna().any()]
    # where it was measured: part of what is compared with what, told where it is not one and the same
    where = [key for key in ("device", "threads", "dtype", "engine") if key in rows]
    told = [*keys, *(key for key in where if rows[key].nunique(dropna=False) > 1)]
    table = []
    for names, pair in rows.groupby([*keys, *where], sort=False, dropna=False):
        by_form = {r["form"]: r for _, r in pair.iterrows()}
        if not {"ours", slow} <= by_form.keys() or by_form["ours"]["run"] != by_form[slow]["run"]:
            continue
        ours, other = by_form["ours"], by_form[slow]
        table.append(
            {
                **{key: name for key, name in zip([*keys, *where], names, strict=True) if key in told},
                "ours ms": milliseconds(ours),
                **({"ours linear ms": milliseconds(by_form["ours-linear"])} if "ours-linear" in by_form else {}),
                f"{slow} ms": milliseconds(other),
                "times faster": f"{other['seconds'] / ours['seconds']:.2f}",
                "ours MiB": mebibytes(ours["peak_memory_bytes"]),
                f"{slow} MiB": mebibytes(other["peak_memory_bytes"]),
            }
        )
        if "kernels_started" in pair and pair["kernels_started"].notna().all():  # counted on a GPU
            table[-1] |= {f"{form} kernels": f"{by_form[form]['kernels_started']:.0f}" for form in ("ours", slow)}
    return pd.DataFrame(table).fillna("")  # counts that were not taken


def precision_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Make the table of the deployed network's speed in each kind of number, over float32 in torch of the same run."""
    same = ["model", "batch_size", "run"]
    in_torch = rows[(rows["engine"] == "eager") & (rows["dtype"] == "float32")].set_index(same)["seconds"]
    table = []
    for _, row in rows.sort_values([*same, "engine", "dtype"], ascending=[True, True, True, True, False]).iterrows():
        table.append(
            {
                "model": row["model"],
                "batch": row["batch_size"],
                "engine": row["engine"],
                "dtype": row["dtype"],
                "ms": milliseconds(row),
                "images/s": f"{row['images_per_second']:.1f}",
                "over float32 in torch": f"{in_torch[tuple(row[name] for name in same)] / row['seconds']:.2f}",
            }
        )
    return pd.DataFrame(table)


def segmentation_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Make the table of UperNet with its backbones, as trained and merged, one image at a time."""
    trained = {
        (r["model"], r["size"], r["run"]): r["seconds"] for _, r in rows[rows["form"] == "train-time"].iterrows()
    }
    table = []
    for _, row in rows.sort_values(["macs", "seconds"]).iterrows():
        before = trained.get((row["model"], row["size"], row["run"]))
        merged = row["form"] == "merged" and before is not None
        table.append(
            {
                "network": row["model"],
                "image": row["size"],
                "form": row["form"],
                "MACs G": f"{row['macs'] / 1e9:.2f}",
                "ms": milliseconds(row),
                "% of matmul": f"{100 * row['share_of_matmul_peak']:.0f}",
                "MiB": mebibytes(row["peak_memory_bytes"]),
                "times faster by merging": f"{before / row['seconds']:.2f}" if merged else "",
            }
        )
    return pd.DataFrame(table)


def slug_of(where: Mapping[str, Any]) -> str:
    """Return the part of a file name that tells a setting."""
    slug = "_".join(re.sub(r"\W+", "-", str(where[name])) for name in ("device", "dtype", "engine"))
    return f"{slug}_{where['threads']}threads_batch{where['batch_size']}"


def of_all_settings(
    rows: pd.DataFrame, make: Callable[[pd.DataFrame], pd.DataFrame]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Make the table of every setting and put them under each other; settings that differ are columns in front.

    Returns the table and the records of those settings that have a line in it.
    """
    tables = {setting: (make(of_setting), of_setting) for setting, of_setting in rows.groupby(SETTING)}
    tables = {setting: both for setting, both in tables.items() if len(both[0])}
    if not tables:
        return pd.DataFrame(), rows.iloc[:0]
    used = pd.concat([of_setting for _, of_setting in tables.values()])
    for setting, (table, _) in tables.items():
        for name, value in reversed(list(zip(SETTING, setting, strict=True))):
            if used[name].nunique() > 1:
                table.insert(0, name.replace("_size", ""), value)
    return pd.concat([table for table, _ in tables.values()], ignore_index=True), used


def show_scaling(rows: pd.DataFrame, folder: Path, latex: bool) -> None:
    """Write the exponents beside theory, and what larger images would cost, of the latest run."""
    rows = rows[rows["run"] == rows["run"].max()]
    words = scaling_tables.note(rows)
    exponents = scaling_tables.exponents_table(rows)
    points = scaling_tables.points_table(rows)
    emit("scaling", "Scaling of a set-sharing FC", words, exponents, folder, latex, points, scaling_tables.WHY)
    if set(rows["form"]) == set(scaling_tables.FORMS) and len(rows) == 2 * len(scaling_tables.AXES):
        title = f"What the set-sharing FCs of {scaling_tables.NETWORK} would cost at larger inputs, batch 8"
        words = (
            "Made of the fits, not measured: along positions by the parts of the time, which go on as their powers, "
            "along channels and share-sets by the exponents. by exponents: along positions by the exponent too, which "
            "is too little where the curve still bends upwards. extrapolated: positions, channels or share-sets of a "
            "layer lie beyond what was measured. Each FC spans its whole map; cut into partitions of the trained size, "
            "a layer grows with the pixels alone."
        )
        emit("scaling_estimates", title, words, scaling_tables.estimates_table(rows), folder, latex)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, None, ("tables", "figures"))
    parser.add_argument(
        "--all-figures", action="store_true", help="of every data type and engine, not eager float32 alone"
    )
    options = parser.parse_args(argv)
    folder = options.results / "benchmark"
    records = load(folder)
    if not len(records):
        sys.exit(f"error: no records in {folder / 'measured'}: run experiments/benchmark.py first")
    of_kind = dict(list(records.groupby("kind")))
    in_settings = (
        ("inference", "inference", "Inference", inference_table),
        ("claims", "inference", "Ratios of throughput", claims_table),
        ("branches", "branches", "Branches", branches_table),
        ("segmentation", "segmentation", "UperNet, one image at a time", segmentation_table),
    )
    for name, kind, title, make in in_settings:
        if kind not in of_kind:
            continue
        table, used = of_all_settings(of_kind[kind], make)
        if len(table):
            emit(name, title, note(used), table, folder, options.latex)
    if "precision" in of_kind:
        rows = of_kind["precision"]
        emit("precision", "Deployed, by kind of number", note(rows), precision_table(rows), folder, options.latex)
    for setting, rows in of_kind["inference"].groupby(SETTING) if "inference" in of_kind else ():
        where = dict(zip(SETTING, setting, strict=True))
        if options.all_figures or (where["dtype"], where["engine"]) == ("float32", "eager"):
            title = (
                f"Inference, batch {where['batch_size']}, {where['dtype']}, {where['engine']}; {where['device']}, "
                f"{where['threads']} threads"
            )
            for path in draw(rows, title, folder / f"throughput_{slug_of(where)}", options.pdf):
                print(f"wrote {path}")
    for kind, slow in (("training", "plain"), ("merging", "identity"), ("conv_to_fc", "identity")):
        if kind in of_kind and len(table := pairs_table(of_kind[kind], slow)):
            words = note(of_kind[kind]) + " MiB: on top of what is there."
            emit(kind, kind.replace("_", " ").capitalize(), words, table, folder, options.latex)
    if "scaling" in of_kind:
        show_scaling(of_kind["scaling"], folder, options.latex)
    if len(steps := step_tables.load(folder)):
        words = step_tables.note(steps)
        emit("steps", "A step of training on a GPU", words, step_tables.table(steps), folder, options.latex)


if __name__ == "__main__":
    main()
