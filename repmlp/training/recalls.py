"""How many images of each class are recognised: what one number over all images hides where classes are uneven."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Recalls:
    """Counts, for each class, its images and how many of them were recognised.

    num_classes: K. names: of the classes, in the order of the labels; none for numbers.
    """

    def __init__(self, num_classes: int, names: Sequence[str] = ()):
        self.names = list(names) or [str(number) for number in range(num_classes)]
        self.images, self.hits = torch.zeros(2, num_classes, dtype=torch.long)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits (B, K), labels (B,)."""
        labels, right = labels.cpu(), (logits.argmax(1) == labels).cpu()
        self.images += torch.bincount(labels, minlength=len(self.names))
        self.hits += torch.bincount(labels[right], minlength=len(self.names))

    @property
    def uneven(self) -> bool:
        """Whether classes have different numbers of images."""
        return bool((self.images != self.images[0]).any())

    def rows(self) -> list[dict[str, Any]]:
        """Return class, images and recall_pct of each class; the recall of a class without images is None."""
        counts = zip(self.names, self.images.tolist(), self.hits.tolist(), strict=True)
        return [{"class": name, "images": n, "recall_pct": 100 * hits / n if n else None} for name, n, hits in counts]

    def balanced(self) -> float:
        """Return the balanced accuracy in percent: the mean of the recalls, of the classes that there are images of."""
        there = self.images > 0
        return 100 * float((self.hits[there] / self.images[there].double()).mean())

    def of_record(self) -> dict[str, Any]:
        """Return what a record says of them: nothing where the classes are even, as then it is the accuracy."""
        if not self.uneven:
            return {}
        return {"balanced_accuracy_pct": self.balanced(), "recall_by_class": self.rows()}
