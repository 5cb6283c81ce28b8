"""Tables, heatmaps and curves from records and weights."""

import importlib
import json
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import ROOT, command, compose_config, tiny_config
from matplotlib.figure import Figure

from repmlp.heatmap import outline
from repmlp.kernels import outside_stronger
from repmlp.runs.key import by_setting, run_key
from repmlp.runs.record import load_records, record_path, write_record
from repmlp.runs.run import execute

sys.path.insert(0, str(ROOT / "analysis"))
make_tables = importlib.import_module("make_tables")
curves = importlib.import_module("plots.curves")
gains = importlib.import_module("plots.gains")
locality = importlib.import_module("plots.locality")
paper = importlib.import_module("paper_tables.classification")
studies = importlib.import_module("study_tables.classification")
of_settings = importlib.import_module("study_tables.settings")
plot_curves = importlib.import_module("plot_curves")
plot_kernels = importlib.import_module("plot_kernels")
plot_locality = importlib.import_module("plot_locality")
plot_study = importlib.import_module("plot_study")


def full_record(config: dict, top1: float) -> dict:
    """A record as a full run of `config` would write it."""
    model = config["model"]
    return {
        "study": "locality_cifar100", "sweep": config["sweep"], "model": model["name"], "kernels": model["kernels"],
        "share_sets": model.get("share_sets"), "global_perceptron": model.get("global_perceptron"), "data": "cifar100",
        "n_train": 50_000, "n_eval": 10_000, "seed": config["seed"], "epochs": 100, "batch_size": 128, "top1_pct": top1,
        "top5_pct": 80.0, "top1_merged_pct": top1, "merge_error": 1e-7, "params": 1, "macs": 1, "train_seconds": 1.0,
        "images_per_second": 1.0, "device": "", "threads": 1, "versions": {}, "commit": None, "dirty": None,
        "config": config, "curve": [],
    }  # fmt: skip


def write(folder, top1: float, *overrides: str) -> None:
    config = compose_config(*overrides)
    write_record(record_path(folder, "locality_cifar100", run_key(config)), full_record(config, top1))


def cell(table: pd.DataFrame, model: str, branches: str) -> pd.Series:
    return table[(table["data"] == "cifar100") & (table["model"] == model) & (table["branches"] == branches)].iloc[0]


def test_bare_command_is_the_papers_recipe_and_fills_table_5(tmp_path):
    for seed, top1 in ((0, 67.0), (1, 68.0)):
        write(tmp_path, top1, f"seed={seed}")
    write(tmp_path, 60.0, "model=resmlp12_cifar", "model.kernels=[]")
    write(tmp_path, 10.0, "model=resmlp12_cifar", "recipe.epochs=20")
    write(tmp_path, 11.0, "model=resmlp12_cifar", "data.holdout=0.1")
    write(tmp_path, 12.0, "model=resmlp12_cifar", "model.width=64")
    write(tmp_path, 61.0, "model=resmlp12_cifar", "model.kernels=[]", "trainer.precision=bf16-mixed")
    write(tmp_path, 64.0, "model=resmlp12_cifar", "model.kernels=[3]", "trainer.precision=bf16-mixed")
    table = paper.ablation_table("5", load_records(tmp_path))
    both = cell(table, "repmlpnet_cifar", "1x1+3x3")
    assert (both["ours top-1"], both["difference"]) == ("67.50 ± 0.71 (n=2)", "+0.07")
    none, three = cell(table, "resmlp12_cifar", "none"), cell(table, "resmlp12_cifar", "3x3")
    assert (none["ours top-1"], none["difference"]) == ("60.00 (n=1)", "+4.42"), "float32 goes before bfloat16"
    assert (three["ours top-1"], three["difference"]) == ("64.00 (n=1) in bf16", "+0.24")
    assert cell(table, "resmlp12_cifar", "1x1+3x3")["ours top-1"] == "", "reduced runs stay out of the paper's table"
    assert cell(table, "repmlpnet_cifar", "3x3")["difference"] == ""


