"""What stands beside the weights of a trained network about the images that it was trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TrainedOn:
    """Data of a run, as text in a file's metadata; empty where a file does not tell it.

    data: settings of the data set. class_names: in the order of the outputs. mean, std: of the three channels, of
    images in [0, 1]. window: (height, width) that a segmentation was evaluated in, empty for whole images.
    """

    data: Mapping[str, Any] = field(default_factory=dict)
    class_names: Sequence[str] = ()
    mean: Sequence[float] = ()
    std: Sequence[float] = ()
    window: Sequence[int] = ()

    def to_metadata(self) -> dict[str, str]:
        """Return the texts that `from_metadata` reads."""
        window = {"window": json.dumps(self.window)} if self.window else {}
        return {
            **window,
            "data": json.dumps(self.data),
            "classes": json.dumps(self.class_names),
            "normalisation": json.dumps({"mean": self.mean, "std": self.std}),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> TrainedOn:
        """Read the metadata of a file, see `open_checkpoint`."""
        data, names, numbers, window = (
            json.loads(metadata.get(name, empty))
            for name, empty in (("data", "{}"), ("classes", "[]"), ("normalisation", "{}"), ("window", "[]"))
        )
        return cls(data, tuple(names), tuple(numbers.get("mean", ())), tuple(numbers.get("std", ())), tuple(window))
