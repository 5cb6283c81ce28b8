"""Sweeps through the command that a user types."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, TINY, command, compose_config, start
from hydra import compose, initialize_config_dir

from repmlp.runs.command_line import quote_names, refused
from repmlp.runs.key import run_key
from repmlp.runs.run import Outcome, run_label
from repmlp.runs.sweep import differing, finish, note_outcome, progress_line, start_plan, sweep_rows, told_apart

ROWS = ["-m", *TINY, "recipe.epochs=1", "recipe.warmup_epochs=0", "study=s"]


def sweep(folder: Path, *overrides: str, **kwargs):
    return command(
        "experiments/ablate.py", *ROWS, f"results_dir={folder}/r", f"output_dir={folder}/o", *overrides, **kwargs
    )


def records(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("r/s/records/*.json"))]


def test_failed_runs_are_named_and_the_others_finish(tmp_path):
    done = sweep(tmp_path, "model.share_sets=[4,16],[3,16],[2,8],[5,16]")
    text = done.stdout + done.stderr
    assert done.returncode == 1
    assert "4 runs: 2 finished, 2 failed" in text
    assert "share_sets=3 does not divide channels=16" in text and "share_sets=5 does not divide channels=16" in text
    assert "run 2/4:" in text and "run 4/4:" in text and "left)" in text
    assert "Traceback" not in text
    assert sorted(r["share_sets"] for r in records(tmp_path)) == [[2, 8], [4, 16]]
    again = sweep(tmp_path, "model.share_sets=[4,16],[2,8]")
    assert again.returncode == 0 and "2 runs: 2 skipped" in again.stderr


def test_runs_side_by_side_with_joblib(tmp_path):
    done = sweep(tmp_path, "seed=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "trainer.threads=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 runs: 2 finished" in done.stderr
    assert sorted(r["seed"] for r in records(tmp_path)) == [0, 1]


def test_two_sweeps_at_once_train_each_run_once(tmp_path):
    folders = [f"results_dir={tmp_path}/r", f"output_dir={tmp_path}/o"]
    arguments = ("experiments/ablate.py", *ROWS, *folders, "seed=0,1,2", "recipe.epochs=4")
    ended = [process.wait() for process in [start(*arguments), start(*arguments)]]
    assert [process.returncode for process in ended] == [0, 0], ended
    assert sum((process.stdout + process.stderr).count(" finished in ") for process in ended) == 3, ended
    assert sorted(r["seed"] for r in records(tmp_path)) == [0, 1, 2]
    assert not list(tmp_path.glob("r/s/records/*.damaged*"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["+sweep=nonsense"], ["sweep/nonsense", "locality", "share_sets"]),
        (["model=nonsense"], ["model/nonsense", "repmlpnet_cifar"]),
        (["recipe.epoch=3"], ["epoch"]),
        (["seed=[1"], ["[1"]),
    ],
)
def test_unknown_names_are_one_line(overrides, words):
    done = command("experiments/ablate.py", *overrides)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("error: "), done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("ablate ~trainer.compile", "no setting can be taken away; leave this out for its default, or say trainer"),
        ("train ~trainer", "no setting can be taken away"),
        ("train ~data.name", "no setting can be taken away"),
        ("export ~form", "no setting can be taken away"),
        ("segment ~trainr.compile", "there is no setting trainr.compile; did you mean trainer.compile?"),
        ("evaluate ~nothing", "there is no setting nothing; --help shows"),
        ("ablate --seed=3", "write seed=3, without the --"),
        ("ablate --seeed=3", "there is no setting seeed; did you mean seed?"),
        ("ablate +seed=3", "write seed=3, without the +"),
        ("evaluate +data=imagenet", "write data=imagenet, without the +"),
        ("segment +recipe.window=[64,64]", "write recipe.window=[64,64], without the +"),
        ("ablate +epochs=3", "there is no setting epochs; did you mean recipe.epochs or recipe.warmup_epochs?"),
        ("export +opset=13", "write opset=13, without the +"),
        ("export ++rate=13", "there is no setting rate; there are batch_sizes, checkpoint, form, img_size, opset"),
        ("export +recipe.epochs=3", "there is no setting recipe.epochs; there are batch_sizes"),
        ("export +data=patterns", "there is no setting data; there are batch_sizes"),
        ("predict +change=mixup", "there is no setting change; there are batch_size, checkpoint"),
        ("borders +tiles=3", "there is no setting tiles; did you mean tile?"),
        ("ablate +sweep=locality", None),
        ("train +change=[mixup,rand_augment]", None),
        ("ablate hydra/launcher=joblib +hydra.x=1 ~hydra.sweeper.params.seed --config-dir=x --help", None),
        ("predict checkpoint=~/x.pth images=~y out=+z.csv", None),
    ],
)
def test_words_that_hydra_would_take_and_nothing_would_heed(words, said):
    name, *rest = words.split()
    found = refused(rest, ROOT / "experiments/conf", name.replace("ablate", "config"))
    assert found == said is None or found.startswith(f"{rest[0]}: {said}")


def test_only_runs_are_swept(tmp_path):
    done = command("experiments/export.py", "-m", "threads=1,2")
    assert done.stderr == "error: -m: only runs can be swept; do this command once for each value\n"
    done = command("experiments/export.py", "threads=1,2")
    assert done.stderr == "error: threads=1,2: these are several values; write a list, threads=[1,2]\n"


@pytest.mark.parametrize("words", ["model=null", "data=3", "recipe=1e3"])
def test_a_group_that_is_none_is_one_line(words):
    done = command("experiments/ablate.py", words)
    group, _, value = words.partition("=")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert f"Could not find '{group}/{value}' Available options" in done.stderr


def test_absent_data_is_said_once_with_the_remedy(tmp_path):
    done = command(
        "experiments/ablate.py", "+sweep=locality", f"data.root={tmp_path}/none", "data.download=false",
        f"results_dir={tmp_path}/r", f"output_dir={tmp_path}/o",
    )  # fmt: skip
    assert done.returncode == 1
    summary = done.stderr[done.stderr.index("8 runs: 8 failed") :]
    assert summary.count("data=patterns") == 1 and "data.root=FOLDER" in summary


def test_every_sweep_composes_and_has_the_runs_it_says():
    expected = {
        "locality": 8, "locality_small": 8, "demo": 6, "share_sets": 2, "global_perceptron": 4, "kernels": 12,
        "sharing": 12, "fractions": 8, "any_mlp": 4, "fractions_small": 8, "kernels_small": 12, "stronger": 8,
        "locality_imagenet": 4, "share_sets_imagenet": 4, "segmentation": 3, "segmentation_small": 3,
        "small/learning_rate": 6, "small/locality": 40, "small/table4": 20, "small/more_data": 6, "small/pure_mlp": 21,
        "small/control": 60, "small/merge_after": 20, "small/merge_control": 10, "small/pspnet": 2,
        "small/position": 40, "small/pure_mlp_rate": 6,
        "small/locality_imagenet": 6, "small/share_sets_imagenet": 12, "small/finetuning_imagenet": 1,
    }  # fmt: skip
    folder = ROOT / "experiments/conf/sweep"
    there = {str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml")}
    assert there == expected.keys()
    for name, count in expected.items():
        # what segment.py alone takes, windows for instance, needs its configuration
        of = "segment" if "\ntask: segmentation\n" in (folder / f"{name}.yaml").read_text() else "config"
        with initialize_config_dir(str(ROOT / "experiments/conf"), version_base="1.3"):
            params = compose(of, [f"+sweep={name}"], return_hydra_config=True).hydra.sweeper.params
        rows = []
        for row in sweep_rows(params, []):  # composed once for all seeds: it takes a fifth of a second
            seeds = [text for text in row if text.startswith("seed=")]
            composed = compose_config(f"+sweep={name}", *(text for text in row if text not in seeds), name=of)
            rows.append({**composed, "seed": int(seeds[0].partition("=")[2])} if seeds else composed)
        assert all(row["sweep"] == name.replace("/", "_") for row in rows)
        overrides = sweep_rows(params, [])
        labels = {run_label(row) + str(told_apart(overrides, number)) for number, row in enumerate(rows)}
        assert len(rows) == len({run_key(row) for row in rows}) == len(labels) == count


def test_label_names_what_was_added_to_the_recipe():
    config = compose_config("+change=[mixup,rand_augment,stochastic_depth]", "data.n_train=500")
    said = "500 images, 100 epochs, drop_path_rate 0.1, randaugment 9, mixup 0.4, seed 0"
    assert run_label(config) == f"repmlpnet_cifar, branches 1x1+3x3, S=8,32, {said}"


def test_sweeps_of_segmentation_are_the_same_runs_for_both_commands():
    for name, data, epochs in (("segmentation", "cityscapes", 216), ("segmentation_small", "camvid", 30)):
        with initialize_config_dir(str(ROOT / "experiments/conf"), version_base="1.3"):
            params = compose("segment", [f"+sweep={name}"], return_hydra_config=True).hydra.sweeper.params
        for overrides in sweep_rows(params, []):
            rows = [compose_config(f"+sweep={name}", *overrides, name=command) for command in ("segment", "config")]
            assert run_key(rows[0]) == run_key(rows[1]) and rows[0]["study"] == f"{name}_{data}"
            assert (rows[0]["data"]["name"], rows[0]["recipe"]["epochs"]) == (data, epochs)


def test_what_differs_in_a_sweep_is_told():
    rows = [["seed=0", "recipe.lr_per_256=0.1", "study=s"], ["seed=1", "recipe.lr_per_256=0.2", "study=s"]]
    assert told_apart(rows, 1) == ["recipe.lr_per_256=0.2"]
    assert told_apart([["seed=0"], ["seed=1"]], 0) == [] == told_apart([[]], 0)


def test_what_a_search_draws_is_told():
    """Its runs are not known beforehand: what tells them apart is what the command did not give."""
    given = ["data.holdout=0.1", "recipe.lr_per_256=interval(0.001,0.02)", "model.kernels=choice([],[3])"]
    drawn = ["data.holdout=0.1", "recipe.lr_per_256=0.0123456789", "model.kernels=[3]", "+trainer.eval_every=2"]
    plan = {"rows": None, "given": given}
    assert differing(plan, drawn, 7) == ["recipe.lr_per_256=0.01235", "trainer.eval_every=2"]  # kernels: in run_label


def test_a_sweep_ends_within_its_minutes(tmp_path):
    """The first run takes longer than there is; what it leaves undone is postponed, and done by the next command."""
    done = sweep(tmp_path, "seed=0,1", "recipe.epochs=2", "trainer.minutes=0.0001")
    assert done.returncode == 0, done.stderr
    assert "2 runs: 2 postponed" in done.stderr and not records(tmp_path)
    again = sweep(tmp_path, "seed=0,1", "recipe.epochs=2")
    assert "2 runs: 2 finished" in again.stderr and len(records(tmp_path)) == 2


def test_what_is_raised_outside_of_a_run_is_told(tmp_path):
    done = sweep(tmp_path, "seed=0,1", "trainer.devices=2")
    assert done.returncode == 1 and "a sweep trains each run on one device" in done.stderr


def test_a_folder_that_cannot_be_written_is_told_before_the_first_run(tmp_path):
    (tmp_path / "o").write_text("a file")
    done = sweep(tmp_path, "seed=0,1")
    assert done.returncode == 1 and done.stderr.startswith("error: output_dir: nothing can be written into"), (
        done.stderr
    )
    assert len(done.stderr.splitlines()) == 1


def test_no_time_at_all_is_a_mistake(tmp_path):
    done = sweep(tmp_path, "trainer.minutes=0")
    assert done.returncode == 1 and "trainer.minutes=0.0: use a number above 0" in done.stderr


def test_names_are_names_and_the_flag_stands_anywhere(tmp_path):
    """Hydra reads 1e3 as 1000.0 and true as True, and argparse takes -m at either end alone."""
    assert quote_names(["study=1e3", "study=a b", "study=null", "study='x'", "seed=1", "data=null"], ["data"]) == [
        "study='1e3'", "study=a b", "study=null", "study='x'", "seed=1", "data='null'"
    ]  # fmt: skip
    folders = [f"results_dir={tmp_path}/r", f"output_dir={tmp_path}/o"]
    done = command("experiments/ablate.py", *TINY, *folders, "study=1e3", "-m", "seed=-1,-2")
    assert done.returncode == 1 and "2 runs: 2 failed" in done.stderr, done.stdout + done.stderr


def test_commands_at_the_end_can_be_copied(tmp_path, capsys):
    start_plan(tmp_path, [["seed=0"]])
    note_outcome(tmp_path, 0, Outcome("finished", "first", "k", seconds=3))
    finish(tmp_path, tmp_path / "my results" / "a b")
    assert f"--study 'a b' --results '{tmp_path}/my results'" in capsys.readouterr().err


def test_summary_counts_runs_that_never_reported(tmp_path, capsys):
    start_plan(tmp_path, [["seed=0"], ["seed=1"]])
    note_outcome(tmp_path, 0, Outcome("finished", "first", "k", seconds=3))
    assert "run 2/2: second (about" in progress_line(tmp_path, 1, "second")
    with pytest.raises(SystemExit):
        finish(tmp_path)
    assert "2 runs: 1 finished, 1 without a report" in capsys.readouterr().err
    note_outcome(tmp_path, 1, Outcome("skipped", "second", "k"))
    finish(tmp_path)


SEARCH = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.direction=maximize"]


def test_a_search_goes_by_what_runs_reach_on_held_out_images(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="hydra-optuna-sweeper is not installed")
    interval = "recipe.lr_per_256=interval(0.001,0.02)"
    refused = sweep(tmp_path, *SEARCH, interval)
    assert refused.returncode == 1 and "error: a sweeper that searches" in refused.stderr and not records(tmp_path)
    done = sweep(tmp_path, *SEARCH, interval, "data.holdout=0.5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 runs: 2 finished" in done.stderr
    labels = re.findall(r"run \d: (.*)", done.stdout + done.stderr)
    assert len(set(labels)) == 2 and all("recipe.lr_per_256=0.0" in label for label in labels)
    reached = [record["top1_pct"] for record in records(tmp_path)]
    assert len(reached) == 2 and f"best_value: {max(reached)}" in "".join(
        path.read_text() for path in tmp_path.rglob("optimization_results.yaml")
    )
