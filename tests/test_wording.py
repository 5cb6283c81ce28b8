"""Figures and tables of studies in a reader's words: what stands beside accuracy, and no setting by its dotted name."""

import importlib
import math
import re
import sys

import pytest
from conftest import ROOT, compose_config

from repmlp.runs.contrasts import Contrast, named_by
from repmlp.runs.key import run_key
from repmlp.runs.record import load_records, record_path, write_record

sys.path.insert(0, str(ROOT / "analysis"))
gains = importlib.import_module("plots.gains")
curves = importlib.import_module("plots.curves")
differences = importlib.import_module("plots.differences")
significance = importlib.import_module("significance")
studies = importlib.import_module("study_tables.classification")
of_settings = importlib.import_module("study_tables.settings")
wording = importlib.import_module("wording")

SWEEPS = ROOT / "experiments/conf/sweep"
TABLE4 = [
    (f"model.share_sets={sets}", f"model.global_perceptron={gate}")
    for sets in ("[4,16]", "[8,32]")
    for gate in ("true", "false")
]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are made, instead of files."""
    found = []
    for module in (gains, curves):
        monkeypatch.setattr(module, "save", lambda figure, stem, pdf=False: found.append(figure) or [])
    return found


def study(folder, sweep: str, cells, seeds=(0,)):
    """Records as a sweep's runs write them; the n-th cell gains n points and a little by seed."""
    for number, overrides in enumerate(cells):
        for seed in seeds:
            config = compose_config(*overrides, f"seed={seed}")
            model = config["model"]
            top1 = 30.0 + number + 0.1 * seed * (1 + number)
            record = {
                "study": "s", "sweep": sweep, "model": model["name"], "kernels": model["kernels"],
                "share_sets": model.get("share_sets"), "global_perceptron": model.get("global_perceptron"),
                "data": "cifar100", "n_train": 20_000, "n_eval": 10_000, "seed": seed, "epochs": 10, "batch_size": 128,
                "top1_pct": top1, "top1_merged_pct": top1, "merge_error": 1e-7, "params": 1, "macs": 1,
                "train_seconds": 1.0, "images_per_second": 1.0, "device": "", "threads": 1, "versions": {},
                "commit": None, "dirty": None, "config": config,
                "curve": [{"epoch": 0, "train_loss": 1.0, "top1_pct": top1}],
            }  # fmt: skip
            write_record(record_path(folder, "s", run_key(config)), record)
    return load_records(folder)


def draw(records, folder, figures):
    """Draw a study as the command does; the figure, its cells and its named differences."""
    pairs = significance.pairs_of(records, named_by(set(records["sweep"]), SWEEPS))
    named = differences.differences(records, significance.analyse(records, pairs))
    table, axis = gains.cells(records)
    gains.draw(table, axis, "study s", "the fewest branches", folder / "x", named)
    return figures[-1], table, named


def texts(figure) -> list[str]:
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(lambda part: hasattr(part, "get_text"))]


@pytest.mark.parametrize("seeds", [(0,), (0, 1), (0, 1, 2)], ids=len)
def test_a_study_without_a_bare_cell_shows_what_its_sweep_named(tmp_path, drawn, seeds):
    records = study(tmp_path, "small_table4", TABLE4, seeds)
    figure, table, named = draw(records, tmp_path, drawn)
    assert table["gain"].isna().all() and len(figure.axes) == 2
    right = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert len(right) == len(named) == 4
    assert sum("with - without Global Perceptron" in label for label in right) == 2
    assert sum("share-sets: (8, 32) - (4, 16)" in label for label in right) == 2
    assert all(f"n={len(seeds)}" in label for label in right)
    assert all(math.isfinite(each.low) and each.low < each.mean < each.high for each in named)
    ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert "share-sets 4, 16\nwithout Global\nPerceptron" in ticks
    assert not [text for text in texts(figure) if re.search(r"True|False|model\.|_perceptron|\[", text)]
    shown = gains.as_shown(table, "cell")
    assert not {"gain", "SE over seeds"} & set(shown) and "gain:" not in gains.note(table, "x")
    assert not {"gain", "SE over seeds"} & set(gains.as_numbers(table, "cell"))


def test_intervals_are_those_of_the_contrasts_from_three_seeds_on(tmp_path):
    records = study(tmp_path, "small_table4", TABLE4, (0, 1, 2))
    tests = significance.analyse(records, significance.pairs_of(records, named_by({"small_table4"}, SWEEPS)))
    named = differences.differences(records, tests)
    assert [(each.low, each.high) for each in named] == [test.two_way for test in tests]
    assert {each.bars for each in named} == {differences.ANALYSED}
    assert all(sum(each.seeds) / 3 == pytest.approx(each.mean) for each in named)
    few = records[records["seed"] < 2]
    tests = significance.analyse(few, significance.pairs_of(few, named_by({"small_table4"}, SWEEPS)))
    assert {each.bars for each in differences.differences(few, tests)} == {differences.BARS["seeds"]}


