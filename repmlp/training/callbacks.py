"""Checkpoints, averaged weights, pictures of a kernel in TensorBoard, and the end of the time that a sweep has."""

from __future__ import annotations

import copy
import time
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.optim.swa_utils import get_ema_avg_fn

from repmlp.imports import need
from repmlp.kernels import layer_title, papers_point, view
from repmlp.locality import layers_over_maps


class Checkpoints(ModelCheckpoint):
    """Keep the state of a run in one file, last.ckpt, written at the ends of epochs.

    folder: of the file. every: epochs between two checkpoints; None to write no more often than takes SHARE of the
    time, so that epochs of seconds do not write a file each, and an interrupted run loses a minute or an epoch. The
    first epoch and the last are written whatever the time, and one at whose end it is later than `deadline`, see
    Deadline.
    """

    SHARE = 0.02

    def __init__(self, folder: Path, every: int | None = None, deadline: float | None = None):
        super().__init__(
            dirpath=folder,
            filename="last",
            monitor=None,
            every_n_epochs=every or 1,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        self.every, self.deadline = every, deadline
        self._seconds: float | None = None  # that the last one took
        self._written = 0.0

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.every is None and not trainer.strategy.broadcast(self._due(trainer)):  # of all processes the first's
            return
        began = time.perf_counter()
        super().on_train_epoch_end(trainer, module)
        self._written = time.perf_counter()
        self._seconds = self._written - began

    def _due(self, trainer: L.Trainer) -> bool:
        over = self.deadline is not None and time.time() > self.deadline
        if over or self._seconds is None or trainer.current_epoch + 1 == trainer.max_epochs:
            return True
        return time.perf_counter() - self._written >= self._seconds / self.SHARE


class AveragedWeights(WeightAveraging):
    """Lightning's moving average; the network has it in the end even where a run goes on after its last epoch.

    Whole numbers (the order of a shuffled grid, counts of batches) are no averages but those of the last step: the mean
    of two equal ones, computed with fractions and cut off, may be one less.

    decay: share that the average keeps at each step.
    """

    def __init__(self, decay: float):
        super().__init__(avg_fn=self._average)
        self._of_floats = get_ema_avg_fn(decay)

    def _average(self, average: Tensor, current: Tensor, steps: Tensor | int) -> Tensor:
        return self._of_floats(average, current, steps) if average.is_floating_point() else current

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.on_train_end(trainer, module)  # not called where there is nothing left to train


class KernelImages(L.Callback):
    """Draw a kernel of the middle spatial layer into TensorBoard every few epochs, trained and injected side by side.

    The drawing of the papers' figures, seen from the paper's point. every: epochs between two pictures.
    network: the network and its data, in words.
    Raises ModuleNotFoundError where matplotlib is not there.
    """

    def __init__(self, every: int, network: str):
        need("train", "matplotlib")
        self.every, self.network = every, network

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every or trainer.global_rank:
            return
        from repmlp.heatmap import heatmap  # matplotlib, which most runs never need

        layers = list(layers_over_maps(module.net).items())
        if not layers:  # a network of another kind
            return
        name, layer = layers[len(layers) // 2]
        layer = copy.deepcopy(layer).cpu()
        point = papers_point(layer.size)
        figure = heatmap(layer, view(layer, 0, (0, 0), point), point, self.network, layer_title(name))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("kernel/trained_and_injected", figure, trainer.current_epoch)


class EvaluationUncompiled(L.Callback):
    """Evaluate a compiled network without compilation, so that a run compiles once, for training.

    An evaluation mode, and a network merged for it, would each be compiled anew for a few batches.
    """

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        torch.compiler.set_stance("force_eager")

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        torch.compiler.set_stance("default")

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        torch.compiler.set_stance("default")


class OutOfTime(Exception):
    """The time of a sweep is over; the run goes on from its last checkpoint another time."""


class Deadline(L.Callback):
    """Stop a run between two epochs once the time is over. at: seconds as time.time() counts them."""

    def __init__(self, at: float):
        self.at = at

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if time.time() > self.at:
            raise OutOfTime
