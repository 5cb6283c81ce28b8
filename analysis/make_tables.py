"""Set the records beside the paper's figures: Tables 1 to 6, and one table for every other study.

    python analysis/make_tables.py                  # the paper's -> results/tables/, a study's -> results/<study>/
    python analysis/make_tables.py --study demo     # one study

Every table is written as Markdown, LaTeX and CSV and printed as Markdown. Figures of ours come from records alone;
'difference' is filled only where a record was made by the paper's full recipe. Parameters and MACs are counted here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import older_tables
import pandas as pd
import segmentation_tables
import timm
import torch
from cells import differing_settings, ordered
from options import Parser, no_records
from significance import analyse, contrasts_note, contrasts_table, pairs_of
from table_parts import emit, listed, mean_std, read_paper

from repmlp import RepMLPBlock, branches, build_model
from repmlp.cost import count_macs, count_params, count_params_layers, count_params_paper
from repmlp.runs.contrasts import named_by
from repmlp.runs.key import branch_label, by_setting, cell_key, determining, run_key
from repmlp.runs.record import MEASURED, load_records

ROOT = Path(__file__).resolve().parents[1]
SWEEPS = ROOT / "experiments/conf/sweep"

# The networks of the tables without what their rows vary.
MODELS: dict[str, dict[str, Any]] = {
    "repmlpnet_cifar": {
        "arch": "repmlpnet", "img_size": 32, "stem_stride": 2, "channels": [128, 256], "blocks": [6, 6],
    },
    "resmlp12_cifar": {
        "arch": "resmlp", "img_size": 32, "patch_size": 2, "depth": 12, "width": 256, "layer_scale": 0.1,
        "init_std": 0.02,
    },
    **{
        f"repmlpnet_{name}": {"arch": "timm", "variant": f"repmlpnet_{name}", "img_size": int(name[1:])}
        for name in ("t224", "b224", "t256", "b256", "d256", "l256")
    },
}  # fmt: skip
CLASSES = {"cifar100": 100, "imagenet": 1000}

# The recipes of the paper's rows; a record of any other has no 'difference'.
RECIPE: dict[str, Any] = {
    "epochs": 100, "lr_per_256": 0.002, "weight_decay": 0.1, "betas": [0.9, 0.999], "warmup_epochs": 10,
    "clip_norm": 5.0, "label_smoothing": 0.1,
}  # fmt: skip
PAPER_RECIPE: dict[str, dict[str, Any]] = {
    "cifar100": {**RECIPE, "batch_size": 128},
    "imagenet": {**RECIPE, "batch_size": 256, "mixup": 0.4, "cutmix": 1.0},
}
PAPER_DATA: dict[str, dict[str, Any]] = {
    "cifar100": {"name": "cifar100", "n_train": None, "holdout": 0.0, "pad": 4, "flip": True},
    "imagenet": {"name": "imagenet", "n_train": None, "holdout": 0.0, "randaugment": 15, "interpolation": "bilinear"},
}
PAPER_IMAGES = {"cifar100": (50_000, 10_000), "imagenet": (1_281_167, 50_000)}
PRECISIONS = {"32-true": "", "bf16-mixed": " in bf16"}  # the paper names none; never averaged with each other
VARIED = ("kernels", "share_sets", "global_perceptron")


def is_full_recipe(record: Mapping[str, Any], epochs: int = 100) -> bool:
    """Say whether a record was made by the paper's recipe, on the whole data set, with the paper's network."""
    name, config = record["data"], determining(record["config"])
    if name not in PAPER_RECIPE:
        return False
    data = {k: v for k, v in config["data"].items() if k != "img_size"}
    model = {k: v for k, v in config["model"].items() if k not in VARIED}
    img_size = config["data"].get("img_size", model.get("img_size"))
    return (
        config["recipe"] == {**PAPER_RECIPE[name], "epochs": epochs}
        and data == PAPER_DATA[name]
        and (record["n_train"], record["n_eval"]) == PAPER_IMAGES[name]  # not another data set in its folder
        and model == MODELS.get(record["model"], {"arch": "timm", "variant": record["model"], "img_size": img_size})
        and model["img_size"] == img_size
        and config["precision"] in PRECISIONS
    )


def top1_of(records: list[Mapping[str, Any]]) -> tuple[pd.Series, str]:
    """Return top-1 of the runs of a cell and how the cell shows it.

    Runs of one setting alone are averaged: of several, float32 comes before bfloat16 and fewer processes, whose batch
    norms see more images, before more.
    """
    by_setting: dict[tuple[int, int], dict[int, float]] = {}
    for record in records:
        key = (list(PRECISIONS).index(determining(record["config"])["precision"]), record.get("processes", 1))
        by_setting.setdefault(key, {})[record["seed"]] = record[
            "top1_pct"
        ]  # by seed: two studies may hold the same run
    if not by_setting:
        return pd.Series(dtype=float), ""
    (precision, processes), by_seed = min(by_setting.items())
    ours = pd.Series(by_seed, dtype=float)
    several = f", batch over {processes} processes" if processes > 1 else ""
    return ours, mean_std(ours) + list(PRECISIONS.values())[precision] + several


@cache
def counts(
    name: str, classes: int, kernels: tuple[int, ...], share_sets: tuple[int, ...], gate: bool | None
) -> tuple[int, int, int]:
    """Count (params, params by the paper's rule for ResMLP, MACs) of the training-time net of a row of the paper."""
    config: dict[str, Any] = {**MODELS[name], "kernels": list(kernels)}
    if share_sets:
        config |= {"share_sets": list(share_sets), "global_perceptron": gate}
    with torch.device("meta"):
        model = build_model(config, classes)
    return count_params(model), count_params_paper(model), count_macs(model, config["img_size"])


@cache
def timm_counts(name: str, img_size: int) -> tuple[int, int]:
    """Count a timm model as the paper's Table 2 does: (params, MACs).

    RepMLPNet is counted merged, and its params without those of norms; any other net as it is.
    """
    ours = name.startswith("repmlpnet")
    given = {"img_size": img_size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    with torch.device("meta"):
        model = timm.create_model(name, **given, **({"inference_mode": True} if ours else {}))
    return count_params_layers(model) if ours else count_params(model), count_macs(model, img_size)


@cache
def structure(name: str) -> dict[str, str]:
    """Read off a variant what Table 1 prints of it: channels, blocks, sizes of maps and share-sets, per stage."""
    with torch.device("meta"):
        model = timm.create_model(name)
    first = [
        next(m for m in stage.modules() if isinstance(m, RepMLPBlock)).channel_perceptron for stage in model.stages
    ]
    return {
        "channels": " ".join(str(info["num_chs"]) for info in model.feature_info),
        "blocks": " ".join(str(len(stage)) for stage in model.stages),
        "maps": " ".join(str(fc.size[0]) for fc in first),
        "share_sets": " ".join(str(fc.share_sets) for fc in first),
    }


def variants_table(results: Path) -> pd.DataFrame:
    """Make Table 1: the six variants as printed, checked against the nets, with counts and the error of merging."""
    measured = results / "variants/variants.json"
    checks = json.loads(measured.read_text())["models"] if measured.exists() else {}
    rows = []
    for row in pd.read_csv(Path(__file__).with_name("paper_models.csv"), dtype=str).to_dict("records"):
        with torch.device("meta"):
            model, merged = (timm.create_model(row["model"], inference_mode=form) for form in (False, True))
        ours = structure(row["model"])
        if different := [name for name, value in ours.items() if value != row[name]]:
            raise ValueError(f"{row['model']} is not the paper's: {different[0]} is {ours[different[0]]}")
        size, check = int(row["input"]), checks.get(row["model"], {})
        rows.append(
            {
                "model": row["label"],
                "input": size,
                "C": row["channels"],
                "blocks": row["blocks"],
                "h=w": row["maps"],
                "S": row["share_sets"],
                "paper params M": row["params_printed"],
                "train-time params": f"{count_params(model):,}",
                "merged params": f"{count_params(merged):,}",
                "merged, conv and linear": f"{count_params_layers(merged):,}",
                "paper MACs G": row["macs_printed"],
                "train-time MACs": f"{count_macs(model, size):,}",
                "merged MACs": f"{count_macs(merged, size):,}",
                **{
                    f"merge error {dtype}": f"{check[f'merge_error_{dtype}']:.1e}" if check else ""
                    for dtype in ("float32", "float64")
                },
            }
        )
    return pd.DataFrame(rows)


def imagenet_table(number: str, records: pd.DataFrame, results: Path) -> pd.DataFrame:
    """Make Table 2 or 3: the paper's figures, the released weights' top-1, ours by the full recipe, and our counts."""
    paper = read_paper()
    speeds = load_speeds(results)
    recorded = [r for r in records.to_dict("records") if r["data"] == "imagenet"]
    rows = []
    for row in paper[paper["table"] == number].itertuples():
        size = int(row.input)
        ours_net = row.model.startswith("repmlpnet")
        ours, shown = top1_of(
            [
                r
                for r in recorded
                if r["model"] == row.model
                and r["kernels"] == ([1, 3] if ours_net else [])
                and r["global_perceptron"] in (None, True)
                and " ".join(map(str, r["share_sets"] or []))
                == (structure(row.model)["share_sets"] if ours_net else "")
                and r["config"]["data"]["img_size"] == size
                and is_full_recipe(r, int(row.epochs))
            ]
        )
        params, macs = timm_counts(row.model, size) if row.model else (None, None)
        cells = {
            "model": row.label,
            "input": size,
            "epochs": row.epochs,
            "paper top-1": f"{row.top1_pct:.1f}",
            "released top-1": row.released_pct,
            "ours top-1": shown,
            "difference": f"{ours.mean() - row.top1_pct:+.2f}" if len(ours) else "",
            "paper MACs G": row.macs_printed,
            "our MACs G": f"{macs / 1e9:.3f}" if row.model else "",
            "paper params M": row.params_printed,
            "our params M": f"{params / 1e6:.2f}" if row.model else "",
            "paper images/s": row.throughput,
            **{
                f"our images/s ({setting})": f"{column[net]:,.1f}"
                if column.get(net := (row.model, size), 0) > 0
                else ""
                for setting, column in speeds.items()
            },
        }
        if number == "3":  # has no such columns
            for name in ("released top-1", "paper params M"):
                del cells[name]
        rows.append(cells)
    return pd.DataFrame(rows)


def load_speeds(results: Path) -> pd.DataFrame:
    """Read the benchmark's records: images a second by (model, input size), a column for each device.

    Eager float32 at the largest batch that was measured there; make_benchmark.py shows the rest. The fastest form of a
    net counts, but for the train-time one and the straightforward baseline.
    """
    records = [json.loads(path.read_text()) for path in sorted(results.glob("benchmark/measured/*.json"))]
    records = [r for r in records if r["kind"] == "inference" and (r["dtype"], r["engine"]) == ("float32", "eager")]
    largest: dict[str, int] = {}
    for r in records:
        largest[r["device"]] = max(r["batch_size"], largest.get(r["device"], 0))
    rows = [
        {
            "net": (r["model"], r["img_size"]),
            "setting": f"{r['device']}, {r['threads']} threads, batch {r['batch_size']}",
            "images_per_second": r["images_per_second"],
        }
        for r in records
        if r["form"] not in ("train-time", "plain") and r["batch_size"] == largest[r["device"]]
    ]
    if not rows:
        return pd.DataFrame()
    return pd.DataFrame(rows).pivot_table("images_per_second", "net", "setting", aggfunc="max")


def paper_table(number: str, records: pd.DataFrame) -> pd.DataFrame:
    """Make Table 4 or 5: the paper's top-1, ours by the full recipe, the difference, and the costs of both."""
    paper = read_paper()
    full = [r for r in records.to_dict("records") if is_full_recipe(r)]
    rows = []
    for row in paper[paper["table"] == number].itertuples():
        ours, shown = top1_of(
            [
                r
                for r in full
                if (r["data"], r["model"], tuple(r["kernels"])) == (row.data, row.model, row.kernels)
                and tuple(r["share_sets"] or ()) == row.share_sets
                and r["global_perceptron"] == row.global_perceptron
            ]
        )
        # what a '+' is counted from: Table 5, the net without branches; Table 4, without Global Perceptron
        reference = (
            ((), row.share_sets, row.global_perceptron) if number == "5" else (row.kernels, row.share_sets, False)
        )
        base = counts(row.model, CLASSES[row.data], *reference)
        params, params_rule, macs = counts(
            row.model, CLASSES[row.data], row.kernels, row.share_sets, row.global_perceptron
        )
        cells = {"data": row.data, "model": row.model, "branches": branch_label(row.kernels)}
        if number == "4":
            cells |= {"share-sets": list(row.share_sets), "Global Perceptron": "yes" if row.global_perceptron else "no"}
        extra = number == "5" and row.kernels
        rows.append(
            {
                **cells,
                "paper top-1": f"{row.top1_pct:.2f}",
                "ours top-1": shown,
                "difference": f"{ours.mean() - row.top1_pct:+.2f}" if len(ours) else "",
                "paper MACs": row.macs_printed,
                "our MACs": f"+{macs - base[2]:,}"
                if extra or (number == "4" and row.global_perceptron)
                else f"{macs:,}",
                "paper params": row.params_printed,
                "our params": f"+{params - base[0]:,}" if extra else f"{params:,}",
                **(
                    {"our params, BN as 4": f"+{params_rule - base[1]:,}" if extra else f"{params_rule:,}"}
                    if number == "5"
                    else {}
                ),
            }
        )
    return pd.DataFrame(rows)


def study_table(records: pd.DataFrame) -> pd.DataFrame:
    """Make the table of one study: every cell's accuracy as trained and merged, and its gain over its first cell.

    The gain is the difference of means to the row of the same network with the fewest branches. What it is worth, the
    table of the study's contrasts says.
    """
    records = records.dropna(axis="columns", how="all").copy()  # no columns of other studies
    for name in ("share_sets", "global_perceptron"):  # ResMLP has neither
        if name not in records:
            records[name] = None
    records["share_sets"] = [tuple(s) if isinstance(s, list) else () for s in records["share_sets"]]
    records["kernels"] = [tuple(k) for k in records["kernels"]]
    records["gate"] = [{True: "yes", False: "no"}.get(gate, "-") for gate in records["global_perceptron"]]
    records["cell"] = [cell_key(config) for config in records["config"]]
    records["order"] = [branches.order(k) for k in records["kernels"]]
    # texture and arrangement: whatever a data set's labels are made of
    parts = [
        name
        for name in records.columns
        if name.endswith("_pct") and not name.endswith("_merged_pct") and name not in ("top1_pct", "top5_pct")
    ]
    rows: list[dict[str, Any]] = []
    cells = sorted(records.groupby(["model", "share_sets", "gate", "order", "cell"]), key=lambda cell: cell[0])
    reference: tuple[str, pd.DataFrame] | None = None
    for (model, share_sets, gate, _, _), cell in cells:
        if reference is None or reference[0] != model:
            reference = (model, cell)
            gain = ""
        else:
            gain = f"{cell['top1_pct'].mean() - reference[1]['top1_pct'].mean():+.2f}"
        rows.append(
            {
                "model": model,
                "branches": branch_label(cell["kernels"].iloc[0]),
                "share-sets": list(share_sets) if share_sets else "1",
                "Global Perceptron": gate,
                "top-1": mean_std(cell["top1_pct"]),
                "merged top-1": f"{cell['top1_merged_pct'].mean():.2f}",
                "gain": gain,
                **{name.removesuffix("_pct"): f"{cell[name].mean():.2f}" for name in parts},
                "merge error": f"{cell['merge_error'].max():.1e}",
                "params": f"{cell['params'].iloc[0]:,}",
                "MACs": f"{cell['macs'].iloc[0]:,}",
                "s a run": f"{cell['train_seconds'].mean():.0f}",
            }
        )
    return pd.DataFrame(rows)


def settings_table(records: pd.DataFrame) -> pd.DataFrame:
    """Make the table of a study that varies its recipe: a row a configuration, with the settings that differ."""
    differing = differing_settings(records)
    names = list(differing)
    shown = differing.map(lambda value: "-" if value is not None and value != value else json.dumps(value))  # NaN
    places = differing.map(ordered).apply(tuple, axis=1)
    table = [
        {
            **dict(zip(names, values, strict=True)),
            "top-1": mean_std(of_cell["top1_pct"]),
            "of images": listed(of_cell["n_eval"]),
        }
        for values, of_cell in (
            (shown.loc[of_cell.index[0]], of_cell) for _, of_cell in records.groupby(places, sort=True)
        )
    ]
    return pd.DataFrame(table)


def scale_line(records: pd.DataFrame) -> str:
    """Say in one line at which scale a study was run."""
    first = records.iloc[0]
    data = ", ".join(sorted(set(records["data"])))
    # `imagenet` stands for any data set in folders
    classes = f" ({first['num_classes']:.0f} classes)" if first.get("num_classes", 0) > 0 else ""
    return (
        f"{data}{classes}, {listed(records['n_train'])} training images, {listed(records['epochs'])} epochs, "
        f"batch {listed(records['batch_size'])}, evaluated on {listed(records['n_eval'])} images after the last epoch."
    )


PAPER_NOTES = {
    "1": (
        "Paper: RepMLPNet Tables 1 and 2. Counts are exact: learnable params, MACs of convolutions and matrix "
        "products. The printed params are the merged net's without batch norms, the printed MACs its own, rounded "
        "(L256's truncated). Merge error: norm of the difference of the logits over their norm, random weights and "
        "statistics (experiments/check_variants.py)."
    ),
    "2": (
        "Paper: RepMLPNet Table 2 (ImageNet; its throughput is that of a 2080 Ti, batch 128). 'released' is what the "
        "released weights report. 'ours' and 'difference' hold records of the full recipe alone, on all of ImageNet; "
        "they are empty until such records exist. Our counts: RepMLPNet merged, its params without norms, the rule "
        "that gives the printed ones; other nets are timm's, as they are (ResMLP-B24: ours; S2-MLP is not in timm)."
    ),
    "3": "Paper: RepMLPNet Table 3; columns as in Table 2.",
    "4": (
        "Paper: RepMLPNet Table 4 (ImageNet, RepMLPNet-T224). Our counts are of the training-time net with both "
        "branches; the paper's MACs are those of the merged net, 9.5M less, and printed truncated. 'ours' is empty "
        "until records of the full recipe exist."
    ),
    "5": (
        "Paper: RepMLPNet Table 5. Extra MACs and params are those of the training-time model. Params count learnable "
        "numbers; the paper's ResMLP rows count a branch's batch norm as four numbers a channel (its running mean and "
        "variance too), its RepMLPNet rows as two: both counts are given. Of what the paper prints for ImageNet, "
        "'+10M' is ours rounded; '+20K', '+60K', '+26M' and D256's 86.94M do not follow from its own network. 'ours' "
        "and 'difference' hold records of the "
        "full recipe alone (100 epochs, 50,000 images, batch 128), last epoch, test set; 'in bf16': trained in "
        "bfloat16, shown where there is no float32 run."
    ),
}
STUDY_NOTE = (
    "Not the paper's recipe, so not comparable with its figures. Top-1: mean ± standard deviation over n seeds. Gains "
    "are over the network's first row, differences of means; nothing is claimed of them here."
)


def make_table_6(records: pd.DataFrame, folder: Path) -> None:
    """Write Table 6, or say that segmentation_models.pytorch, which its counts need, is not installed."""
    try:
        table = segmentation_tables.paper_table(records)
    except ModuleNotFoundError as error:
        if error.name != "segmentation_models_pytorch":  # it is there and broken
            raise
        print(f"Table 6 is left out: {error}", file=sys.stderr)
    else:
        emit("table6", "Table 6", segmentation_tables.paper_note(records), table, folder, latex=True)


def settings(records: pd.DataFrame) -> Iterator[tuple[str, str, str, pd.DataFrame]]:
    """Yield (study, suffix for a file name, words for a title, records): what may stand in one table.

    The words are the settings in which a study's tables differ; "" where there is one table.
    """
    for study, of_study in records.groupby("study") if len(records) else ():
        differing = differing_settings(of_study)
        names = [name for name in differing if not name.startswith("model.")]
        for suffix, rows in by_setting(of_study):
            values = differing.loc[rows.index[0]]
            words = ", ".join(f"{name.rpartition('.')[2]} {plain(values[name])}" for name in names)
            yield study, suffix, f" ({words})" if suffix else "", rows


def runs_table(records: pd.DataFrame) -> pd.DataFrame:
    """List the runs of a study, one a row: the key that names its record and its folder, and what it differs in."""
    differing = differing_settings(records)
    measured = [name for name in ("top1_pct", "top1_merged_pct", "miou_pct", "train_seconds") if name in records]
    return pd.DataFrame(
        {
            "key": [run_key(config) for config in records["config"]],
            "seed": records["seed"],
            **{name: differing[name].map(plain) for name in differing},
            **{name: records[name] for name in measured},
        }
    ).sort_values([*differing, "seed"], ignore_index=True)


def plain(value: Any) -> str:
    """Write a setting: [4, 16] as 4,16, an absent one as a dash."""
    if value is None or value != value:
        return "-"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, "optional", ("tables",))
    parser.add_argument(
        "--out", type=Path, help="folder for all tables (default: RESULTS/tables, a study's in its own)"
    )
    options = parser.parse_args(argv)
    # in one line, so that Python's filter of warnings shows once what both reads say of a damaged record
    records, masks = (load_records(options.results, options.study, task) for task in MEASURED)
    if options.study and not len(records) and not len(masks):
        no_records(options.study, options.results)
    folder = options.out or options.results / "tables"
    if not options.study:
        emit("table1", "Table 1", PAPER_NOTES["1"], variants_table(options.results), folder, latex=True)
        for number in ("2", "3"):
            emit(
                f"table{number}",
                f"Table {number}",
                PAPER_NOTES[number],
                imagenet_table(number, records, options.results),
                folder,
                latex=True,
            )
        for number in ("4", "5"):
            emit(
                f"table{number}",
                f"Table {number}",
                PAPER_NOTES[number],
                paper_table(number, records),
                folder,
                latex=True,
            )
        make_table_6(masks, folder)
        for name, (title, note, table) in older_tables.tables().items():
            emit(name, title, note, table, folder, latex=True)
    for study, suffix, words, rows in settings(records):
        full = all(is_full_recipe(r) for r in rows.to_dict("records"))
        note = scale_line(rows) + " " + ("The paper's recipe." if full else STUDY_NOTE)
        name = (f"study_{study}" if options.out else "table") + suffix
        emit(
            name,
            f"Study {study}{words}",
            note,
            study_table(rows),
            options.out or options.results / study,
            options.latex,
        )
    for study, of_study in records.groupby("study") if len(records) else ():
        if len(list(by_setting(of_study))) > 1:
            name = f"settings_{study}" if options.out else "settings"
            note = f"{scale_line(of_study)} Settings that differ, one row a configuration; last epoch."
            emit(
                name,
                f"Study {study}: settings",
                note,
                settings_table(of_study),
                options.out or options.results / study,
                options.latex,
            )
        runs_table(of_study).to_csv(
            (options.out or options.results / study) / f"{f'runs_{study}' if options.out else 'runs'}.csv", index=False
        )
        tests = analyse(of_study, pairs_of(of_study, named_by(set(of_study["sweep"]), SWEEPS)))
        if tests:
            name = f"contrasts_{study}" if options.out else "contrasts"
            note = f"{scale_line(of_study)} {contrasts_note(tests)}"
            emit(
                name,
                f"Study {study}: contrasts",
                note,
                contrasts_table(tests),
                options.out or options.results / study,
                options.latex,
            )
    classified = set(records["study"]) if len(records) else ()
    for study, suffix, words, rows in settings(masks):
        beside = "_segmentation" if study in classified else ""  # the other kind has its table in the same folder
        name = (f"study_{study}" if options.out else "table") + beside + suffix
        note, table = segmentation_tables.study_note(rows), segmentation_tables.study_table(rows)
        emit(
            name,
            f"Study {study}: segmentation{words}",
            note,
            table,
            options.out or options.results / study,
            options.latex,
        )


if __name__ == "__main__":
    main()