def test_table_5_counts_are_the_printed_ones():
    table = paper.ablation_table("5", pd.DataFrame())
    both = cell(table, "resmlp12_cifar", "1x1+3x3")
    assert (both["our MACs"], both["our params"], both["our params, BN as 4"]) == ("+7,864,320", "+168", "+216")
    plain = cell(table, "repmlpnet_cifar", "none")
    assert (plain["our MACs"], plain["our params"]) == ("468,329,472", "8,305,284")
    assert list(paper.ablation_table("4", pd.DataFrame())["our params"])[::3] == ["37,810,696", "67,188,232"]


def test_table_2_holds_full_imagenet_records_alone(tmp_path):
    def run(top1, n_train=1_281_167, *overrides):
        config = compose_config("model=repmlpnet_t224", "data=imagenet", "recipe=imagenet", *overrides)
        record = {**full_record(config, top1), "data": "imagenet", "n_train": n_train, "n_eval": 50_000}
        write_record(record_path(tmp_path, "train", run_key(config)), record)

    run(76.0)
    run(77.0, 1_281_167, "seed=1")
    run(10.0, 9_469, "seed=2")  # another data set in its folder
    run(11.0, 1_281_167, "model.img_size=96")
    run(12.0, 1_281_167, "model.kernels=[]")
    run(13.0, 1_281_167, "recipe.mixup=0.8")
    run(14.0, 1_281_167, "model.share_sets=[2,8,32,256]")
    run(70.0, 1_281_167, "model=timm", "model.variant=resmlp_12_224", "recipe.epochs=120")
    records = load_records(tmp_path)
    table = paper.imagenet_table("2", records, tmp_path).set_index("model")
    t224 = table.loc["RepMLPNet-T224"]
    assert (t224["ours top-1"], t224["difference"]) == ("76.50 ± 0.71 (n=2)", "+0.10")
    assert (t224["our MACs G"], t224["our params M"], t224["released top-1"]) == ("2.798", "38.29", "76.62")
    assert table.loc["ResMLP-S12 (authors' run)", "difference"] == "-0.40"
    assert table.loc["ResMLP-S12 + DeiT-train", "ours top-1"] == "", "400 epochs are another recipe"
    table5 = paper.ablation_table("5", records)
    assert list(table5[table5["model"] == "repmlpnet_t224"]["ours top-1"]) == ["12.00 (n=1)", "76.50 ± 0.71 (n=2)"]


def test_printed_counts_follow_from_the_nets():
    """Params and MACs as printed, but for peers that timm builds otherwise and what is printed truncated."""
    checked = {"our MACs G": 0, "our params M": 0}
    for number in ("2", "3"):
        table = paper.imagenet_table(number, pd.DataFrame(), ROOT / "none")
        for row in table.to_dict("records"):
            if row["our MACs G"] and row["model"] not in ("ResNet-101", "ResNeXt-101", "RepMLPNet-L256"):
                checked["our MACs G"] += 1
                assert abs(float(row["our MACs G"]) - float(row["paper MACs G"])) < 0.1, row
            if row.get("paper params M") and row["our params M"] and row["model"] != "ResNet-101":
                checked["our params M"] += 1
                assert abs(float(row["our params M"]) - float(row["paper params M"])) < 0.9, row
    assert checked["our MACs G"] >= 18 and checked["our params M"] >= 15


def test_table_1_is_the_papers_and_shows_measured_merge_errors(tmp_path):
    table = paper.variants_table(tmp_path)
    assert list(table["merge error float64"]) == [""] * 6
    assert [round(int(n.replace(",", "")) / 1e6, 1) for n in table["merged, conv and linear"]] == [
        float(n) for n in table["paper params M"]
    ]
    table = paper.variants_table(ROOT / "results")
    assert all(float(error) < 1e-12 for error in table["merge error float64"])


def test_throughput_appears_where_it_was_measured(tmp_path):
    folder = tmp_path / "benchmark/measured"
    folder.mkdir(parents=True)
    common = {
        "kind": "inference",
        "model": "repmlpnet_t224",
        "img_size": 224,
        "device": "X",
        "threads": 2,
        "batch_size": 8,
        "dtype": "float32",
    }
    for i, (form, speed) in enumerate((("plain", 90.0), ("merged", 50.0), ("deployed", 70.5))):
        record = {**common, "engine": "eager", "form": form, "images_per_second": speed}
        (folder / f"{i}.json").write_text(json.dumps(record))
    table = paper.imagenet_table("3", pd.DataFrame(), tmp_path)
    assert list(table["our images/s (X, 2 threads, batch 8)"]) == ["70.5", "", "", ""]


