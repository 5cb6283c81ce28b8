"""Table 6, and the tables and curves of studies of segmentation, from records made up here."""

import importlib
import sys
import warnings

import pandas as pd
import pytest
import torch
from conftest import ROOT, command, compose_config

from repmlp.cost import count_params
from repmlp.models.upernet import build_upernet
from repmlp.runs.key import by_setting, cell_key, config_key, determining
from repmlp.runs.record import load_records, record_path, write_record

sys.path.insert(0, str(ROOT / "analysis"))
make_tables = importlib.import_module("make_tables")
curves = importlib.import_module("plots.curves")
paper = importlib.import_module("paper_tables.segmentation")
classified = importlib.import_module("paper_tables.classification")
studies = importlib.import_module("study_tables.segmentation")
older = importlib.import_module("paper_tables.older")
records_of = importlib.import_module("records")
plot_curves = importlib.import_module("plot_curves")

CAMVID = (
    *("model=upernet_slim", "data=camvid", "recipe=segmentation_short", "recipe.epochs=40", "recipe.batch_size=8"),
    *("data.crop_size=[192,288]", "model.kernels=[1,3]", "model.img_size=96"),
)
RESNET = ("model=upernet_slim_resnet", *CAMVID[1:-2])
CITYSCAPES = ("model=upernet_d256", "data=cityscapes", "recipe=segmentation")
WEIGHTS = {"backbone": "a" * 64}
PROFILE = [
    {"layer": "fc", "size": [2, 2], "trained": [0.25, 1.0], "injected": [0.5, 1.0]},
    {"layer": "fc", "size": [4, 4], "trained": [0.1, 0.3, 0.7, 1.0], "injected": [0.2, 0.8, 0.9, 1.0]},
    {"layer": "fc", "size": [1, 1], "trained": [1.0], "injected": [1.0]},
]
COMMON = {
    "study": "seg", "sweep": "seg", "share_sets": None, "global_perceptron": None, "params": 1_234_567,
    "macs": 7_654_321, "merge_error": 2e-7, "train_seconds": 1.0, "images_per_second": 1.0, "device": "", "threads": 1,
    "versions": {}, "commit": None, "dirty": None, "locality": PROFILE, "curve": [],
}  # fmt: skip


def write(folder, miou: float, *overrides: str, model: dict | None = None, **fields) -> dict:
    """Write the record of a run as execute would: of the configuration of `overrides`, model's fields changed."""
    config = compose_config("task=segmentation", *overrides)
    config["model"] |= model or {}
    images = (2_975, 500) if config["data"]["name"] == "cityscapes" else (367, 233)
    record = {
        **COMMON,
        "task": "segmentation",
        "model": config["model"]["name"],
        "kernels": sorted(config["model"]["kernels"]),
        "data": config["data"]["label"],
        "n_train": images[0],
        "n_eval": images[1],
        "seed": config["seed"],
        "epochs": config["recipe"]["epochs"],
        "batch_size": config["recipe"]["batch_size"],
        "miou_pct": miou,
        "pixel_accuracy_pct": 90.0,
        "class_iou_pct": {"Sky": miou, "Road": None},
        "miou_merged_pct": miou,
        "merge_disagreements": 0,
        "eval_pixels": 40_262_400,
        "config": config,
        **fields,
    }
    write_record(record_path(folder, record["study"], config_key(determining(config))), record)
    return record


def write_classification(folder, study: str) -> None:
    config = compose_config("model=resmlp12_cifar")
    record = {
        **COMMON, "study": study, "model": "resmlp12_cifar", "kernels": [1, 3], "data": "cifar100", "n_train": 50_000,
        "n_eval": 10_000, "seed": 0, "epochs": 100, "batch_size": 128, "top1_pct": 50.0, "top5_pct": 80.0,
        "top1_merged_pct": 50.0, "config": config,
        "curve": [{"epoch": 0, "train_loss": 4.0}, {"epoch": 1, "train_loss": 3.0, "top1_pct": 50.0}],
    }  # fmt: skip
    write_record(record_path(folder, study, "classification"), record)


def read(folder) -> pd.DataFrame:
    return load_records(folder, task="segmentation")


