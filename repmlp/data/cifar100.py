"""CIFAR-100 from torchvision's files, kept whole on the training device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock
from torchvision.datasets import CIFAR100

from repmlp.data.base import DataInfo, register
from repmlp.data.resident import Augmentation, ImageSet, ResidentData

INSTEAD = (
    "pass data.root=FOLDER (the folder that holds cifar-100-python/) or set REPMLP_DATA; "
    "without the data set, data=patterns is generated (calibrated runs: +sweep=demo)"
)


@register("cifar100")
class CIFAR100Data(ResidentData):
    """CIFAR-100: 50,000 training and 10,000 test images of 32x32, 100 classes; pad 4, random crop, flip.

    Paper: RepMLPNet Section 5.2. root: folder of `cifar-100-python/`. download: fetch it where it is absent.
    randaugment: magnitude out of 30, None for none.
    Raises FileNotFoundError where it is absent and cannot be downloaded, ValueError where its files are damaged or the
    magnitude is out of range; the message names the remedy.
    """

    info = DataInfo(
        num_classes=100,
        img_size=32,
        mean=(0.50708, 0.48655, 0.44092),
        std=(0.26733, 0.25644, 0.27615),
    )

    def __init__(
        self,
        root: str | Path,
        *,
        download: bool = True,
        pad: int = 4,
        flip: bool = True,
        randaugment: int | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.augmentation = Augmentation(pad, flip, randaugment)
        self.root = Path(root).expanduser()
        self.download = download

    def prepare_data(self) -> None:
        """Download where the data set is absent; setup() checks the files as it reads them."""
        folder = self.root / CIFAR100.base_folder
        if _holds_files(folder):
            return
        if not self.download:
            raise FileNotFoundError(f"CIFAR-100 is not in {folder} and download=false: {INSTEAD}")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / "cifar100.lock"):
                if not _holds_files(folder):  # or another process has just fetched it
                    CIFAR100(self.root, download=True)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(f"CIFAR-100 is not in {folder}, download failed ({error}): {INSTEAD}") from error

    def load(self) -> tuple[ImageSet, ImageSet]:
        train, test = (_open(self.root, train) for train in (True, False))
        self.info = replace(self.info, class_names=tuple(test.classes))
        return _whole(train), _whole(test)


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _open(root: Path, train: bool) -> CIFAR100:
    """Open one split; torchvision compares the files' MD5 before it unpickles them."""
    try:
        return CIFAR100(root, train=train, download=False)
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"the files in {root / CIFAR100.base_folder} are not the CIFAR-100 release (a file is missing or its MD5 "
            f"differs): remove that folder to download it again, or {INSTEAD}"
        ) from error


def _whole(data: CIFAR100) -> ImageSet:
    # (N, H, W, 3) -> (N, 3, H, W)
    return ImageSet(torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets))