def test_gains_are_differences_of_means_and_claim_nothing(tmp_path):
    for kernels, values in (("[]", (50.0, 51.0)), ("[1]", (50.5, 51.5)), ("[3]", (55.0, 56.0))):
        for seed, top1 in enumerate(values):
            write(tmp_path, top1, f"seed={seed}", f"model.kernels={kernels}")
    table = studies.study_table(load_records(tmp_path)).set_index("branches")
    assert list(table.loc[["none", "1x1", "3x3"], "gain"]) == ["", "+0.50", "+5.00"]
    assert "clear" not in table and table.loc["3x3", "top-1"] == "55.50 ± 0.71 (n=2)"


def test_a_study_shows_no_columns_of_other_studies(tmp_path):
    write(tmp_path, 50.0, "model=resmlp12_cifar")
    records = load_records(tmp_path).assign(texture_pct=float("nan"))
    assert "texture" not in studies.study_table(records)
    assert "texture" in studies.study_table(records.assign(texture_pct=3.0))


def test_only_runs_of_one_setting_are_averaged(tmp_path):
    for top1, overrides in (
        (50.0, []),
        (52.0, ["seed=1"]),
        (80.0, ["recipe.epochs=20"]),
        (10.0, ["model.blocks=[1,1]"]),
    ):
        write(tmp_path, top1, *overrides)
    settings = dict(by_setting(load_records(tmp_path)))
    assert sorted(map(len, settings.values())) == [1, 3] and all(settings)
    tables = [studies.study_table(runs) for runs in settings.values()]
    assert sorted(cell for table in tables for cell in table["top-1"]) == [
        "10.00 (n=1)", "51.00 ± 1.41 (n=2)", "80.00 (n=1)",
    ]  # fmt: skip


def test_settings_that_differ_stand_beside_each_other(tmp_path):
    for top1, overrides in (
        (50.0, ["recipe.lr_per_256=0.001"]),
        (52.0, ["recipe.lr_per_256=0.001", "seed=1"]),
        (55.0, []),
        (56.0, ["recipe.decay_all=true"]),
    ):
        write(tmp_path, top1, "data.holdout=0.1", *overrides)
    table = of_settings.settings_table(load_records(tmp_path))
    assert list(table.columns) == ["learning rate per 256 images", "decay all", "top-1", "of images"]
    assert sorted(map(tuple, table.to_numpy().tolist())) == [
        ("0.001", "no", "51.00 ± 1.41 (n=2)", "10,000"),
        ("0.002", "no", "55.00 (n=1)", "10,000"),
        ("0.002", "yes", "56.00 (n=1)", "10,000"),
    ]
    make_tables.main(["--results", str(tmp_path), "--study", "locality_cifar100"])
    assert (tmp_path / "locality_cifar100/settings.md").is_file()


def test_contrasts_of_a_sweep_have_their_table(tmp_path, capsys):
    """The sweep file names them; one seed decides nothing, and its error of images stands apart."""
    for kernels, top1 in (("[]", 50.0), ("[1]", 51.0), ("[3]", 60.0)):
        write(tmp_path, top1, "+sweep=small/locality", "model=repmlpnet_small", f"model.kernels={kernels}")
    make_tables.main(["locality_cifar100", "--results", str(tmp_path)])
    assert "study locality_cifar100: no two runs for the contrast 1x1+3x3 - none yet\n" in capsys.readouterr().err
    write(tmp_path, 61.0, "+sweep=small/locality", "model=repmlpnet_small", "model.kernels=[1,3]")
    make_tables.main(["locality_cifar100", "--results", str(tmp_path)])
    assert "no two runs" not in capsys.readouterr().err
    table = pd.read_csv(tmp_path / "locality_cifar100/contrasts.csv")
    assert pd.api.types.is_numeric_dtype(table["p_holm"]) and table["p_holm"].isna().all()
    assert list(table["contrast"]) == ["1x1 - none", "3x3 - none", "1x1+3x3 - none"]
    assert list(table["difference"]) == [1.0, 10.0, 11.0] and set(table["verdict"]) == {"open (n=1)"}
    runs = pd.read_csv(tmp_path / "locality_cifar100/runs.csv")
    assert {path.stem for path in tmp_path.glob("locality_cifar100/records/*")} == set(runs["key"])
    plot_study.main(["locality_cifar100", "--results", str(tmp_path)])
    gains = pd.read_csv(tmp_path / "locality_cifar100/gains.csv")
    # 10,000 images: 100 * sqrt(0.25/1e4 + 0.24/1e4)
    assert gains["SE over seeds"].isna().all() and gains["SE of images, n=1"][2] == pytest.approx(0.7, abs=1e-3)
    assert gains["gain"].isna().tolist() == [True, False, False, False] and gains["gain"][2] == 10


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysis")
    for kernels in ("[]", "[1,3]"):
        config = tiny_config(folder, f"model.kernels={kernels}", "study=s")
        assert execute(config).state == "finished"
    return folder


