"""Images in folders: which files are a data set's, how one is read, and a digest of which they are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath

import numpy as np
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS

MESSAGE = "is no readable image: replace it or remove it"


def is_visible(path: PurePath) -> bool:
    """Say whether neither a file nor a folder above it is hidden; path: from the folder that is looked through.

    Notebooks leave .ipynb_checkpoints, and macOS ._NAME beside each file.
    """
    return not any(part.startswith(".") and part != ".." for part in path.parts)


def is_ours(path: PurePath) -> bool:
    """Say by its name whether a file is an image of a data set; path: from the folder that is looked through."""
    return is_visible(path) and path.suffix.lower() in IMG_EXTENSIONS


def images_below(folder: Path) -> Iterator[Path]:
    """Give the images in a folder and in all below it, relative to it: its own, sorted, then those of each folder.

    Links to folders are followed.
    """
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if is_visible(PurePath(name)))
        below = Path(where).relative_to(folder)
        yield from (below / name for name in sorted(files) if is_ours(PurePath(name)))


def digest(files: Iterable[tuple[str, Path]]) -> str:
    """Return 16 hex digits that stand for names and sizes of files; their content is not read.

    files: (name, where it lies): the name says part and class, not the folder of the data set.
    Raises FileNotFoundError that names a file that is gone.
    """
    made = hashlib.sha256()
    for name, path in files:
        made.update(f"{name} {path.stat().st_size}\n".encode("utf-8", "surrogateescape"))
    return made.hexdigest()[:16]


def read_image(path: str | Path, partner: str = "") -> Image.Image:
    """Decode an image as it is stored.

    partner: what has to be removed with it, in words. Raises ValueError that names the file where it is no whole image.
    """
    return _decode(path, lambda image: image, partner)


def read_rgb(path: str | Path) -> Image.Image:
    """Decode an image as a viewer shows it: upright where a camera noted a rotation, three channels of eight bits.

    Raises ValueError that names the file where it is no whole image, or of a kind that to_rgb() refuses.
    """
    return _decode(path, lambda image: to_rgb(ImageOps.exif_transpose(image) if _turned(image) else image))


def _decode(path: str | Path, convert: Callable[[Image.Image], Image.Image], partner: str = "") -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return convert(image)
    except Exception as error:  # Pillow has no error type of its own: a damaged file fails in any of a dozen ways
        raise ValueError(f"{path} {MESSAGE}{partner} ({_reason(error, path)})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to mode RGB: grey to three equal channels, 16 bits to the upper eight, CMYK; transparency is left out.

    Pillow itself cuts off everything above 255 where there are 16 bits.
    Raises ValueError for modes whose numbers have no range.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.size and (values.min() < 0 or values.max() > 0xFFFF):
            raise ValueError("its numbers have more than 16 bits")
        image = Image.fromarray((values.astype(np.int64) >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its numbers are floats, which have no range")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns
    return image.convert("RGB")


def _turned(image: Image.Image) -> bool:
    return image.getexif().get(0x0112, 1) != 1  # the tag of the orientation


def _reason(error: Exception, path: str | Path) -> str:
    """Return what Pillow complains of, in one line and without the path."""
    text = " ".join(str(error).split()).replace(f" {str(path)!r}", "").replace(str(path), "it")
    return text or type(error).__name__