@pytest.fixture
def counted(monkeypatch):
    """Stand in for the counts, which need segmentation_models.pytorch."""
    monkeypatch.setattr(paper, "upernet_counts", lambda name, size: (1_000, 2_000 * 10**9))


def test_macs_are_the_papers():
    pytest.importorskip("segmentation_models_pytorch")
    ((name, (title, _, table)),) = paper.tables(pd.DataFrame()).items()
    assert (name, title) == ("table6", "Table 6")
    assert list(table["backbone"]) == ["ResNet-101", "RepMLPNet-D256", "RepMLPNet-D256 (conv5)"]
    assert list(table["paper MACs G"]) == ["2049.82", "1960.01", "1960.16"]
    assert list(table["paper mIoU"]) == ["79.03", "76.27", "77.12"]
    for row in table.to_dict("records"):
        difference = 100 * (float(row["our MACs G"]) / float(row["paper MACs G"]) - 1)
        assert abs(difference) < 0.5
        assert float(row["MACs difference %"]) == pytest.approx(difference, abs=0.006)
    ours = [float(cell) for cell in table["our MACs G"]]
    assert ours[2] - ours[1] == pytest.approx(1960.16 - 1960.01, abs=0.01)
    with torch.device("meta"):
        net = build_upernet("repmlpnet_d256", 19, embed_kernel=3, auxiliary_channels=0, inference_mode=True)
    params = [int(cell.replace(",", "")) for cell in table["our params"]]
    # 5x5 instead of 3x3, depth-wise, in front of stages of 160, 320 and 640 channels
    assert params[1:] == [count_params(net), count_params(net) + (25 - 9) * (160 + 320 + 640)]
    assert list(table["ours on Cityscapes"]) == list(table["difference"]) == [""] * 3


def test_table_6_holds_full_cityscapes_records_alone(tmp_path, counted):
    write(tmp_path, 76.0, *CITYSCAPES, model=WEIGHTS)
    write(tmp_path, 77.0, *CITYSCAPES, "seed=1", model=WEIGHTS)
    write(tmp_path, 77.0, *CITYSCAPES, "seed=1", model=WEIGHTS, study="again")  # the same run counts once
    write(tmp_path, 80.0, *CITYSCAPES, model={"backbone": "b" * 64})
    write(tmp_path, 70.0, *CITYSCAPES, "trainer.precision=bf16-mixed", model=WEIGHTS)
    write(tmp_path, 77.12, "model=upernet_d256_conv5", *CITYSCAPES[1:], model=WEIGHTS)
    for i, overrides in enumerate(
        (
            (),  # from scratch
            ("recipe.epochs=40",),
            ("recipe.label_smoothing=0.1",),
            ("data.crop_size=[512,512]",),
            ("data.n_train=2900",),
            ("data.holdout=0.1",),
            ("data.label=others",),
            ("model.kernels=[]",),
            ("model.embed_kernel=5",),
            ("model.decoder_channels=256",),
        )
    ):
        write(tmp_path, 10.0 + i, *CITYSCAPES, *overrides, model=WEIGHTS if overrides else None, study="reduced")
    write(tmp_path, 30.0, *CITYSCAPES, "seed=2", model=WEIGHTS, n_train=100, study="reduced")  # part of the files
    write(tmp_path, 40.0, *CAMVID, study="small")
    # CamVid by Cityscapes' recipe is still CamVid
    write(tmp_path, 41.0, *CITYSCAPES, "data=camvid", "data.crop_size=[512,1024]", model=WEIGHTS, study="small")
    records = read(tmp_path)
    assert len(records) == 19
    table = paper.table6(records)
    shown = [(row["backbone"], row["ours on Cityscapes"], row["difference"]) for row in table.to_dict("records")]
    assert shown[0] == ("ResNet-101", "", "") and shown[-1] == ("RepMLPNet-D256 (conv5)", "77.12 (n=1)", "+0.00")
    assert sorted(shown[1:-1]) == [
        ("RepMLPNet-D256", "70.00 (n=1)", "-6.27"),
        ("RepMLPNet-D256", "76.50 ± 0.71 (n=2)", "+0.23"),
        ("RepMLPNet-D256", "80.00 (n=1)", "+3.73"),
    ]
    runs = dict(zip(table["ours on Cityscapes"], table["our runs"], strict=True))
    assert runs["76.50 ± 0.71 (n=2)"] == "weights aaaaaaaa, 32-true"
    assert runs["80.00 (n=1)"] == "weights bbbbbbbb, 32-true"
    assert runs["70.00 (n=1)"] == "weights aaaaaaaa, bf16-mixed"
    # what is not in the table is pointed to, and only that
    assert paper.note6(records).endswith("of their own: see study reduced, small.")
    assert paper.note6(pd.DataFrame()).endswith("of their own.")