def test_commands_make_tables_and_pictures(trained, capsys):
    results, outputs = trained / "results", trained / "outputs"
    where = ["--results", str(results), "--outputs", str(outputs)]
    done = command("analysis/make_tables.py", "s", "--results", str(results), check=True)
    assert "## Study s" in done.stdout and f"wrote {results / 's/table'}.md, .csv" in done.stdout
    assert "texture" in done.stdout and "arrangement" in done.stdout and "not comparable" in done.stdout
    assert {p.suffix for p in results.glob("s/table.*")} == {".md", ".csv"}
    make_tables.main(["s", "--latex", "--results", str(results)])
    assert r"\begin{tabular}" in (results / "s/table.tex").read_text()
    plot_kernels.main(["--study", "s", *where, "--pdf"])
    assert len([p for p in (results / "s").iterdir() if p.name.startswith("kernel_")]) == 2
    shown = capsys.readouterr().out
    assert "injected" in shown and f"wrote {results}/s/kernel_" in shown
    done = command("analysis/explore_kernels.py", "--study", "s", *where, check=True)
    written = Path(done.stdout.split("  (")[0])
    assert written.parent == outputs / "explorer" and "holds all 4 layers" in written.read_text()
    plot_curves.main(["s", "--results", str(results)])
    assert (results / "s/curves.png").stat().st_size > 10_000
    assert f"wrote {results / 's/curves.png'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("make_tables", ["--study", "none"], "no records of study 'none'"),
        ("plot_curves", ["none"], "no records of study 'none'"),
        ("plot_study", ["none"], "no records of classification of study 'none'"),
        ("plot_locality", ["--study", "none"], "no records with spatial layers of study 'none'"),
        ("plot_kernels", ["--study", "none"], "no weights of study 'none'"),
        ("plot_kernels", ["/none/model.safetensors"], "no checkpoint at /none/model.safetensors"),
        ("plot_kernels", ["--study", "s", "--block", "99"], "block 99 does not exist: there are 4"),
        ("plot_kernels", ["--study", "s", "--share-set", "99"], "share-set 99 does not exist"),
        ("plot_kernels", ["--study", "s", "--point", "16,0"], "lies outside the"),
    ],
)
def test_bad_input_is_one_line(trained, script, arguments, words):
    where = ["--results", str(trained / "results")]
    where += ["--outputs", str(trained / "outputs")] if script == "plot_kernels" else []
    with pytest.raises(SystemExit) as ended:  # Python prints the words and exits with 1
        importlib.import_module(script).main([*arguments, *where])
    assert ended.value.code.startswith("error: ") and words in ended.value.code
    assert len(ended.value.code.splitlines()) == 1


def test_points_outside_that_exceed_some_inside():
    values = torch.zeros(5, 5)
    values[1:4, 1:4] = 2.0
    values[2, 2], values[0, 4], values[4, 0], values[0, 0] = 9.0, 5.0, 3.0, 1.0
    inside = torch.zeros(5, 5, dtype=torch.bool)
    assert outside_stronger(values, inside) == []
    inside[1:4, 1:4] = True
    assert outside_stronger(values, inside) == [(0, 4), (4, 0)]


