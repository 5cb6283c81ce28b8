"""What every data set promises, what all of them share, and the list of them.

A data set is one file in this folder, whose class `register` lists by the name that settings call it, and one file of
defaults for the commands. Mechanisms that several share have a file of their own: resident.py (images that live on the
training device), decoded.py (images that worker processes decode), files.py (images in folders), segmentation.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import lightning as L
import torch
from torch import Tensor

from repmlp.randomness import derive_seed

# Name -> class, one list a task; filled by `register`
DATASETS: dict[str, type[DataSet]] = {}  # one label an image
SEGMENTATION: dict[str, type[DataSet]] = {}  # one label a pixel


@dataclass
class DataInfo:
    """What a model and a table have to know of a data set.

    parts: for labels that are made of several answers, the answer that each class stands for, name -> (num_classes,).
    class_names: in the order of the labels, where they are known.
    """

    num_classes: int
    img_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    parts: dict[str, Tensor] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()


class DataSet(L.LightningDataModule):
    """Base of all data sets. This is what one promises:

    - the constructor refuses settings that cannot be, and reads nothing;
    - `fingerprint(settings)` says which files these are, before anything is built;
    - `info` has num_classes, mean and std, and class_names where they are known; once prepare_data() has been called;
    - prepare_data() finds the files, setup() chooses the images: exactly as many as n_train and n_eval say;
    - then `n_images` and the loaders: train_dataloader() and val_dataloader() of this process among several,
      whole_evaluation() of one process alone. A batch is images (B, 3, H, W) float32, normalised, and labels (B,), or
      masks (B, H, W), int64. The training loader has a sampler with set_epoch(); what it yields is a function of
      (seed, epoch, image or step), however many processes and workers there are;
    - with one label an image, calibration(n): n training images as evaluation would see them;
    - with `evaluation_only`, set before prepare_data(), no training image is needed, where none is held out;
    - a file that cannot be read, and a setting that cannot be, is one ValueError or FileNotFoundError that names it.

    A subclass gives `info`, the loaders, and a setup() that calls choose().

    batch_size: images a step, of all processes together.
    eval_batch_size: images at once in evaluation, of one process.
    seed: of order and augmentation.
    n_train, n_eval: use exactly that many images, spread over the classes; None for all.
    holdout: evaluate on this share of the *training* images instead.
    Raises ValueError for settings that cannot be.
    """

    info: Any
    evaluation_only: bool = False
    train_indices: Tensor
    eval_indices: Tensor

    def __init__(
        self,
        batch_size: int = 128,
        *,
        seed: int = 0,
        eval_batch_size: int = 500,
        n_train: int | None = None,
        n_eval: int | None = None,
        holdout: float = 0.0,
    ):
        super().__init__()
        check_whole("eval_batch_size", eval_batch_size, 1)
        if not 0 <= holdout < 1:
            raise ValueError(f"data.holdout={holdout} is no share of the training set: use 0 up to, not including, 1")
        self.batch_size, self.eval_batch_size, self.seed = batch_size, eval_batch_size, seed
        self.n_train, self.n_eval, self.holdout = n_train, n_eval, holdout

    @classmethod
    def fingerprint(cls, settings: Mapping[str, Any]) -> str | None:
        """Return a digest of which files `settings` name; None where name and settings say it all.

        Raises FileNotFoundError where there are none.
        """
        return None

    @property
    def n_images(self) -> tuple[int, int]:
        """Return how many images are used for training and for evaluation, once set up."""
        return len(self.train_indices), len(self.eval_indices)

    @property
    def needs_training_images(self) -> bool:
        """Whether images of training have to be there: to train on, or to hold out from."""
        return bool(self.holdout) or not self.evaluation_only

    def choose(self, labels: Tensor, eval_labels: Tensor) -> None:
        """Set train_indices and eval_indices, both ascending: held out, limited, enough of them.

        labels: (N,), of all training images, none where they are not needed. eval_labels: (M,), of all images to
        evaluate on. Both are numbered in order; with holdout, eval_indices are numbers of training images.
        Raises ValueError where there are fewer images than wanted, than a batch has, or than there are processes.
        """
        train, evaluation = torch.arange(len(labels)), torch.arange(len(eval_labels))
        if self.holdout:
            eval_labels = labels
            train, evaluation = self.hold_out(labels)
        self.train_indices = self._limit("n_train", train, labels) if len(train) else train
        self.eval_indices = self._limit("n_eval", evaluation, eval_labels)
        n_train, n_eval = self.n_images
        if n_eval < place(self.trainer)[1]:
            raise ValueError(
                f"{n_eval} images to evaluate on: raise data.holdout or data.n_eval (each process needs one)"
            )
        if not n_train and not self.evaluation_only:
            raise ValueError(f"data.holdout={self.holdout}: it leaves no image to train on")
        if n_train < self.batch_size and not self.evaluation_only:
            raise ValueError(
                f"{n_train} training images are less than one batch of {self.batch_size}: lower recipe.batch_size"
            )

    def hold_out(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Split indices of training images into those to train on and those held out: the last share of each class."""
        return split_per_class(labels, self.info.num_classes, 1 - self.holdout)

    def pick(self, labels: Tensor, n: int) -> Tensor:
        """Return the indices of n of the images that have these labels."""
        return spread_over_classes(labels, n)

    def _limit(self, name: str, indices: Tensor, labels: Tensor) -> Tensor:
        """Keep as many images as the setting `name` says; labels: of all images, not of `indices` alone."""
        wanted = getattr(self, name)
        if wanted is None:
            return indices
        if type(wanted) is not int or not 0 < wanted <= len(indices):
            purpose = "train" if name == "n_train" else "evaluate"
            raise ValueError(f"data.{name}={wanted}: there are {len(indices)} images to {purpose} on")
        return indices[self.pick(labels[indices], wanted)].sort().values

    def calibration(self, n: int) -> Iterable[tuple[Tensor, Tensor]]:
        """Return batches of n training images (all where there are fewer), spread over the classes, not augmented."""
        raise NotImplementedError(f"{type(self).__name__} has no images to calibrate with")

    def whole_evaluation(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Return all images of evaluation for one process alone."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its images are loaded")


