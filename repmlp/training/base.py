"""What every LightningModule here does alike: optimiser, schedule and reproducible draws."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torchmetrics import MeanMetric

from repmlp.checkpoints import MODEL
from repmlp.finetuning import classifier_of
from repmlp.randomness import derive_seed
from repmlp.training.generators import Generators
from repmlp.training.schedule import SCHEDULES
from repmlp.training.whole_step import WholeStep, captured


class RecipeModule(L.LightningModule):
    """AdamW, warm-up and a schedule by step, gradient clipping; by default no weight decay on 1-D parameters.

    Paper: RepMLPNet Section 5.1. A subclass has training_loss(), validation_step() and validation_results(), and
    prepared() where a batch is changed before.

    net: the network. recipe: epochs, warmup_epochs, lr_per_256, weight_decay, betas, clip_norm, batch_size (of all
    processes together); schedule, one of SCHEDULES, "cosine" where it is not said; decay_all, for weight decay on
    biases and one-dimensional parameters too; clip_norm None for no clipping; layer_decay, timm's, a share of the
    learning rate from one layer to the one before it; train_only "head" for the classifier alone, the rest of the
    network in evaluation mode. steps_per_epoch: optimizer steps. seed: of the run. graph: capture the step as one CUDA
    graph, see WholeStep.
    Raises ValueError where the network does not say which its layers, or its classifier, are.
    """

    model_config: Mapping[str, Any] | None = None  # what `build_model` builds the network from, where it is known
    graph = False
    capture = staticmethod(captured)

    def __init__(self, net: nn.Module, recipe: Mapping[str, Any], steps_per_epoch: int, seed: int = 0):
        super().__init__()
        self.net = net
        self.recipe = dict(recipe)
        self.steps_per_epoch = steps_per_epoch
        self.seed = seed
        self.head = classifier_of(net) if recipe.get("train_only") == "head" else None
        if self.head is not None:
            net.requires_grad_(False)
            self.head.requires_grad_(True)
        self._generators: Generators | None = None
        self._whole_step: WholeStep | None = None
        self.train_loss = MeanMetric(nan_strategy="disable")  # by default it drops NaNs from the mean

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Write what the network is built from into the checkpoint, so that `repmlp.load` builds it again."""
        if self.model_config is not None:
            checkpoint[MODEL] = json.dumps(self.model_config)
            checkpoint["num_classes"] = self.net.num_classes

    def prepared(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return what training_loss() takes of a batch."""
        return batch

    def training_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a batch, ()."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its loss is")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs = self.prepared(batch)
        loss = self.training_loss(*inputs) if self._whole_step is None else self._whole_step(*inputs)
        self.train_loss.update(loss.detach())
        return loss

    # With a whole step, everything is done by the loss; Lightning keeps its counts, schedule, logs and checkpoints.

    def on_train_start(self) -> None:
        if self.graph:
            optimizer, clip_norm = self.optimizers(use_pl_optimizer=False), self.recipe["clip_norm"]
            parameters = list(self.net.parameters())
            self._whole_step = WholeStep(self.training_loss, optimizer, parameters, clip_norm, self.capture)

    def on_train_end(self) -> None:
        self._whole_step = None  # and with it the memory of its graph

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        if self._whole_step is None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if self._whole_step is None:
            super().backward(loss, *args, **kwargs)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if self._whole_step is None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        else:
            optimizer_closure()

    def validation_results(self) -> dict[str, float]:
        """Return what the evaluation of this epoch gave, in percent by name, and forget it; {} where there was none."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its evaluation gives")

    def configure_optimizers(self):
        recipe = self.recipe
        optimizer = torch.optim.AdamW(
            self._parameter_groups(),
            lr=recipe["lr_per_256"] * recipe["batch_size"] / 256,
            betas=tuple(recipe["betas"]),
            fused=True,
        )
        total = recipe["epochs"] * self.steps_per_epoch
        warmup = recipe["warmup_epochs"] * self.steps_per_epoch
        share = SCHEDULES[recipe.get("schedule", "cosine")]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share(step, total, warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Return AdamW's groups of parameters: which have weight decay, and which share of the learning rate."""
        recipe, decay = self.recipe, self.recipe["weight_decay"]
        if recipe.get("layer_decay", 1.0) != 1.0:
            if not hasattr(self.net, "group_matcher"):
                raise ValueError(f"layer_decay: {type(self.net).__name__} does not say which its layers are")
            groups = param_groups_layer_decay(self.net, decay, layer_decay=recipe["layer_decay"])
            base = recipe["lr_per_256"] * recipe["batch_size"] / 256
            groups = [{**group, "lr": base * group["lr_scale"]} for group in groups]  # timm's own schedulers do this
            return [{**group, "weight_decay": decay} for group in groups] if recipe.get("decay_all") else groups
        if recipe.get("decay_all"):
            return [{"params": [p for p in self.net.parameters() if p.requires_grad], "weight_decay": decay}]
        return param_groups_weight_decay(self.net, decay)

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        # Lightning refuses to clip for a fused optimizer under autocast, though only float16's loss scaling forbids it.
        if self.recipe["clip_norm"] is not None:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe["clip_norm"])

    def on_train_epoch_start(self) -> None:
        if self.head is not None:
            self.net.eval()
            self.head.train()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Whatever a step draws is a function of (seed, epoch, step).
        if self._generators is None:
            self._generators = Generators(self.device)
        seed = derive_seed(self.seed, "model", self.current_epoch, batch_idx, self.global_rank)
        self._generators.seed(seed, batch_idx)
