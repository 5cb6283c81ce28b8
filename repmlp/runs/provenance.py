"""What a record says of where it comes from: commit, versions, device and processor."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from repmlp.processor import cpu_fields

PACKAGES = ("torch", "lightning", "torchmetrics", "timm", "numpy")  # on which the result of a run depends


def git_state() -> dict[str, Any]:
    """Return the commit of the code and whether the tree differs from it (records do not count); None outside git."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str | None:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            return subprocess.run(
                ["git", "-C", str(here), *arguments], check=True, capture_output=True, text=True
            ).stdout.strip()
        return None

    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--", ":/", ":(top,exclude)results")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of some packages and of Python."""
    return {name: version(name) for name in packages} | {"python": platform.python_version()}


def measured_on(device: torch.device, packages: Iterable[str]) -> dict[str, Any]:
    """Return what a measurement of ours says of the machine: device, processor, threads, versions of packages."""
    return {
        "device": device_name(device),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "versions": versions(packages),
    }


def device_name(device: torch.device) -> str:
    """Return what trained: a GPU's name, or the kind of CPU; `processor` says which CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU"


def processor() -> dict[str, Any]:
    """Return the CPU: {"name": as the system calls it, "family": ..., "amx": whether it multiplies matrices in tiles}.

    Part of every record, because the same run ends a little differently on different processors: one key gave 45.05 %
    and 45.15 %. A virtual machine may hide the name ("Intel(R) Xeon(R) Processor"), so family and model number are
    told with it. Where the system does not say (no /proc/cpuinfo), the name is Python's and the others are None.
    """
    fields = cpu_fields()
    if not fields:
        return {"name": platform.processor() or platform.machine(), "family": None, "amx": None}
    family = [fields[name] for name in ("cpu family", "model") if name in fields]
    return {
        "name": fields.get("model name") or platform.machine(),
        "family": ".".join(family) or None,
        "amx": "amx_tile" in fields.get("flags", "").split(),
    }