Kind = TypeVar("Kind", bound=type[DataSet])


def register(name: str, among: dict[str, type[DataSet]] = DATASETS) -> Callable[[Kind], Kind]:
    """Return a decorator that lists a data set by the name that settings call it.

    among: DATASETS or SEGMENTATION.
    """

    def add(kind: Kind) -> Kind:
        among[name] = kind
        return kind

    return add


class EpochSampler:
    """The order of the images in an epoch: a permutation drawn from (seed, epoch). Lightning calls set_epoch()."""

    def __init__(self, seed: int):
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self, n: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "order", self.epoch))
        return torch.randperm(n, generator=generator)


def check_whole(name: str, value: Any, least: int) -> None:
    """Raise ValueError where a setting is no whole number, or too small."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"data.{name}={value!r}: use a whole number, at least {least}")


def place(trainer: L.Trainer | None) -> tuple[int, int]:
    """Return the number of this process and how many there are."""
    return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


def share_of_batch(batch_size: int, processes: int) -> int:
    """Return how many images of a batch each process takes; ValueError where they cannot share it equally."""
    if batch_size % processes:
        raise ValueError(
            f"recipe.batch_size={batch_size} is the batch of all processes together and cannot be shared by "
            f"{processes}: use a multiple"
        )
    return batch_size // processes


def split_per_class(labels: Tensor, num_classes: int, share: float) -> tuple[Tensor, Tensor]:
    """Split indices into the first `share` of every class and the rest, both in ascending order."""
    first, rest = [], []
    for label in range(num_classes):
        members = torch.nonzero(labels == label).flatten()
        cut = round(share * len(members))
        first.append(members[:cut])
        rest.append(members[cut:])
    return torch.cat(first).sort().values, torch.cat(rest).sort().values


def first_of_classes(labels: Tensor, num_classes: int, n: int) -> Tensor:
    """Return the indices of exactly n images in ascending order: the first of each class, as many as its share.

    Where the shares are no whole numbers, the largest remainders are rounded up, those of earlier classes first.
    """
    exact = torch.bincount(labels, minlength=num_classes).double() * n / len(labels)
    counts = exact.floor().long()
    more = (exact - counts).sort(descending=True, stable=True).indices[: n - int(counts.sum())]
    counts[more] += 1
    first = [torch.nonzero(labels == label).flatten()[: counts[label]] for label in range(num_classes)]
    return torch.cat(first).sort().values


def spread_over_classes(labels: Tensor, n: int) -> Tensor:
    """Return the indices of n images (all where there are fewer), as many of each class as its share of the labels."""
    by_class = labels.argsort(stable=True)
    n = min(n, len(labels))
    return by_class[torch.arange(n, device=labels.device) * len(labels) // n]
