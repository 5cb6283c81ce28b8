"""The step as one function: on a CPU bit for bit the run without it; on a GPU captured and replayed."""

from __future__ import annotations

import pytest
import torch
from conftest import interrupt, tiny_config
from lightning.pytorch.callbacks import Callback
from torch import nn

from repmlp.checkpoints import load_model
from repmlp.runs import fit
from repmlp.runs.key import run_key
from repmlp.runs.record import read_record, record_path
from repmlp.runs.run import execute
from repmlp.runs.settings import BadSetting, run_of
from repmlp.training.base import RecipeModule
from repmlp.training.whole_step import WholeStep, captured

DRAWING = ["model.drop_path_rate=0.3", "recipe.mixup=0.4", "recipe.epochs=3", "recipe.clip_norm=0.5"]
GRAPH = "trainer.graph=true"


@pytest.fixture
def replays(monkeypatch):
    """Let a CPU do whole steps, a replay being the step itself; returns the learning rates that each replay read."""
    read: list[list[float]] = []

    def capture(step):
        whole = step.__self__
        return lambda: (read.append([float(rate) for rate in whole.rates]), step())[1]

    monkeypatch.setattr(fit, "check_graphs", lambda device: None)
    monkeypatch.setattr(RecipeModule, "capture", staticmethod(capture))
    return read


def result(config: dict) -> tuple[dict, dict]:
    """Do a run; returns its record and its weights."""
    outcome = execute(config)
    assert outcome.state == "finished", outcome.message
    path = record_path(config["results_dir"], config["study"], run_key(config))
    weights = next(path.parents[3].glob(f"outputs/*/{path.stem}/model.safetensors"))
    return read_record(path), load_model(weights)[0].state_dict()


def assert_same(ours: tuple[dict, dict], others: tuple[dict, dict]) -> None:
    assert ours[0]["curve"] == others[0]["curve"] and ours[0]["top1_pct"] == others[0]["top1_pct"]
    assert all(torch.equal(tensor, others[1][name]) for name, tensor in ours[1].items())


OTHERS = ["trainer.precision=bf16-mixed", "recipe.clip_norm=null", "recipe.ema_decay=0.9"]


@pytest.mark.parametrize("more", [[], OTHERS])
def test_a_run_of_whole_steps_is_the_run_without_bit_for_bit(tmp_path, replays, more):
    plain = result(tiny_config(tmp_path / "plain", *DRAWING, *more))
    assert not replays
    assert_same(result(tiny_config(tmp_path / "whole", *DRAWING, *more, GRAPH)), plain)
    steps = plain[0]["epochs"] * (200 // plain[0]["batch_size"])
    assert len(replays) == steps - WholeStep.WARM_UP > 0


def test_a_run_may_go_on_with_whole_steps_or_without(tmp_path, replays):
    plain = result(tiny_config(tmp_path / "plain", *DRAWING))
    for name, first, then in (("a", [GRAPH], []), ("b", [], [GRAPH])):
        interrupt(tiny_config(tmp_path / name, *DRAWING, *first), epoch=2)
        assert_same(result(tiny_config(tmp_path / name, *DRAWING, *then)), plain)


def test_its_learning_rates_are_the_schedules(tmp_path, replays, monkeypatch):
    seen: list[list[float]] = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, module, batch, number):
            seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    make = fit.make_trainer

    def with_rates(*arguments):
        trainer, history = make(*arguments)
        trainer.callbacks.append(Rates())
        return trainer, history

    monkeypatch.setattr(fit, "make_trainer", with_rates)
    result(tiny_config(tmp_path, "model=resmlp_tiny", "model.depth=1", "recipe.epochs=4", GRAPH))
    assert seen[WholeStep.WARM_UP :] == replays and len({rates[0] for rates in seen}) == len(seen)


def test_a_batch_of_another_shape_is_refused():
    layer = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    step = WholeStep(lambda x: layer(x).sum(), optimizer, list(layer.parameters()), None, lambda step: step)
    for _ in range(5):
        step(torch.ones(4, 2))
    assert type(optimizer.param_groups[0]["lr"]) is float and optimizer.param_groups[0]["capturable"] is False
    with pytest.raises(ValueError, match=r"^a batch of shapes \[\(3, 2\)\]: a captured step takes batches of"):
        step(torch.ones(3, 2))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.compile=reduce-overhead"], "trainer.compile=reduce-overhead: both would capture graphs"),
        (["trainer.devices=2", "trainer.strategy=ddp"], "2 processes do not share a captured step"),
        (["recipe.merge_after=0.5"], "cannot lose its branches"),
    ],
)
def test_what_a_captured_step_cannot_do_is_refused(tmp_path, overrides, words):
    with pytest.raises(BadSetting, match=f"^trainer.graph=true.*{words}"):
        run_of(tiny_config(tmp_path, GRAPH, *overrides))
    assert run_key(tiny_config(tmp_path, GRAPH)) == run_key(tiny_config(tmp_path))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
def test_a_captured_step_trains_as_the_steps_do_one_by_one(tmp_path):
    options = [*DRAWING, "trainer.accelerator=gpu", "recipe.epochs=2"]
    curves = [result(tiny_config(tmp_path / str(len(more)), *options, *more))[0]["curve"] for more in ([], [GRAPH])]
    for plain, whole in zip(*curves, strict=True):
        assert whole["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-3) and whole["lr"] == plain["lr"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
def test_what_waits_for_the_gpu_cannot_be_captured():
    layer = nn.Linear(2, 1, device="cuda")
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    step = WholeStep(lambda x: layer(x).sum() * x.sum().item(), optimizer, [*layer.parameters()], 1.0, captured)
    for _ in range(WholeStep.WARM_UP):
        step(torch.ones(4, 2, device="cuda"))
    with pytest.raises(RuntimeError, match=r"^the step cannot be captured as a CUDA graph, train without: "):
        step(torch.ones(4, 2, device="cuda"))
