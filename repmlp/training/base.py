"""What every LightningModule here does alike: optimiser, schedule, reproducible draws, and the curve of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
import numpy as np
import torch
from timm.optim import param_groups_weight_decay
from torch import nn
from torchmetrics import MeanMetric

from repmlp.locality import locality_index, network_profiles
from repmlp.randomness import derive_seed
from repmlp.training.schedule import SCHEDULES


class RecipeModule(L.LightningModule):
    """AdamW, warm-up and a schedule by step, gradient clipping; by default no weight decay on 1-D parameters.

    Paper: RepMLPNet Section 5.1. A subclass has training_step(), which updates `train_loss`, validation_step(), and
    `validation_results()`.

    net: the network. recipe: epochs, warmup_epochs, lr_per_256, weight_decay, betas, clip_norm, batch_size (of all
    processes together); schedule, one of SCHEDULES, "cosine" where it is not said; decay_all, for weight decay on
    biases and one-dimensional parameters too. steps_per_epoch: optimizer steps. seed: of the run.
    `curve` holds one entry an epoch; where there was an evaluation, also the `locality_index` of each spatial layer
    before and after injection. It is kept in checkpoints, as are `train_seconds` (evaluation not counted) and
    `commits`, the versions of the code that trained: `commit` is added to them when training starts or goes on.
    Raises FloatingPointError at the end of an epoch whose loss is not finite.
    """

    def __init__(self, net: nn.Module, recipe: Mapping[str, Any], steps_per_epoch: int, seed: int = 0):
        super().__init__()
        self.net = net
        self.recipe = dict(recipe)
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed
        self.train_loss = MeanMetric(nan_strategy="disable")  # by default it drops NaNs from the mean
        self.curve: list[dict[str, float]] = []
        self.train_seconds = 0.0
        self.commit: str | None = None
        self.commits: list[str | None] = []

    def validation_results(self) -> dict[str, float]:
        """Return what the evaluation of this epoch gave, in percent by name, and forget it; {} where there was none."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its evaluation gives")

    def configure_optimizers(self):
        recipe = self.recipe
        decay = recipe["weight_decay"]
        everything = [{"params": list(self.net.parameters()), "weight_decay": decay}]
        optimizer = torch.optim.AdamW(
            everything if recipe.get("decay_all") else param_groups_weight_decay(self.net, decay),
            lr=recipe["lr_per_256"] * recipe["batch_size"] / 256,
            betas=tuple(recipe["betas"]),
            fused=True,
        )
        total = recipe["epochs"] * self.steps_per_epoch
        warmup = recipe["warmup_epochs"] * self.steps_per_epoch
        share = SCHEDULES[recipe.get("schedule", "cosine")]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share(step, total, warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        # Lightning refuses to clip for a fused optimizer under autocast, though only float16's loss scaling forbids it.
        nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe["clip_norm"])

    def on_train_start(self) -> None:
        if self.commit not in self.commits:
            self.commits.append(self.commit)

    def on_train_epoch_start(self) -> None:
        self._started = time.perf_counter()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Whatever a step draws (stochastic depth, dropout; mixup by numpy) is a function of (seed, epoch, step).
        seed = derive_seed(self.seed, "model", self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == self.steps_per_epoch:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.train_seconds += time.perf_counter() - self._started

    def on_validation_epoch_start(self) -> None:
        # Here and not at the end: a moving average of the weights is evaluated, and has been put away again by then.
        self._profiles = network_profiles(self.net) if self.trainer.is_global_zero else []

    def on_train_epoch_end(self) -> None:
        loss = float(self.train_loss.compute())
        self.train_loss.reset()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the training loss is {loss} in epoch {self.current_epoch}: lower recipe.lr_per_256"
            )
        entry = {"epoch": self.current_epoch, "train_loss": loss, "lr": self.optimizers().param_groups[0]["lr"]}
        results = self.validation_results()
        entry |= {f"{name}_pct": value for name, value in results.items()}
        shown = {name: float(value) for name, value in entry.items() if name != "epoch"}
        if results:
            entry["locality"] = {
                which: [round(locality_index(each[which], each["size"]), 5) for each in self._profiles]
                for which in ("trained", "injected")
            }
            shown |= {f"locality_{which}": float(np.mean(v)) for which, v in entry["locality"].items() if v}
        self.curve.append(entry)
        self.log_dict(shown, rank_zero_only=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["curve"] = self.curve
        checkpoint["train_seconds"] = self.train_seconds
        checkpoint["commits"] = self.commits

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.curve = checkpoint["curve"]
        self.train_seconds = checkpoint["train_seconds"]
        self.commits = checkpoint["commits"]