def test_a_study_by_hand(tmp_path):
    for seed, miou, merged, accuracy, road, changed, error in (
        (0, 40.0, 40.1, 80.0, 60.0, 3, 2e-7),
        (1, 43.0, 42.9, 81.5, None, 1_005, 5e-7),
        (2, 41.5, 41.8, 83.0, 62.0, 0, 3e-7),
    ):
        write(
            tmp_path, miou, *CAMVID, f"seed={seed}", miou_merged_pct=merged, pixel_accuracy_pct=accuracy,
            class_iou_pct={"Sky": 90.0 + seed, "Road": road, "Fence": None}, merge_disagreements=changed,
            merge_error=error,
        )  # fmt: skip
    write(tmp_path, 30.0, *CAMVID, "model.kernels=[]", params=1_000)
    write(tmp_path, 50.0, *CAMVID, "model.embed_kernel=5")
    write(tmp_path, 51.0, *CAMVID, "model.embed_kernel=null")
    write(tmp_path, 45.0, *RESNET)
    ((suffix, runs),) = by_setting(read(tmp_path))
    table = studies.study_table(runs)
    assert suffix == "" and list(table.columns) == [
        "model", "branches", "embedding", "mIoU", "merged mIoU", "pixel accuracy", "params", "MACs", "changed pixels",
        "merge error", "IoU Sky", "IoU Road", "IoU Fence",
    ]  # fmt: skip
    assert [tuple(row) for row in table[["model", "branches", "embedding", "mIoU"]].itertuples(index=False)] == [
        ("upernet_slim", "none", "3x3", "30.00 (n=1)"),
        ("upernet_slim", "1x1+3x3", "2x2", "51.00 (n=1)"),
        ("upernet_slim", "1x1+3x3", "3x3", "41.50 ± 1.50 (n=3)"),
        ("upernet_slim", "1x1+3x3", "5x5", "50.00 (n=1)"),
        ("upernet_slim_resnet", "none", "-", "45.00 (n=1)"),
    ]
    row = table.iloc[2]
    assert (row["merged mIoU"], row["pixel accuracy"]) == ("41.60", "81.50")
    assert (row["params"], row["MACs"], row["changed pixels"]) == ("1,234,567", "7,654,321", "1,005")
    assert (row["merge error"], row["IoU Sky"], row["IoU Road"], row["IoU Fence"]) == ("5.0e-07", "91.00", "61.00", "")
    note = studies.study_note(runs)
    assert note.startswith(
        "camvid (3 classes), 367 training images, 40 epochs, 1,800 steps of 8 crops of 192x288 pixels, tiles of 96 "
        "pixels, from scratch, evaluated after the last epoch on 233 images of 'test', whole, 40,262,400 pixels. Not "
        "the paper's recipe, so not comparable"
    )


def test_different_configurations_are_never_averaged(tmp_path):
    first = write(tmp_path, 40.0, *CAMVID)
    second = write(tmp_path, 42.0, *CAMVID, "seed=1")
    assert cell_key(first["config"]) == cell_key(second["config"])
    write(tmp_path, 20.0, *CAMVID, "model.img_size=64")
    write(tmp_path, 60.0, *CAMVID, model=WEIGHTS)
    write(tmp_path, 80.0, *CAMVID, "model.decoder_channels=32")
    ((_, runs),) = by_setting(read(tmp_path))
    table = studies.study_table(runs)
    shown = sorted(tuple(row) for row in table[["mIoU", "tile", "start"]].itertuples(index=False))
    assert shown == [
        ("20.00 (n=1)", "64", "scratch"),
        ("41.00 ± 1.41 (n=2)", "96", "scratch"),
        ("60.00 (n=1)", "96", "weights aaaaaaaa"),
        ("80.00 (n=1)", "96", "scratch"),
    ]
    note = studies.study_note(runs)
    assert "tiles of 64, 96 pixels, from scratch or a backbone's weights aaaaaaaa" in note
    # the variant's own tiles
    write(tmp_path, 1.0, *CAMVID, "model.img_size=null", study="own")
    assert list(records_of.with_setup(load_records(tmp_path, "own", "segmentation"))["tile"]) == ["224"]
    # another recipe, crop or precision is another table
    write(tmp_path, 1.0, *CAMVID, "recipe.window=[96,192]", "data.holdout=0.2")
    write(tmp_path, 2.0, *CAMVID, "trainer.precision=bf16-mixed")
    settings = [runs for _, runs in by_setting(load_records(tmp_path, "seg", "segmentation"))]
    assert sorted(map(len, settings)) == [1, 1, 5]
    notes = " ".join(map(studies.study_note, settings))
    assert "images held out of training, in windows of 96x192" in notes and "precision bf16-mixed, from" in notes


