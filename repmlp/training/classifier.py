"""The LightningModule that trains a classifier by the paper's recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor, nn
from torchmetrics import Accuracy, MeanMetric, MetricCollection

from repmlp.training.base import RecipeModule


def tops(num_classes: int) -> tuple[int, ...]:
    """Return the numbers of first guesses that are looked at: 1, and 5 where that says anything."""
    return (1, 5) if num_classes > 5 else (1,)


def accuracy_metrics(num_classes: int, **kwargs: Any) -> MetricCollection:
    """Return top-1 accuracy over all images (not averaged by class), and top-5 of more than five classes.

    kwargs: of torchmetrics' Metric.
    """
    options = {"task": "multiclass", "num_classes": num_classes, "average": "micro", **kwargs}
    return MetricCollection({f"top{k}": Accuracy(top_k=k, **options) for k in tops(num_classes)})


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


class Classifier(RecipeModule):
    """Cross-entropy training of a classifier, with label smoothing, mixup and CutMix.

    Paper: RepMLPNet Section 5.1-5.2.

    net, recipe, steps_per_epoch, seed: see RecipeModule; the recipe also has label_smoothing, and mixup and cutmix
    (alphas, each batch one of the two) where they are wanted. num_classes: K. parts: see PartAccuracy.
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
        super().__init__(net, recipe, steps_per_epoch, seed)
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

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def prepared(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Mix images, where they are mixed; labels (B,) are then smoothed shares of the classes (B, K)."""
        return self.mixup(*batch) if self.mixup else batch

    def training_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        smoothing = 0.0 if self.mixup else self.recipe["label_smoothing"]
        return F.cross_entropy(self(images), labels, label_smoothing=smoothing)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.val_metrics.update(logits, labels)
        self.val_parts.update(logits, labels)

    def validation_results(self) -> dict[str, float]:
        if not self.val_metrics["top1"].update_called:
            return {}
        results = {**self.val_metrics.compute(), **self.val_parts.compute()}
        self.val_metrics.reset()
        self.val_parts.reset()
        return {name: 100 * float(value) for name, value in results.items()}
