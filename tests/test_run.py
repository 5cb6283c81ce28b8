"""A row from configuration to record: what is in it, what skips it, what resumes it, what it does with bad input."""

import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, Forked, command, interrupt, start, tiny_config
from hydra.errors import HydraException
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from repmlp.checkpoints import load, load_model
from repmlp.heatmap import heatmap
from repmlp.kernels import data_words, layer_title, network_words, papers_point, spatial_layers, view
from repmlp.local_perceptron import LocalPerceptron
from repmlp.locality import locality_index
from repmlp.runs import fit
from repmlp.runs import run as runs
from repmlp.runs.command_line import message_of
from repmlp.runs.key import run_key
from repmlp.runs.lock import run_lock
from repmlp.runs.record import REQUIRED, read_record, record_path
from repmlp.runs.run import execute, run_label
from repmlp.runs.settings import run_of
from repmlp.training.classifier import Classifier

# what may differ between two runs of the same row
HOST_FIELDS = {"train_seconds", "images_per_second", "commit", "commits", "dirty"}


SMALLER = "model.blocks=[1,1]"


def tiny_run(folder: Path, *overrides: str) -> dict:
    return tiny_config(folder, SMALLER, *overrides)


def record_of(config: dict) -> dict:
    return read_record(record_path(config["results_dir"], config["study"], run_key(config)))


def run_folder(config: dict) -> Path:
    return Path(config["output_dir"]) / config["study"] / run_key(config)


