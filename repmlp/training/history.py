"""The history of a run, kept in its checkpoints: the curve, the seconds of training, the versions of the code."""

from __future__ import annotations

import csv
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from repmlp.locality import locality_index, network_profiles
from repmlp.training.base import RecipeModule

log = logging.getLogger(__name__)


class History(L.Callback):
    """Keep what happens in every epoch of a RecipeModule, log it, and let a resumed run go on with it.

    folder: `curve.csv` is written there after each epoch, whole each time: a run that was interrupted has one table.
    commit: the version of the code that trains, added to `commits`.
    show: log a line after each epoch; for output that is no terminal.
    It has to stand behind a callback that averages weights: the kernels that are looked at are then averaged ones.

    `curve` has an entry an epoch: epoch (from 0), train_loss, lr, and where there was an evaluation its results and the
    `locality` index of each spatial layer before and after injection. `train_seconds` leaves evaluation out.
    Raises FloatingPointError at the end of an epoch whose loss is not finite.
    """

    def __init__(self, folder: Path, commit: str | None = None, show: bool = False):
        self.folder, self.commit, self.show = folder, commit, show
        self.curve: list[dict[str, Any]] = []
        self.train_seconds = 0.0
        self.commits: list[str | None] = []

    def on_train_start(self, trainer: L.Trainer, module: RecipeModule) -> None:
        if self.commit not in self.commits:
            self.commits.append(self.commit)

    def on_train_epoch_start(self, trainer: L.Trainer, module: RecipeModule) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: RecipeModule, outputs: Any, batch: Any, number: int
    ) -> None:
        if number + 1 == module.steps_per_epoch:
            if module.device.type == "cuda":
                torch.cuda.synchronize(module.device)
            self.train_seconds += time.perf_counter() - self._started

    def on_validation_epoch_start(self, trainer: L.Trainer, module: RecipeModule) -> None:
        # Here and not at the end: a moving average of the weights is evaluated, and has been put away again by then.
        self._profiles = network_profiles(module.net) if trainer.is_global_zero else []

    def on_train_epoch_end(self, trainer: L.Trainer, module: RecipeModule) -> None:
        loss = float(module.train_loss.compute())
        module.train_loss.reset()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the training loss is {loss} in epoch {trainer.current_epoch}: lower the learning rate (lr_per_256)"
            )
        entry = {"epoch": trainer.current_epoch, "train_loss": loss, "lr": trainer.optimizers[0].param_groups[-1]["lr"]}
        results = module.validation_results()
        entry |= {f"{name}_pct": value for name, value in results.items()}
        shown = {name: float(value) for name, value in entry.items() if name != "epoch"}
        if results:
            entry["locality"] = {
                which: [round(locality_index(each[which], each["size"]), 5) for each in self._profiles]
                for which in ("trained", "injected")
            }
            for which, indices in entry["locality"].items():
                if indices:
                    shown[f"locality_{which}"] = float(np.mean(indices))
                names = (each["layer"] for each in self._profiles)
                shown |= {f"locality_{which}/{name}": each for name, each in zip(names, indices, strict=True)}
        self.curve.append(entry)
        module.log_dict(shown, rank_zero_only=True)
        if trainer.is_global_zero:
            self._write()
            if self.show:
                log.info("%s", format_entry(entry, trainer.max_epochs))

    def _write(self) -> None:
        rows = [{name: value for name, value in entry.items() if name != "locality"} for entry in self.curve]
        names = list(dict.fromkeys(name for row in rows for name in row))
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "curve.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(rows)

    def state_dict(self) -> dict[str, Any]:
        return {"curve": self.curve, "train_seconds": self.train_seconds, "commits": self.commits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.curve, self.train_seconds, self.commits = state["curve"], state["train_seconds"], state["commits"]


def kept_in(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the history that a Lightning checkpoint holds: {"curve", "train_seconds", "commits"}; None without one."""
    return checkpoint.get("callbacks", {}).get(History.__name__)


def format_entry(entry: Mapping[str, Any], epochs: int) -> str:
    """Write an entry of a curve as one line."""
    parts = [f"{name[:-4]} {value:.2f} %" for name, value in entry.items() if name.endswith("_pct")]
    return f"epoch {entry['epoch'] + 1}/{epochs}: " + ", ".join([f"loss {entry['train_loss']:.3f}", *parts])
