"""The LightningModule that trains a classifier by the paper's recipe."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torchmetrics import Accuracy, MeanMetric, MetricCollection

from repmlp.randomness import derive_seed
from repmlp.training.schedule import cosine_with_warmup


def accuracy_metrics(num_classes: int, **kwargs: Any) -> MetricCollection:
    """Return top-1 and top-5 accuracy over all images (not averaged by class); kwargs: of torchmetrics' Metric.

    With fewer than five classes every guess is among the first five.
    """
    options = {"task": "multiclass", "num_classes": num_classes, "average": "micro", **kwargs}
    return MetricCollection({f"top{k}": Accuracy(top_k=min(k, num_classes), **options) for k in (1, 5)})


class PartAccuracy(nn.Module):
    """Accuracy of each answer that a class label is made of, e.g. texture and arrangement.

    parts: name -> (num_classes,), the answer that each class stands for. update() takes logits (N, K) and labels (N,).
    shared: whether compute() is over all processes.
    """

    def __init__(self, parts: Mapping[str, Tensor], shared: bool = True):
        super().__init__()
        self.means = nn.ModuleDict({name: MeanMetric(sync_on_compute=shared) for name in parts})
        for name, answers in parts.items():
            self.register_buffer(f"answers_{name}", answers, persistent=False)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        guess = logits.argmax(dim=1)
        for name, mean in self.means.items():
            answers = getattr(self, f"answers_{name}")
            mean.update((answers[guess] == answers[labels]).float())

    def compute(self) -> dict[str, Tensor]:
        return {name: mean.compute() for name, mean in self.means.items()}

    def reset(self) -> None:
        for mean in self.means.values():
            mean.reset()


class Classifier(L.LightningModule):
    """Cross-entropy training with AdamW, cosine schedule by step, warm-up, label smoothing, mixup and CutMix.

    Paper: RepMLPNet Section 5.1-5.2. No weight decay on biases and one-dimensional parameters.

    net: the network. recipe: epochs, warmup_epochs, lr_per_256, weight_decay, betas, clip_norm, label_smoothing,
    batch_size (of all processes together); mixup and cutmix (alphas, each batch one of the two) where they are wanted.
    steps_per_epoch: optimizer steps. num_classes: K. parts: see PartAccuracy. seed: of the run.
    `curve` holds one entry an epoch and is kept in checkpoints, as are `train_seconds` (evaluation not counted) and
    `commits`, the versions of the code that trained: `commit` is added to them when training starts or goes on.
    Raises FloatingPointError at the end of an epoch whose loss is not finite.
    """

    def __init__(
        self,
        net: nn.Module,
        recipe: Mapping[str, Any],
        steps_per_epoch: int,
        num_classes: int,
        parts: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.net = net
        self.recipe = dict(recipe)
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed
        self.mixup = None
        if recipe.get("mixup") or recipe.get("cutmix"):
            self.mixup = Mixup(
                recipe.get("mixup", 0.0),
                recipe.get("cutmix", 0.0),
                label_smoothing=recipe["label_smoothing"],
                num_classes=num_classes,
            )
        self.val_metrics = accuracy_metrics(num_classes)
        self.val_parts = PartAccuracy(parts or {})
        self.train_loss = MeanMetric(nan_strategy="disable")  # by default it drops NaNs from the mean
        self.curve: list[dict[str, float]] = []
        self.train_seconds = 0.0
        self.commit: str | None = None
        self.commits: list[str | None] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def configure_optimizers(self):
        recipe = self.recipe
        optimizer = torch.optim.AdamW(
            param_groups_weight_decay(self.net, recipe["weight_decay"]),
            lr=recipe["lr_per_256"] * recipe["batch_size"] / 256,
            betas=tuple(recipe["betas"]),
            fused=True,
        )
        total = recipe["epochs"] * self.steps_per_epoch
        warmup = recipe["warmup_epochs"] * self.steps_per_epoch
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_with_warmup(step, total, warmup))
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

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        smoothing = self.recipe["label_smoothing"]
        if self.mixup:  # labels (B,) -> smoothed shares of the classes (B, K)
            (images, labels), smoothing = self.mixup(images, labels), 0.0
        loss = F.cross_entropy(self(images), labels, label_smoothing=smoothing)
        self.train_loss.update(loss.detach())
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == self.steps_per_epoch:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.train_seconds += time.perf_counter() - self._started

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.val_metrics.update(logits, labels)
        self.val_parts.update(logits, labels)

    def on_train_epoch_end(self) -> None:
        loss = float(self.train_loss.compute())
        self.train_loss.reset()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the training loss is {loss} in epoch {self.current_epoch}: lower recipe.lr_per_256"
            )
        entry = {"epoch": self.current_epoch, "train_loss": loss, "lr": self.optimizers().param_groups[0]["lr"]}
        if self.val_metrics["top1"].update_called:
            results = {**self.val_metrics.compute(), **self.val_parts.compute()}
            entry |= {f"{name}_pct": 100 * float(value) for name, value in results.items()}
            self.val_metrics.reset()
            self.val_parts.reset()
        self.curve.append(entry)
        self.log_dict({k: float(v) for k, v in entry.items() if k != "epoch"}, rank_zero_only=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["curve"] = self.curve
        checkpoint["train_seconds"] = self.train_seconds
        checkpoint["commits"] = self.commits

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.curve = checkpoint["curve"]
        self.train_seconds = checkpoint["train_seconds"]
        self.commits = checkpoint["commits"]
