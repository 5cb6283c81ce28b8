"""Checkpoints, averaged weights, pictures of a kernel in TensorBoard, and the end of the time that a sweep has."""

from __future__ import annotations

import math
import time
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.optim.swa_utils import get_ema_avg_fn

from repmlp.locality import kernel_map
from repmlp.models.build import SPATIAL_LAYERS


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

    Paper: RepMLPNet Appendix A: log magnitude, darker is larger, one scale for both, seen from the paper's point (6, 6)
    of a 16x16 map or the same share of another. The figures of `analysis/` show the same numbers with marks and words,
    which need matplotlib; training does not. every: epochs between two pictures.
    """

    def __init__(self, every: int):
        self.every = every

    @torch.no_grad()
    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self.every or (trainer.current_epoch + 1) % self.every or trainer.global_rank:
            return
        layers = [m for m in module.net.modules() if isinstance(m, SPATIAL_LAYERS)]
        if not layers:  # a network of another kind
            return
        layer = layers[len(layers) // 2]
        h, w = layer.size
        point = (3 * h // 8, 3 * w // 8)
        weights = [layer.merged(branches=injected)[0].cpu() for injected in (False, True)]
        # a map is over the smallest magnitude of its own matrix; over that of both they have one scale
        smallest = [_smallest(weight[0]) for weight in weights]
        panels = [
            kernel_map(weight, layer.size, 0, point) + math.log(own / min(smallest))
            for weight, own in zip(weights, smallest, strict=True)
        ]
        top = max(float(panel.max()) for panel in panels) or 1.0
        # (h, w) twice -> (1, h, 2*w + 1), one column between the panels, then eight pixels a cell
        picture = 1 - torch.cat([panels[0] / top, torch.zeros(h, 1), panels[1] / top], dim=1).unsqueeze(0)
        picture = picture.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("kernel/trained_and_injected", picture.float(), trainer.current_epoch)


def _smallest(matrix: Tensor) -> float:
    """Return the smallest magnitude that is not zero; 1 where all are."""
    magnitude = matrix.double().abs()
    return float(magnitude[magnitude > 0].min()) if bool((magnitude > 0).any()) else 1.0


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
