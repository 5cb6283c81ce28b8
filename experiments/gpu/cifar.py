"""Rebuild the original CIFAR-100 files from shards of losslessly stored images, with all cores.

python cifar.py decode PARTS SHARD.parquet...    one file of raw pixels a shard, PARTS/SHARD.raw
python cifar.py join PARTS HEADS DEST            DEST/cifar-100-python/{train,test,meta}, MD5 sums compared
"""

from __future__ import annotations

import hashlib
import io
import lzma
import multiprocessing
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MD5 = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
CHUNK = 250  # images that a process decodes at a time


def pixels(images: list[bytes]) -> bytes:
    """Decode images to what the original files hold: (3, 32, 32) uint8 each."""
    import numpy as np
    from PIL import Image

    return b"".join(
        np.asarray(Image.open(io.BytesIO(each)).convert("RGB")).transpose(2, 0, 1).tobytes() for each in images
    )


def decode(parts: Path, shards: list[Path]) -> None:
    parts.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:  # forked before pyarrow has threads
        import pyarrow.parquet as pq

        for shard in shards:
            column = pq.read_table(shard, columns=["img"], use_threads=False)["img"].to_pylist()
            images = [row["bytes"] for row in column]
            chunks = [images[i : i + CHUNK] for i in range(0, len(images), CHUNK)]
            partial = parts / f"{shard.stem}.partial"
            with open(partial, "wb") as file:
                for raw in pool.imap(pixels, chunks):
                    file.write(raw)
            partial.replace(parts / f"{shard.stem}.raw")
            print(f"{shard.stem}: {len(images)} images", flush=True)


def join(parts: Path, heads: Path, dest: Path) -> None:
    target = dest / "cifar-100-python"
    target.mkdir(parents=True, exist_ok=True)
    for split, shards in (("train", 2), ("test", 1)):
        found = sorted(parts.glob(f"{split}-*.raw"))
        if len(found) != shards:
            sys.exit(f"error: {len(found)} of {shards} decoded shards of {split} in {parts}")
        with open(target / split, "wb") as out:
            out.write(lzma.decompress((heads / f"{split}.head.xz").read_bytes()))
            for raw in found:
                with open(raw, "rb") as file:
                    shutil.copyfileobj(file, out, 2**24)
            out.write(b"tbu.")
    shutil.copy(heads / "meta", target / "meta")
    with ThreadPoolExecutor() as threads:
        sums = threads.map(lambda name: hashlib.md5((target / name).read_bytes()).hexdigest(), MD5)
    for name, found in zip(MD5, sums, strict=True):
        if found != MD5[name]:
            sys.exit(f"error: CIFAR-100's {name} has MD5 {found}, not {MD5[name]}")
    print("CIFAR-100: MD5 sums as published", flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["decode", parts, *shards]:
            decode(Path(parts), [Path(shard) for shard in shards])
        case ["join", parts, heads, dest]:
            join(Path(parts), Path(heads), Path(dest))
        case _:
            sys.exit(__doc__)