def assert_same_result(one: dict, other: dict) -> None:
    """Records without their host's fields, and the weights, bit for bit."""
    a, b = ({k: v for k, v in record_of(c).items() if k not in HOST_FIELDS} for c in (one, other))
    assert a == b
    weights = [load_file(run_folder(c) / "model.safetensors") for c in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> dict:
    """The configuration of a row that has been run."""
    config = tiny_run(tmp_path_factory.mktemp("row"))
    outcome = execute(config)
    assert outcome.state == "finished", outcome.message
    return config


def test_record_holds_everything(finished):
    record = record_of(finished)
    assert record.keys() >= REQUIRED
    assert record["model"] == "repmlpnet_tiny" and record["kernels"] == [1, 3] and record["n_train"] == 200
    assert [entry["epoch"] for entry in record["curve"]] == [0, 1]
    assert record["top1_pct"] == record["curve"][-1]["top1_pct"]
    assert record["top1_pct"] == record["top1_merged_pct"] and 0 < record["merge_error"] < 2e-6
    assert {"texture_pct", "arrangement_pct", "texture_merged_pct"} <= record.keys()
    assert len(record["locality"]) == 2 and record["locality"][0]["trained"][-1] == pytest.approx(1)
    assert record["locality"][0]["injected"][1] > record["locality"][0]["trained"][1]
    for which, by_layer in record["curve"][-1]["locality"].items():
        final = [locality_index(layer[which], layer["size"]) for layer in record["locality"]]
        assert by_layer == pytest.approx(final, abs=2e-5)
    assert record["processor"]["name"] and record["processor"].keys() == {"name", "family", "amx"}
    assert record["config"]["recipe"]["epochs"] == 2 and record["train_seconds"] > 0
    path = record_path(finished["results_dir"], finished["study"], run_key(finished))
    assert finished["output_dir"] not in path.read_text(), "records are published: no folders in them"


def test_folder_holds_weights_and_logs_but_no_checkpoint(finished):
    names = {path.name for path in run_folder(finished).iterdir()}
    assert {"model.safetensors", "curve.csv", "tensorboard"} <= names and "last.ckpt" not in names
    text = (run_folder(finished) / "curve.csv").read_text()
    assert "top1_pct" in text and len(text.splitlines()) == 3


def test_logs_of_a_resumed_run_go_on_in_one_place(finished, tmp_path):
    config = tiny_run(tmp_path)
    interrupt(config, epoch=1)
    assert execute(config).state == "finished"
    assert not [path for path in (run_folder(config) / "tensorboard").iterdir() if path.is_dir()]
    events = EventAccumulator(str(run_folder(config) / "tensorboard"))
    events.Reload()
    curve = record_of(config)["curve"]
    found = events.Scalars("top1_pct")
    assert [each.value for each in found] == [pytest.approx(entry["top1_pct"]) for entry in curve]
    assert [each.step for each in found] == sorted({each.step for each in found})
    whole = (run_folder(finished) / "curve.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in (run_folder(config) / "curve.csv").read_text().splitlines()] == [
        line.split(",")[0] for line in whole
    ]


def test_tensorboard_tells_runs_apart(finished):
    told = yaml.safe_load((run_folder(finished) / "tensorboard/hparams.yaml").read_text())
    assert told["seed"] == finished["seed"] and told["recipe"] == finished["recipe"]
    assert told["model"] == finished["model"] and told["data"]["n_train"] == finished["data"]["n_train"]
    assert "root" not in told["data"]
    events = EventAccumulator(str(run_folder(finished) / "tensorboard"))
    events.Reload()
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert [each.value for each in events.Scalars("reached_pct")] == [pytest.approx(record_of(finished)["top1_pct"])]
    assert "hp_metric" not in events.Tags()["scalars"]


def test_tensorboard_holds_curves_and_kernel_pictures(tmp_path):
    config = tiny_run(tmp_path, "trainer.kernel_image_every=1")
    assert execute(config).state == "finished"
    events = EventAccumulator(str(run_folder(config) / "tensorboard"))
    events.Reload()
    curves = events.Tags()["scalars"]
    assert "top1_pct" in curves
    layers = record_of(config)["curve"][-1]["locality"]["injected"]
    by_layer = [events.Scalars(name)[-1].value for name in curves if name.startswith("locality_injected/")]
    assert sorted(by_layer) == pytest.approx(sorted(layers), abs=1e-6) and len(layers) > 1
    pictures = events.Images("kernel/trained_and_injected")
    assert [picture.step for picture in pictures] == [0, 1]
    # the last one is the figure that plot_kernels.py draws of the weights
    net = load(run_folder(config) / "model.safetensors")
    name, layer = list(spatial_layers(net).items())[len(layers) // 2]
    point = papers_point(layer.size)
    words = f"{network_words(config['model'])}, {data_words('patterns')}"
    figure = heatmap(layer, view(layer, 0, (0, 0), point), point, words, layer_title(name))
    expected = io.BytesIO()
    figure.savefig(expected, format="png")
    with Image.open(expected) as ours, Image.open(io.BytesIO(pictures[-1].encoded_image_string)) as logged:
        assert np.array_equal(np.asarray(ours.convert("RGB")), np.asarray(logged.convert("RGB")))


def test_finished_run_is_skipped_with_a_notice_for_another_commit(finished, monkeypatch):
    assert (execute(finished).state, execute(finished).message) == ("skipped", "")
    monkeypatch.setattr(runs, "git_state", lambda: {"commit": "f" * 40, "dirty": False})
    assert "rerun=true" in execute(finished).message


def test_reuse_takes_the_record_of_the_same_run_from_another_study(finished, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(finished["results_dir"], results)
    other = {**finished, "results_dir": str(results), "output_dir": str(tmp_path), "study": "b", "sweep": "b"}
    third = {**other, "study": "c", "reuse": True}
    outcome = execute({**other, "reuse": True})
    assert (
        outcome.state == "skipped" and outcome.message == f"its record is that of the same run in {finished['study']}"
    )
    first, taken = record_of(finished), record_of(other)
    changed = {"study": "b", "sweep": "b", "same_run_as": finished["study"]}
    assert taken == {**first, **changed}
    (results / finished["study"] / "records" / f"{run_key(finished)}.json").unlink()
    assert execute(third).state == "skipped" and record_of(third)["same_run_as"] == finished["study"], "not b: no run"
    assert not (tmp_path / "b" / run_key(other) / "model.safetensors").exists()
    again = run_of({**third, "study": "d", "seed": 7})
    assert runs._taken_over(again, record_path(results, "d", run_key(asdict(again))), "") is None, "another run"
    for change in ({"rerun": True}, {"reuse": False}):
        settings = run_of({**third, "study": "d", **change})
        assert runs._taken_over(settings, record_path(results, "d", run_key(third)), "") is None


def test_rerun_runs_again_and_gives_the_same(finished, tmp_path):
    config = tiny_run(tmp_path)
    assert execute(config).state == "finished"
    assert_same_result(config, finished)
    path = record_path(config["results_dir"], config["study"], run_key(config))
    before = path.stat().st_mtime_ns
    assert execute({**config, "rerun": True}).state == "finished"
    assert path.stat().st_mtime_ns > before
    assert_same_result(config, finished)


def test_a_run_with_a_shuffled_branch(tmp_path):
    """The control of a study, through its moving average too, which must not average the order of the grid."""
    config = tiny_run(tmp_path, "model.kernels=[1,3s]", "recipe.ema_decay=0.9")
    assert "branches 1x1+3x3s" in run_label(config)
    outcome = execute(config)
    assert outcome.state == "finished", outcome.message
    record = record_of(config)
    assert record["kernels"] == [1, "3s"] and record["top1_pct"] == record["top1_merged_pct"]
    assert 0 < record["merge_error"] < 2e-6
    plain = tiny_run(tmp_path, "model.kernels=[1,3]", "recipe.epochs=1", "recipe.warmup_epochs=0")
    assert execute(plain).state == "finished"
    assert {k: record[k] for k in ("params", "params_paper_rule", "macs")} == {
        k: record_of(plain)[k] for k in ("params", "params_paper_rule", "macs")
    }
    net, metadata = load_model(run_folder(config) / "model.safetensors")
    assert json.loads(metadata["repmlp_model"])["kernels"] == [1, "3s"]
    orders = [b for name, b in net.named_buffers() if name.endswith("permutation")]
    assert all(sorted(order.tolist()) == list(range(len(order))) for order in orders)


def test_key_ignores_paths_and_devices_and_sees_the_rest(tmp_path):
    key = run_key(tiny_run(tmp_path))
    for same in ("trainer.threads=1", "output_dir=elsewhere", "trainer.eval_every=5", "study=other", "rerun=true"):
        assert run_key(tiny_run(tmp_path, same)) == key, same
    for same in ("[3,1]", "[3x3,1]", "['1','3']"):
        assert run_key(tiny_run(tmp_path, f"model.kernels={same}")) == key, same
    control = run_key(tiny_run(tmp_path, "model.kernels=[1,3s]"))
    assert run_key(tiny_run(tmp_path, "model.kernels=[3x3s,1]")) == control != key
    for other in ("seed=1", "model.kernels=[3]", "data.n_train=300", "recipe.epochs=3", "trainer.precision=bf16-mixed"):
        assert run_key(tiny_run(tmp_path, other)) != key, other


def test_truncated_record_is_set_aside_and_the_run_done_again(finished, tmp_path):
    config = tiny_run(tmp_path)
    path = record_path(config["results_dir"], config["study"], run_key(config))
    path.parent.mkdir(parents=True)
    path.write_text('{"study": "')
    assert execute(config).state == "finished"
    assert path.with_name(path.name + ".damaged").read_text() == '{"study": "'
    assert_same_result(config, finished)


def test_truncated_checkpoint_is_set_aside_and_the_run_done_again(finished, tmp_path, caplog):
    config = tiny_run(tmp_path)
    run_folder(config).mkdir(parents=True)
    (run_folder(config) / "last.ckpt").write_bytes(b"PK\x03\x04 half a checkpoint")
    assert execute(config).state == "finished"
    assert "last.ckpt is damaged" in caplog.text
    assert (run_folder(config) / "last.ckpt.damaged").exists()
    assert_same_result(config, finished)


def test_checkpoint_of_another_architecture_is_refused_and_kept(tmp_path):
    config = tiny_run(tmp_path)
    run_folder(config).mkdir(parents=True)
    path = run_folder(config) / "last.ckpt"
    torch.save({"state_dict": {"net.other": torch.zeros(3)}}, path)
    outcome = execute(config)
    assert outcome.state == "failed" and "of another architecture" in outcome.message
    assert str(path) in outcome.message and "\n" not in outcome.message and path.exists()


def test_full_disk_at_the_record_loses_no_training(finished, tmp_path, monkeypatch):
    config = tiny_run(tmp_path)

    def full(path, record):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fit, "write_record", full)
    outcome = execute(config)
    assert (
        outcome.state == "failed"
        and "No space left on device" in outcome.message
        and "free some space" in outcome.message
    )
    monkeypatch.undo()
    monkeypatch.setattr(
        "repmlp.training.classifier.Classifier.training_step", lambda *a: pytest.fail("it trained again")
    )
    assert execute(config).state == "finished"
    assert_same_result(config, finished)


def refusal(folder: Path, *overrides: str) -> str:
    """Return in which words a setting is refused, by the composition or by the run."""
    try:
        config = tiny_run(folder, *overrides)
    except HydraException as error:
        return message_of(error)
    outcome = execute(config)
    assert outcome.state == "failed"
    return outcome.message


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.share_sets=[3,16]", "share_sets=3 does not divide channels=16"),
        ("model.kernels=3", "model.kernels=3: use a list"),
        ("model.kernels=[1,a]", "model.kernels=[1, 'a']: branch 'a'"),
        ("model.share_sets=a", "model.share_sets='a': use a list of whole numbers"),
        ("model.drop_path_rate=1.5", "model.drop_path_rate=1.5: use a number below 1"),
        ("model.kernels=[2]", "kernels=[2]: branch 2x2: its sides have to be odd"),
        ("model.kernels=[-1]", "kernels=[-1]"),
        ("model.kernels=[3t]", "kernels=['3t']: branch '3t': use a size such as 3"),
        ("model.kernels=[3,3x3]", "the branch 3x3 stands there twice"),
        ("model.kernels=[3d8]", "kernels=['3d8']: of the branch 3x3d8 only middle taps ever lie on a map of 8x8"),
        ("recipe.warmup_epochs=2", "the warm-up has to be shorter"),
        ("recipe.batch_size=1000", "200 training images are less than one batch of 1000: lower recipe.batch_size"),
        ("recipe.batch_size=0", "recipe.batch_size=0: use a whole number, at least 1"),
        ("recipe.epochs=ten", "recipe.epochs=ten: use a whole number"),
        ("recipe.epochs=1.5", "recipe.epochs=1.5: use a whole number"),
        ("recipe.decay_all=maybe", "recipe.decay_all=maybe: use true or false"),
        ("recipe.betas=0.9", "recipe.betas=0.9: use a list in [ ]"),
        ("recipe.betas=[a]", "recipe.betas[0]=a: use a number"),
        ("trainer.minutes=x", "trainer.minutes=x: use a number or null"),
        ("trainer=3", "trainer=3: use trainer.NAME=VALUE for its settings"),
        ("recipe.epochs=0", "recipe.epochs=0: use a whole number, at least 1"),
        ("recipe.lr_per_256=-1", "recipe.lr_per_256=-1.0: use a number above 0"),
        ("recipe.lr_per_256=0", "recipe.lr_per_256=0.0: use a number above 0"),
        ("recipe.weight_decay=nan", "recipe.weight_decay=nan: use a number"),
        ("recipe.clip_norm=0", "recipe.clip_norm=0: every gradient would be 0; use null for no clipping"),
        ("recipe.clip_norm=inf", "recipe.clip_norm=inf: use a number"),
        ("recipe.betas=[0.9]", "recipe.betas=[0.9]: AdamW has two of them"),
        ("recipe.betas=[0.9,1.0]", "recipe.betas=1.0: use a number below 1"),
        ("recipe.label_smoothing=1", "recipe.label_smoothing=1.0: use a number below 1"),
        ("recipe.schedule=steps", "recipe.schedule='steps': use cosine or poly"),
        ("recipe.train_only=body", "recipe.train_only='body': use null or head"),
        ("recipe.layer_decay=2", "recipe.layer_decay=2.0: use a share, at most 1"),
        ("data.n_train=0", "n_train=0"),
        ("seed=x", "seed=x: use a whole number"),
        ("seed=null", "seed=null: use a whole number, or leave it out for its default"),
        ("seed=0,1", "seed=0,1: these are several values; add -m to do a run with each, or write a list, seed=[0,1]"),
        ("seed", "seed: write NAME=VALUE"),
        ("model.kernels=[1,3", "model.kernels=[1,3: write NAME=VALUE"),
        ("+data=patterns", "data: one of this group is chosen already; say data=NAME once"),
        ("seed=-1", "seed=-1: use a whole number"),
        ("seed=4294967296", "seed=4294967296: use a whole number below 2**32"),
        ("model.channels=[0,0]", "model.channels=[0, 0]: use a list of whole numbers above 0"),
        ("model.global_perceptron=maybe", "model.global_perceptron='maybe': use true or false"),
        ("model.global_perceptron=1", "model.global_perceptron=1: use true or false"),
        ("model.img_size=[32,64]", "model.img_size=[32, 64]: images are cropped to squares, use one whole number"),
        ("model.img_size=64", "model.img_size=64: the images have 32x32 pixels; use 32"),
        ("data.data_seed=x", "data.data_seed='x': use a whole number"),
        ("data.n_test=1.5", "data.n_test=1.5: use a whole number"),
        ("data.holdout=0.999", "data.holdout=0.999: it leaves no image to train on"),
        ("~model.kernels", "model.kernels is missing"),
        ("~model.name", "model.name is missing"),
        ("trainer.precision=16-mixed", "trainer.precision='16-mixed': use 32-true or bf16-mixed"),
        ("trainer.compile=1", "trainer.compile=1: use false, true, reduce-overhead or max-autotune"),
        ("trainer.graph=true", "trainer.graph=true: this run is on the cpu, which has no CUDA graphs; use false"),
        ("trainer.graph=1", "trainer.graph"),
        ("trainer.branches=rows", "trainer.branches='rows': use channels, sets or matrix"),
        ("trainer.products=rows", "trainer.products='rows': use linear or convolution"),
        ("trainer.compile=fast", "trainer.compile='fast': use false, true"),
        ("trainer.eval_every=0", "trainer.eval_every=0: use a whole number, at least 1"),
        ("trainer.threads=-1", "trainer.threads=-1: use a whole number, at least 1"),
        ("trainer.devices=0", "trainer.devices=0: use a whole number, at least 1"),
        ("trainer.accelerator=gpx", "trainer.accelerator='gpx'"),
        ("trainer.accelerator=mps", "trainer.accelerator=mps: it has no float64, which merging needs; use cpu"),
        ("study=''", "study='': it is the name of a folder"),
        ("study=../elsewhere", "study='../elsewhere'"),
        ("output_dir=null", "output_dir=null: use a name, or leave it out for its default"),
        ("~trainer.compile", "trainer.compile"),
        ("backbone=nowhere.pth", "backbone is a setting of experiments/segment.py"),
        ("recipe=segmentation", "there is no setting recipe.auxiliary_weight"),
        (
            "recipe.mixup_alpha=0.2",
            "recipe.mixup_alpha: there is no setting recipe.mixup_alpha; did you mean recipe.mixup",
        ),
        ("+recipe.lr=0.1", "there is no setting recipe.lr; did you mean recipe.lr_per_256"),
        ("+trainer.max_epochs=7", "there is no setting trainer.max_epochs"),
        ("recipe.grad_clip=1", "there is no setting recipe.grad_clip; did you mean recipe.clip_norm"),
        ("epochs=3", "epochs: there is no setting epochs; did you mean recipe.epochs"),
        ("lr=0.1", "lr: there is no setting lr; did you mean recipe.lr_per_256"),
        ("+modle.kernels=[3]", "there is no setting modle; did you mean model"),
        ("+model.kernel=[3]", "there is no setting model.kernel; did you mean model.kernels"),
        ("+data.ntrain=3", "there is no setting data.ntrain; did you mean data.n_train"),
    ],
)
def test_bad_settings_are_one_line_and_nothing_is_spent(tmp_path, override, words):
    message = refusal(tmp_path, override)
    assert words in message and "\n" not in message
    assert not list(Path(tmp_path).glob("results/*/records/*")) and not list(Path(tmp_path).glob("outputs/*/*/*.ckpt"))