def test_outline_of_cells():
    """A box at the corner of the map and one cell apart: as long as their borders, and where those run."""
    cells = torch.zeros(4, 5, dtype=torch.bool)
    cells[:2, :3] = True
    cells[3, 4] = True
    lines = outline(cells)
    assert len(lines) == len(set(map(tuple, lines))) == 2 * (2 + 3) + 4
    assert {((x0, y0), (x1, y1)) for (x0, y0), (x1, y1) in lines if y0 == y1} == {
        ((x - 0.5, y - 0.5), (x + 0.5, y - 0.5))
        for y, x in [*((y, x) for y in (0, 2) for x in range(3)), (3, 4), (4, 4)]
    }


# ---- studies: gains, locality


def test_gains_are_over_the_fewest_branches_at_the_same_settings(tmp_path):
    small = ["data.n_train=5000", "recipe.epochs=1000"]
    for top1, overrides in (
        (50.0, ["model.kernels=[]"]), (52.0, ["model.kernels=[]", "seed=1"]),
        (60.0, ["model.kernels=[1,3]"]), (60.0, ["model.kernels=[1,3]", "seed=1"]),
        (20.0, ["model.kernels=[]", *small]), (20.0, ["model.kernels=[1,3]", *small]),
    ):  # fmt: skip
        write(tmp_path, top1, *overrides)
    records = load_records(tmp_path)
    records["n_train"] = [config["data"]["n_train"] or 50_000 for config in records["config"]]
    table, axis = gains.cells(records)
    assert axis == ("training images (others change with it)", True)
    assert list(table["at"]) == ["5000", "5000", "50000", "50000"] and list(table["line"]) == ["none", "1x1+3x3"] * 2
    assert list(table["n"]) == [1, 1, 2, 2] and list(table["top1"]) == [20, 20, 51, 60]
    assert list(table["gain"].dropna()) == [0, 9], "an equal accuracy is a gain of nothing, not a second reference"
    error = 100 * (0.2 * 0.8 / 10_000) ** 0.5
    assert table["gain_error"].iloc[1] == pytest.approx(2**0.5 * error) and table["gain_error"].iloc[3] == 1.0
    plot_study.main(["locality_cifar100", "--results", str(tmp_path)])
    assert re.search(r"\+9\.00 +\| 1\.00 ", (tmp_path / "locality_cifar100/gains.md").read_text())
    assert (tmp_path / "locality_cifar100/gains.png").stat().st_size > 10_000


def test_branches_are_the_axis_where_nothing_else_but_the_network_differs(tmp_path):
    for model, tops in (("repmlpnet_cifar", (59, 65)), ("resmlp12_cifar", (55, 63))):
        for kernels, top1 in zip(("[]", "[1,3,5]"), tops, strict=True):
            write(tmp_path, float(top1), f"model={model}", f"model.kernels={kernels}")
    table, axis = gains.cells(load_records(tmp_path))
    assert axis == ("branches", True) and list(table["at"]) == ["none", "1x1+3x3+5x5"] * 2
    assert list(table["line"]) == ["repmlpnet_cifar"] * 2 + ["resmlp12_cifar"] * 2
    assert list(table["gain"].dropna()) == [6, 8]


def test_share_sets_stand_in_the_order_of_their_numbers(tmp_path):
    for sets in ("[16,64]", "[8,32]", "[2,8]"):
        write(tmp_path, 50.0, f"model.share_sets={sets}")
    assert list(gains.cells(load_records(tmp_path))[0]["at"]) == ["2, 8", "8, 32", "16, 64"]


def test_steps_are_compared_with_the_recipe_that_they_change(tmp_path):
    for top1, step in ((60.0, "plain"), (61.0, "mixup"), (58.0, "longer"), (63.0, "[mixup,rand_augment]")):
        write(tmp_path, top1, f"+change={step}", "data.holdout=0.1")
    table = gains.steps(load_records(tmp_path)).set_index("at")
    assert list(table["gain"].dropna()) == [1, 3, -2] and list(table.index) == [
        "reference", "recipe.mixup=0.4", "data.randaugment=9\nrecipe.mixup=0.4",
        "recipe.epochs=300\nrecipe.warmup_epochs=30",
    ]  # fmt: skip
    plot_study.main(["locality_cifar100", "--steps", "--results", str(tmp_path)])
    assert "most like all others (reference)" in (tmp_path / "locality_cifar100/steps.md").read_text()