def test_a_claim_of_equality_shows_its_margin(tmp_path, drawn):
    cells = [(f"model.kernels=[{kernels}]",) for kernels in ("", "1", "3", "3s", "1,3", "1,3s")]
    figure, _, named = draw(study(tmp_path, "small_control", cells, (0, 1, 2)), tmp_path, drawn)
    (equal,) = [each for each in named if each.margin]
    assert equal.label.startswith("3x3s - 1x1\nequal within 0.8: ")
    assert "3x3s: a 3x3 branch on a shuffled grid" in figure.get_suptitle()


def test_no_panel_is_empty_where_nothing_is_compared(tmp_path, drawn):
    weights = "af35608a2d24b97008a61520daf8b6c675031bb0ed0a7fec9ee1819dfa315139"
    cells = [("model=repmlpnet_t224",), ("model=repmlpnet_t224", f"+model.weights={weights}")]
    records = study(tmp_path, "none", cells)
    figure, table, named = draw(records, tmp_path, drawn)
    assert len(figure.axes) == 1 and not named
    assert list(table["at"]) == ["from scratch", "from trained weights"]
    assert list(studies.study_table(records)["start"]) == ["from scratch", "from trained weights"]
    curves.draw(records, "study s", tmp_path / "x")
    assert not [text for figure in drawn for text in texts(figure) if weights[:8] in text]


def test_networks_that_are_compared_as_wholes_stand_on_the_axis(tmp_path, drawn):
    cells = [(f"model=repmlp_pure_small{end}",) for end in ("_no_local", "_shuffled", "")]
    figure, table, named = draw(study(tmp_path, "small_pure_mlp", cells), tmp_path, drawn)
    assert set(table["at"]) == {"repmlp_pure_small", "repmlp_pure_small_no_local", "repmlp_pure_small_shuffled"}
    assert len(named) == 2 and figure.axes[0].get_xlabel() == "network"


def test_merging_early_stands_in_the_order_of_time(tmp_path, drawn):
    cells = [("model.kernels=[1,3]", f"recipe.merge_after={share}") for share in ("null", "0.0", "0.5")]
    figure, _, named = draw(study(tmp_path, "small_merge_after", cells), tmp_path, drawn)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["0 %", "50 %", "100 %"]
    assert len(named) == 2


@pytest.mark.parametrize(
    ("vary", "before", "to", "words"),
    [
        ("model.kernels", ["3s"], [3], "3x3 - 3x3s"),
        ("model", "a", "b", "b - a"),
        ("model.global_perceptron", False, True, "with - without Global Perceptron"),
        ("model.share_sets", [4, 16], [8, 32], "share-sets: (8, 32) - (4, 16)"),
        ("recipe.merge_after", None, 0.2, "epochs before branches are merged: 20 % - 100 %"),
        ("recipe.merge_after", None, 0.0, "epochs before branches are merged: 0 % - 100 %"),
        ("data.shift", 0, 16, "largest shift in pixels: 16 - 0"),
    ],
)
def test_contrasts_in_words(vary, before, to, words):
    assert wording.contrast(Contrast(vary, before, to)) == words


def test_values_in_words():
    assert wording.values("model.weights", [None, "a" * 64, "b" * 64]) == [
        "from scratch", "from trained weights aaaaaaaa", "from trained weights bbbbbbbb",
    ]  # fmt: skip
    assert wording.values("model.kernels", [[], [1, 3], math.nan]) == ["none", "1x1+3x3", "-"]
    assert wording.phrase("recipe.mixup", wording.value("recipe.mixup", 0.4)) == "mixup 0.4"
    assert not wording.of_branches(["1x1+3x3, from trained weights", "none", "3x3d2"])
    assert wording.of_branches(["1x1+3x3d2s"]) == wording.of_branches(["3x3s"]) == wording.SHUFFLED


def test_a_study_says_its_precision_and_which_images_it_was_evaluated_on(tmp_path):
    held = [(f"data.holdout={share}", "trainer.precision=bf16-mixed") for share in (0, 0.1)]
    records = study(tmp_path / "both", "none", held)
    line = studies.scale_line(records)
    assert "precision bf16-mixed, evaluated on 10,000 images, of some runs held out of training, after" in line
    held_out = records[[config["data"]["holdout"] > 0 for config in records["config"]]]
    assert "10,000 images held out of training after the last epoch" in studies.scale_line(held_out)
    usual = studies.scale_line(study(tmp_path / "usual", "none", [("seed=1",)]))
    assert "precision" not in usual and "held out" not in usual


def test_settings_stand_in_words(tmp_path):
    cells = [(f"data.n_train={n}", f"recipe.epochs={e}") for n, e in ((2000, 100), (20_000, 10))]
    records = study(tmp_path, "none", cells)
    assert {words for _, words, _ in of_settings.settings(records)} == {
        " (2000 training images, 100 epochs)", " (20000 training images, 10 epochs)",
    }  # fmt: skip
    assert list(of_settings.settings_table(records))[:2] == ["training images", "epochs"]