def test_no_clipping_trains_and_is_another_run(tmp_path):
    config = tiny_run(tmp_path, "recipe.clip_norm=null", "recipe.epochs=1", "recipe.warmup_epochs=0")
    assert run_key(config) != run_key(tiny_run(tmp_path, "recipe.epochs=1", "recipe.warmup_epochs=0"))
    assert execute(config).state == "finished" and record_of(config)["curve"][0]["train_loss"] > 1


def test_a_results_folder_that_cannot_be_written_is_said_before_the_training(tmp_path, monkeypatch):
    (tmp_path / "results").write_text("a file")
    monkeypatch.setattr(runs, "train", lambda *_: pytest.fail("it trained"))
    outcome = execute(tiny_run(tmp_path))
    assert outcome.state == "failed" and "results_dir: nothing can be written into" in outcome.message


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "outputs").write_text("a file")
    outcome = execute(tiny_run(tmp_path))
    assert outcome.state == "failed" and str(tmp_path / "outputs") in outcome.message


def test_one_batch_that_is_nan_is_said(tmp_path, monkeypatch):
    step = Classifier.training_step

    def training_step(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        if batch_idx == 1:
            self.train_loss.update(torch.tensor(float("nan")))
        return loss

    monkeypatch.setattr(Classifier, "training_step", training_step)
    outcome = execute(tiny_run(tmp_path))
    assert outcome.state == "failed" and "training loss is nan in epoch 0" in outcome.message


def test_a_rerun_does_not_go_on_from_other_code(finished, tmp_path, monkeypatch, caplog):
    """A checkpoint of another commit is used to continue a row (and recorded), but not to run it again."""
    caplog.set_level("INFO")
    config = tiny_run(tmp_path)
    monkeypatch.setattr(runs, "git_state", lambda: {"commit": "a" * 40, "dirty": False})
    monkeypatch.setattr(fit, "write_record", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    assert execute(config).state == "failed" and (run_folder(config) / "last.ckpt").exists()
    monkeypatch.undo()
    monkeypatch.setattr(runs, "git_state", lambda: {"commit": "b" * 40, "dirty": False})
    assert execute({**config, "rerun": True}).state == "finished"
    assert "was trained by other code" in caplog.text
    assert record_of(config)["commits"] == ["b" * 40]
    assert_same_result(config, finished)


def test_diverged_training_is_said(tmp_path):
    outcome = execute(tiny_run(tmp_path, "recipe.lr_per_256=1e30", "recipe.clip_norm=1e30"))
    assert outcome.state == "failed" and "training loss is" in outcome.message and "lr_per_256" in outcome.message


@pytest.mark.parametrize("model", ["resmlp_tiny", "repmlpnet_tiny"])
def test_bf16_compile_and_branches_flags(tmp_path, model, monkeypatch):
    by_matrix, original = [], LocalPerceptron._by_matrix
    monkeypatch.setattr(LocalPerceptron, "_by_matrix", lambda *a: by_matrix.append(1) or original(*a))
    overrides = [f"model={model}", "trainer.precision=bf16-mixed", "recipe.epochs=1", "recipe.warmup_epochs=0"]
    if model == "resmlp_tiny":
        overrides += ["trainer.compile=reduce-overhead", "model.depth=1", "trainer.precision=32-true"]
    else:
        overrides += ["trainer.branches=matrix", SMALLER]
    config = tiny_config(tmp_path, *overrides)
    outcome = execute(config)
    assert outcome.state == "finished", outcome.message
    assert bool(by_matrix) is (model == "repmlpnet_tiny")
    assert record_of(config)["merge_error"] < 2e-6
    assert not any("_orig_mod" in name for name in load_file(run_folder(config) / "model.safetensors"))


def test_a_run_that_another_process_trains_is_left_alone(tmp_path):
    config = tiny_run(tmp_path)
    with run_lock(run_folder(config)) as owner:
        assert owner is None
        # a fork: it opens the file of the lock itself, as every process does
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        with context.Pool(1) as pool:
            outcome = pool.apply(execute, (config,))
    assert outcome.state == "busy" and f"process {os.getpid()}" in outcome.message
    assert not record_path(config["results_dir"], config["study"], run_key(config)).exists()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, caplog):
    folder = tmp_path / "row"
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom repmlp.runs.lock import run_lock\n"
        "with run_lock(Path(sys.argv[1])) as owner:\n    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(folder)]).returncode == -signal.SIGKILL
    dead = json.loads((folder / "owner.json").read_text())["pid"]
    caplog.set_level("INFO")
    with run_lock(folder) as owner:
        assert owner is None
    assert 'taking over from a run that did not end: {"host": ' in caplog.text and str(dead) in caplog.text


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    """The configuration of a longer row that has been run in a process of its own, as the interrupted ones are."""
    folder = tmp_path_factory.mktemp("whole")
    config = tiny_run(folder, *LONGER)
    assert command("experiments/ablate.py", *overrides_of(config)).returncode == 0
    return config


LONGER = ("recipe.epochs=8", "data.n_train=400")


def overrides_of(config: dict) -> list[str]:
    """Return how a longer row is asked for on the command line."""
    return [*TINY, SMALLER, *LONGER, f"results_dir={config['results_dir']}", f"output_dir={config['output_dir']}"]


def wait_for_checkpoint(folder: Path, process: Forked) -> None:
    deadline = time.time() + 120
    while not (folder / "last.ckpt").exists():
        assert not process.has_ended(), process.wait()
        assert time.time() < deadline, "no checkpoint in two minutes"
        time.sleep(0.05)


@pytest.mark.parametrize(("how", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_an_interrupted_run_continues_bit_for_bit(undisturbed, tmp_path, how, status):
    killed = tiny_run(tmp_path, *LONGER)
    process = start("experiments/ablate.py", *overrides_of(killed))
    wait_for_checkpoint(run_folder(killed), process)
    os.kill(process.pid, how)
    ended = process.wait()
    assert ended.returncode == status, ended
    assert not record_path(killed["results_dir"], killed["study"], run_key(killed)).exists(), "killed too late"
    if how == signal.SIGINT:
        assert "interrupted: the same command goes on from here" in ended.stdout + ended.stderr
    done = command("experiments/ablate.py", *overrides_of(killed))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "continuing from" in done.stdout + done.stderr
    assert_same_result(killed, undisturbed)