def profile(index: float) -> list[dict]:
    """Layers over a 1 x 2 map, whose locality index is `index`: a flat kernel has half of it on the point."""
    return [{"layer": "a", "size": [1, 2], "trained": [0.5, 1.0], "injected": [0.5 + index / 2, 1.0]}]


def test_curves_are_means_of_the_same_runs():
    """A run that was evaluated less often does not pull the mean to itself where it was."""
    often = [{"epoch": e, "top1_pct": 10.0 * e, "locality": {"trained": [0.0], "injected": [e]}} for e in range(1, 6)]
    runs = pd.DataFrame({"curve": [often, [{"epoch": 4, "top1_pct": 20.0}, {"epoch": 2, "top1_pct": 40.0}]]})
    runs = runs.assign(epochs=7, top1_pct=[70.0, 50.0])
    each = curves.curves_of(runs, "top1_pct")
    assert [list(curve.index) for curve in each] == [[2, 3, 4, 5, 6, 7], [3, 5, 7]], "every evaluation that exists"
    assert curves.mean_of(each).to_dict() == {3: 30.0, 5: 30.0, 7: 60.0}
    assert curves.index_curve(runs, "injected").to_dict() == {2: 1, 3: 2, 4: 3, 5: 4, 6: 5}
    assert curves.index_curve(runs.tail(1), "injected").empty


def test_locality_is_ranked_within_runs_that_can_be_compared(tmp_path):
    """Within a group accuracy follows locality; between groups and between seeds it falls with it."""
    for group, base, shift in (
        ([], 80.0, 0.0),
        (["recipe.epochs=20"], 20.0, 0.4),
        (["model.share_sets=[2,8]"], 10, 0.6),
    ):
        for number, kernels in enumerate(([], [1], [3], [1, 3], [5], [7])):
            for seed in (0, 1):
                config = {**compose_config(*group), "seed": seed}
                config["model"]["kernels"] = kernels
                index = shift + number / 20 + seed / 100
                record = {**full_record(config, base + number - seed / 2), "locality": profile(index)}
                write_record(record_path(tmp_path, "s", run_key(config)), record)
                write_record(record_path(tmp_path, "again", run_key(config)), record)  # the same runs, once more
    bare, older = compose_config("model.width=8", "model=resmlp12_cifar"), compose_config("seed=9")
    write_record(record_path(tmp_path, "s", run_key(bare)), {**full_record(bare, 1.0), "locality": []})
    write_record(record_path(tmp_path, "s", run_key(older)), full_record(older, 1.0))  # no such field
    merged = compose_config("recipe.merge_after=0.5", "model.kernels=[1,3]")  # its FC holds its branches
    write_record(record_path(tmp_path, "s", run_key(merged)), {**full_record(merged, 1.0), "locality": profile(0.5)})
    records = locality.with_index(load_records(tmp_path))
    assert len(records) == 36 and records["group"].nunique() == 3 and records["cell"].nunique() == 18
    assert sorted(records["injected"])[:2] == pytest.approx([0.0, 0.01]) and set(records["trained"]) == {0.0}
    table = locality.correlations(records).set_index("compared")
    assert list(table["points"]) == [18, 36, 6, 6, 6] and list(table["groups"]) == [3, 18, 1, 1, 1]
    assert table.loc["all, branch sets", "merged kernel"] == pytest.approx(1)
    assert table.loc["all, branch sets", "p, merged kernel"] < 1e-4
    assert table.loc["all, seeds", "merged kernel"] == pytest.approx(-1)
    assert table["merged kernel"].iloc[2] == pytest.approx(1)
    assert table["p, merged kernel"].iloc[2] == pytest.approx(2 / 720)
    assert table["FC alone"].isna().all() and table["p, FC alone"].isna().all(), "all are equally flat"
    shown = locality.as_shown(table.reset_index())
    assert shown.iloc[0]["p, merged kernel"] == "<0.0001" and set(shown["FC alone"]) == {"-"}
    plot_locality.main(["--results", str(tmp_path), "--study", "s"])
    assert (tmp_path / "locality.png").stat().st_size > 10_000 and (tmp_path / "locality.md").is_file()


