"""What data sets share that decode their images in worker processes: orders, loaders."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from repmlp.data.base import DataSet, EpochSampler, check_whole, place, share_of_batch


class DecodedData(DataSet):
    """Base of the sets whose images worker processes decode, one by one, as they are asked for.

    A subclass calls choose() in setup() and gives items(train), the data set that the chosen indices number, whose
    training items are asked for by (epoch, index).

    workers: processes that decode. n_train, n_eval: evenly spaced within each class. The rest: see DataSet.
    """

    def __init__(self, batch_size: int, *, workers: int = 8, **kwargs: Any):
        super().__init__(batch_size, **kwargs)
        check_whole("workers", workers, 0)
        self.workers = workers

    def items(self, train: bool) -> Dataset:
        """Return the images of training, augmented, or of evaluation, with their labels."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its images are")

    def train_dataloader(self) -> DataLoader:
        """Shuffled, augmented batches of this process; the last partial batch is dropped."""
        rank, world = place(self.trainer)
        order = SharedOrder(self.train_indices, self.batch_size, self.seed, rank, world)
        return DataLoader(
            self.items(train=True),
            share_of_batch(self.batch_size, world),
            sampler=order,
            **self._options(drop_last=True),
        )

    def val_dataloader(self) -> DataLoader:
        """All images of evaluation, in order; each process takes its share, in as many batches, or one fewer."""
        return self._evaluation(*place(self.trainer))

    def whole_evaluation(self) -> DataLoader:
        """All images of evaluation for one process alone."""
        return self._evaluation(0, 1)

    def _evaluation(self, rank: int, world: int) -> DataLoader:
        most = -(-len(self.eval_indices) // world)
        batches = -(-most // self.eval_batch_size)
        # nearly equal batches: processes with a different number of them would wait for each other for ever
        shares = [share.tolist() for share in self.eval_indices[rank::world].tensor_split(batches) if len(share)]
        return DataLoader(self.items(train=False), batch_sampler=shares, **self._options())

    def _options(self, **more: bool) -> dict:
        # joblib's runs side by side would start workers in its own way, which has to pickle what Lightning adds
        loky = multiprocessing.get_start_method() == "loky" and "fork" in multiprocessing.get_all_start_methods()
        return {
            "multiprocessing_context": "fork" if loky and self.workers else None,
            "num_workers": min(self.workers, os.cpu_count() or 1),
            "persistent_workers": self.workers > 0,
            "pin_memory": torch.cuda.is_available(),
            **more,
        }


class SharedOrder(EpochSampler):
    """The order of the images in an epoch for one process: (epoch, index) pairs, whole global batches only.

    Step t of all processes together holds images t*B to (t+1)*B of one permutation, however many processes there are.
    indices: of the images in use. batch_size: B, of all processes. rank, world: this process and how many there are.
    """

    def __init__(self, indices: Tensor, batch_size: int, seed: int, rank: int = 0, world: int = 1):
        super().__init__(seed)
        self.indices, self.batch_size, self.rank, self.world = indices, batch_size, rank, world

    def __len__(self) -> int:
        return len(self.indices) // self.batch_size * (self.batch_size // self.world)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        used = len(self.indices) // self.batch_size * self.batch_size
        order = self.indices[self.order(len(self.indices))[:used]]
        return ((self.epoch, index) for index in order[self.rank :: self.world].tolist())


def to_tensor(mean: Sequence[float] = (), std: Sequence[float] = ()) -> list[Any]:
    """Return the last steps of every transform: an image -> (3, H, W) float32, normalised.

    mean, std: of the three channels; ImageNet's where they are empty.
    """
    normalise = v2.Normalize(mean or IMAGENET_DEFAULT_MEAN, std or IMAGENET_DEFAULT_STD)
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), normalise]
