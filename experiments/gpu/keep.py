"""Keep the weights of a finished row in float16, and draw its kernels; in the project's folder.

python keep.py KEY OUTPUTS FOLDER     -> FOLDER/KEY/model.float16.safetensors, FOLDER/pictures/kernel_KEY_*.png
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

LARGE = 4096  # numbers; smaller tensors (norms, biases) stay in float32


def halve(path: Path, target: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = {**file.metadata(), "stored": "float16"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    half = {n: t.half() if t.is_floating_point() and t.numel() >= LARGE else t for n, t in tensors.items()}
    if not all(torch.isfinite(t).all() for t in half.values() if t.is_floating_point()):
        sys.exit(f"error: {path} does not fit into float16")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    save_file(half, partial, metadata)
    partial.replace(target)


if __name__ == "__main__":
    key, outputs, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    weights = outputs / key / "model.safetensors"
    halve(weights, folder / key / "model.float16.safetensors")
    command = [sys.executable, "analysis/plot_kernels.py", weights, "--all-blocks", "--out", folder / "pictures"]
    sys.exit(subprocess.run(command).returncode)