def test_runs_that_differ_in_more_than_the_seed_are_no_cell(tmp_path):
    for sets, top1 in (("[2,8]", 40.0), ("[8,32]", 60.0)):
        for kernels, gain in (("[]", 0.0), ("[1,3]", 5.0)):
            write(tmp_path, top1 + gain, f"model.share_sets={sets}", f"model.kernels={kernels}")
    write(tmp_path, 55.0, "model=resmlp12_cifar", "model.kernels=[]")
    table, axis = gains.cells(load_records(tmp_path))
    assert axis == ("share-sets", True) and list(table["n"]) == [1] * 5 and list(table["gain"].dropna()) == [5, 5]
    write(tmp_path, 61.0, "model.share_sets=[8,32]", "model.kernels=[]", "data.n_train=50000")  # null, written out
    table, _ = gains.cells(load_records(tmp_path))
    assert set(table["n"]) == {1} and sorted(table["top1"]) == [40, 45, 55, 60, 61, 65]


def test_ticks_are_in_order_where_one_network_lacks_a_set(tmp_path, monkeypatch):
    for model, sets in (("repmlpnet_cifar", ("[]", "[1,3]")), ("resmlp12_cifar", ("[]", "[1]", "[3]", "[1,3]"))):
        for kernels in sets:
            write(tmp_path, 50.0, f"model={model}", f"model.kernels={kernels}")
    drawn = {}
    monkeypatch.setattr(gains, "save", lambda figure, stem, pdf=False: drawn.setdefault("figure", figure) and [])
    table, axis = gains.cells(load_records(tmp_path))
    gains.draw(table, axis, "", "", tmp_path / "x")
    left = drawn["figure"].axes[0]
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["none", "1x1", "3x3", "1x1+3x3"]
    for container in left.containers:
        x = container.lines[0].get_xdata()
        assert list(x) == sorted(x)
        (bars,) = container.lines[2]
        low, high = bars.get_segments()[0][:, 1]
        assert high - low == pytest.approx(4 * 100 * (0.25 / 10_000) ** 0.5), "twice the standard error up and down"


def test_a_study_of_steps_without_its_plain_recipe_has_a_reference_too(tmp_path):
    steps = ("[mixup]", "[mixup,cutmix]", "[mixup,longer]", "[mixup,rand_augment]")
    for number, step in enumerate(steps):
        write(tmp_path, 60.0 + number, f"+change={step}")
    write(tmp_path, 70.0, f"+change={steps[0]}", "seed=1")  # seeds do not count twice
    table = gains.steps(load_records(tmp_path)).set_index("at")
    assert table.loc["reference", "top1"] == 65 and table.loc["recipe.cutmix=1", "gain"] == -4


def test_curves_show_locality_by_epoch_where_runs_kept_it(tmp_path, monkeypatch):
    config = compose_config("model.kernels=[3]")
    curve = [
        {
            "epoch": e,
            "train_loss": 1.0,
            "lr": 0.1,
            "top1_pct": 5.0,
            "locality": {"trained": [-e, -1], "injected": [e, 3]},
        }
        for e in (1, 3)
    ]
    record = {**full_record(config, 50.0), "locality": profile(0.2), "curve": curve}
    write_record(record_path(tmp_path, "s", run_key(config)), record)
    drawn = {}
    monkeypatch.setattr(curves, "save", lambda figure, stem, pdf=False: drawn.setdefault("figure", figure) and [])
    plot_curves.main(["s", "--results", str(tmp_path)])
    injected, trained, _ = drawn["figure"].axes[3].lines
    assert list(injected.get_xdata()) == [2, 4] and list(injected.get_ydata()) == [2, 3]
    assert list(trained.get_ydata()) == [-1, -2]
    assert drawn["figure"].axes[3].get_ylim()[0] <= -2


def test_what_bars_are_is_told_within_the_picture():
    """A study with whole and single cells has bars of two kinds: the line that says so ran out of the picture."""
    module = importlib.import_module("plots.differences")
    found = [
        module.Difference("a", 1.0, 0.5, 1.5, module.ANALYSED, (0.8, 1.2), None),
        module.Difference("b", 1.0, -0.5, 2.5, module.BARS["images"], (1.0,), None),
    ]
    axis = Figure().add_subplot()
    module.panel(axis, found)
    lines = axis.get_title().split("\n")
    assert len(lines) > 2 and max(map(len, lines)) <= module.CAPTION