def test_a_full_study_says_so(tmp_path):
    write(tmp_path, 76.0, *CITYSCAPES, model=WEIGHTS)
    note = studies.study_note(read(tmp_path))
    assert "80,136 steps of 8 crops of 512x1024 pixels, tiles of 256 pixels, from a backbone's weights aaaa" in note
    assert "on 500 images of 'val', whole" in note and "The paper's recipe. mIoU" in note


def test_a_study_of_both_kinds_gives_both_tables_and_a_damaged_record_is_named(tmp_path):
    write(tmp_path, 40.0, *CAMVID, study="both")
    write_classification(tmp_path, "both")
    broken, short = (record_path(tmp_path, "both", name) for name in ("broken", "short"))
    broken.write_text('{"task": "segmentation"')
    short.write_text('{"task": "segmentation", "study": "both"}')
    done = command("analysis/make_tables.py", "--study=both", "--results", str(tmp_path), check=True)
    for path in (broken, short):
        assert done.stderr.count(f"left out: {path} is no whole record") == 1
    for stem in ("table", "table_segmentation"):
        assert {p.suffix for p in (tmp_path / "both").glob(f"{stem}.*")} == {".md", ".csv"}
    text = (tmp_path / "both/table.md").read_text()
    assert "top-1" in text and "mIoU" not in text
    table = pd.read_csv(tmp_path / "both/table_segmentation.csv", dtype=str)
    assert table[["mIoU", "mIoU n", "IoU Sky"]].to_numpy().tolist() == [["40.00", "1", "40.00"]]
    runs = pd.read_csv(tmp_path / "both/runs.csv")
    assert len(runs) == 2 and {"key", "seed", "top1_pct", "miou_pct"} <= set(runs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        plot_curves.main(["both", "--results", str(tmp_path)])
    assert sum("left out: " in str(warning.message) for warning in caught) == 2
    assert {p.name for p in (tmp_path / "both").glob("curves*")} == {
        "curves.png",
        "curves_segmentation.png",
    }
    # in a folder of the user's
    with pytest.warns(UserWarning, match="left out"):
        make_tables.main(["--study=both", "--results", str(tmp_path), "--out", str(tmp_path / "out")])
    assert sorted(p.name for p in (tmp_path / "out").glob("*.md")) == ["study_both.md", "study_both_segmentation.md"]
    # a study of segmentation alone
    write(tmp_path, 41.0, *CAMVID, study="alone")
    make_tables.main(["--study=alone", "--results", str(tmp_path)])
    assert sorted(p.name for p in (tmp_path / "alone").iterdir()) == ["records", "runs.csv", "table.csv", "table.md"]


def test_without_smp_all_other_tables_are_made(tmp_path, monkeypatch, capsys):
    write(tmp_path, 40.0, *CAMVID)
    paper.upernet_counts.cache_clear()
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    for name in ("variants_table", "imagenet_table", "ablation_table"):  # seconds of counting
        monkeypatch.setattr(classified, name, lambda *arguments: pd.DataFrame({"model": ["any"]}))
    monkeypatch.setattr(older, "tables", lambda results: {})
    make_tables.main(["--results", str(tmp_path)])
    shown = capsys.readouterr()
    (line,) = [line for line in shown.err.splitlines() if "Table 6" in line]
    assert line.startswith("Table 6 is left out: ") and "pip install 'repmlp[segment]'" in line
    assert sorted(p.stem for p in tmp_path.glob("tables/table*.md")) == [f"table{n}" for n in range(1, 6)]
    assert "## Study seg" in shown.out and "40.00 (n=1)" in (tmp_path / "seg/table.md").read_text()


def test_an_smp_that_does_not_work_is_an_error(tmp_path, monkeypatch):
    """It is installed, so 'install it' would be the wrong advice."""
    paper.upernet_counts.cache_clear()
    package = tmp_path / "segmentation_models_pytorch"
    package.mkdir()
    (package / "__init__.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.delitem(sys.modules, "segmentation_models_pytorch", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError) as raised:
        paper.tables(pd.DataFrame())
    assert raised.value.name == "a_module_that_is_not_there"


def curve(losses: list[float], mious: dict[int, float]) -> list[dict]:
    return [
        {"epoch": i, "train_loss": loss, **({"miou_pct": mious[i], "pixel_accuracy_pct": 90.0} if i in mious else {})}
        for i, loss in enumerate(losses)
    ]


@pytest.fixture
def drawn(monkeypatch):
    """Keep figures instead of writing them."""
    figures = []
    monkeypatch.setattr(curves, "save", lambda figure, stem, pdf=False: figures.append(figure) or [stem])
    yield figures
    for figure in figures:
        curves.plt.close(figure)


def points(axis) -> dict[str, list]:
    return {
        line.get_label(): [(float(x), round(float(y), 6)) for x, y in zip(*line.get_data(), strict=True)]
        for line in axis.lines
        if not line.get_label().startswith("_")
    }


def test_curves_by_hand(tmp_path, drawn):
    write(tmp_path, 30.0, *CAMVID, curve=curve([2.0, 1.5, 1.0], {1: 20.0, 2: 30.0}))
    write(tmp_path, 34.0, *CAMVID, "seed=1", curve=curve([3.0, 2.5, 2.0], {1: 22.0, 2: 34.0}))
    write(tmp_path, 50.0, *CAMVID, "model.embed_kernel=5", curve=curve([1.0, 0.5, 0.25], {2: 50.0}))
    write(tmp_path, 9.0, *RESNET, curve=curve([4.0], {0: 9.0}), locality=[])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_curves.main(["seg", "--results", str(tmp_path)])
    (figure,) = drawn
    axes = figure.axes
    assert len(axes) == 6
    assert axes[0].get_title() == "upernet_slim: mIoU of the net as trained"
    three, five = ("1x1+3x3, embeddings 3x3 (n=2)", "1x1+3x3, embeddings 5x5 (n=1)")
    # 40: what was measured after the last epoch
    assert points(axes[0]) == {three: [(2, 21.0), (3, 32.0), (40, 32.0)], five: [(3, 50.0), (40, 50.0)]}
    assert points(axes[1]) == {three: [(1, 2.5), (2, 2.0), (3, 1.5)], five: [(1, 1.0), (2, 0.5), (3, 0.25)]}
    # within distance 1: all of 2x2 and of 1x1; of a flat 4x4 kernel, 4 of 16 at 4 corners, 6 at 8 sides, 9 at 4 others
    locality = points(axes[2])
    assert locality[three] == [(0, 100.0), (1, 80.0), (2, 100.0)]
    assert locality["flat kernel"] == [(0, 100.0), (1, round(100 * (4 * 4 + 8 * 6 + 4 * 9) / 16**2, 6)), (2, 100.0)]
    # a ResNet has no spatial layers
    assert points(axes[3]) == {"none (n=1)": [(1, 9.0), (40, 9.0)]}
    assert [axis.get_visible() for axis in axes] == [True] * 5 + [False]


def test_curves_of_runs_that_were_never_evaluated(tmp_path, drawn):
    """With trainer.eval_every beyond the epochs there is a training loss alone."""
    write(tmp_path, 30.0, *CAMVID, curve=curve([2.0, 1.5], {}))
    plot_curves.main(["seg", "--results", str(tmp_path)])
    assert points(drawn[0].axes[0]) == {"1x1+3x3 (n=1)": [(40, 30.0)]}, "what was measured after the last epoch"
    assert points(drawn[0].axes[1]) == {"1x1+3x3 (n=1)": [(1, 2.0), (2, 1.5)]}
