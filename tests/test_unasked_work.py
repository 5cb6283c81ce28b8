"""What a run does beside its steps: no seed that nobody draws from, one wait for the device, rare checkpoints."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from repmlp import build_model
from repmlp.cost import count_macs, count_params
from repmlp.locality import network_profiles
from repmlp.randomness import derive_seed
from repmlp.runs.settings import Trainer
from repmlp.training import callbacks
from repmlp.training.callbacks import Checkpoints
from repmlp.training.generators import Generators

SOURCES = {
    "nothing": lambda device: None,
    "torch": lambda device: torch.rand(3),
    "numpy": lambda device: np.random.rand(3),
    "the device": lambda device: torch.rand(3, device=device),
    "all": lambda device: (torch.rand(3), np.random.rand(), torch.rand(3, device=device)),
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")
def test_steps_on_a_gpu_draw_what_they_would_if_all_were_seeded():
    for source in SOURCES:
        check_draws(torch.device("cuda", torch.cuda.current_device()), source)


@pytest.mark.parametrize("source", SOURCES)
def test_steps_draw_what_they_would_if_all_were_seeded(source):
    check_draws(torch.device("cpu"), source)


def check_draws(device: torch.device, source: str) -> None:
    draw = SOURCES[source]

    def drawn(seed) -> str:
        return repr([draw(device) for step in range(4) if seed(derive_seed(7, step), step) is None])

    def all_seeded(seed: int, step: int) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)

    assert drawn(Generators(device).seed) == drawn(all_seeded)


@pytest.mark.parametrize("source", ["nothing", "torch", "numpy", "all"])
def test_from_the_second_step_on_only_generators_that_draw_are_seeded(monkeypatch, source):
    seeded, device = [], torch.device("cpu")
    ours = Generators(device)
    ours._all = [
        each._replace(seed=lambda seed, name=name, original=each.seed: (seeded.append(name), original(seed)))
        for name, each in zip(("torch", "numpy"), ours._all, strict=True)
    ]
    for _epoch in range(2):
        counts = []
        for step in range(3):
            seeded.clear()
            ours.seed(derive_seed(step), step)
            SOURCES[source](device)
            counts.append(list(seeded))
        wanted = {"nothing": [], "all": ["torch", "numpy"]}.get(source, [source])
        assert counts == [["torch", "numpy"], wanted, wanted]


def test_profiles_wait_for_the_device_once(monkeypatch):
    """On the meta device nothing can be read back: the numbers are asked for once, all together."""
    config = {"arch": "repmlpnet", "channels": [8, 16], "blocks": [1, 2], "share_sets": [2, 4], "kernels": [1, "3s"]}
    with torch.device("meta"):
        net = build_model(config, 10)
    asked = []

    def tolist(tensor: Tensor) -> list[float]:
        assert tensor.is_meta
        asked.append(len(tensor))
        return [0.5] * len(tensor)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "tolist", tolist)
        found = network_profiles(net)
    assert asked == [2 * (16 + 8 + 8)] and [len(each["injected"]) for each in found] == [16, 8, 8]


def test_costs_are_counted_where_nothing_is_computed():
    devices = []

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            devices.append(x.device.type)
            return super().forward(x)

    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), Counted(3, 5))
    assert (count_macs(net, 32), count_params(net)) == (15, 20)
    assert devices == ["meta"] and net[2].weight.device.type == "cpu"


class OneStep(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch, number):
        return self.layer(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def written(folder, monkeypatch, seconds: float, every: int | None = None, deadline: float | None = None) -> list[int]:
    """Train for 12 epochs of a second each, a checkpoint taking `seconds`; returns the epochs of the checkpoints."""
    epochs, clock, save = [], [0.0], L.Trainer.save_checkpoint

    def slow(trainer, path, *arguments):
        save(trainer, path, *arguments)
        epochs.append(trainer.current_epoch)
        clock[0] += seconds

    second = L.Callback()
    second.on_train_epoch_start = lambda trainer, module: clock.__setitem__(0, clock[0] + 1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    with monkeypatch.context() as patch:
        patch.setattr(L.Trainer, "save_checkpoint", slow)
        for name in ("perf_counter", "time"):
            patch.setattr(callbacks.time, name, lambda: clock[0])
        trainer = L.Trainer(max_epochs=12, callbacks=[second, Checkpoints(folder, every, deadline)], **quiet)
        trainer.fit(OneStep(), DataLoader(TensorDataset(torch.ones(2, 1))))
    assert [path.name for path in folder.iterdir()] == ["last.ckpt"]
    return epochs


def test_checkpoints_fit_the_run(tmp_path, monkeypatch):
    assert written(tmp_path / "a", monkeypatch, 0.0) == list(range(12))
    # 0.07 s are two percent of 3.5 s
    assert written(tmp_path / "b", monkeypatch, 0.07) == [0, 4, 8, 11]
    assert written(tmp_path / "c", monkeypatch, 9.0) == [0, 11]
    assert written(tmp_path / "d", monkeypatch, 9.0, every=5) == [4, 9]
    # when the time of a sweep is over, nothing is lost
    assert written(tmp_path / "e", monkeypatch, 3.0, deadline=8.5) == [0, 5, 6, 7, 8, 9, 10, 11]
    assert Trainer().checkpoint_every is None
