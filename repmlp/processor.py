"""What the system says of the CPU, and the words for the ways to multiply matrices on one."""

from __future__ import annotations

import platform
import re
from pathlib import Path

PRODUCTS = ("linear", "convolution")  # see repmlp.products; here, because settings are checked without torch


def cpu_fields() -> dict[str, str]:
    """Return what Linux tells of the first CPU, by its own names ("vendor_id", "flags"); empty on other systems."""
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return dict(re.findall(r"^([\w ]+?)\s*: (.*)$", text, re.MULTILINE))


def is_amd() -> bool:
    """Say whether AMD made the CPU; Windows has the vendor in Python's name for it."""
    return "AuthenticAMD" in (cpu_fields().get("vendor_id", ""), *platform.processor().replace(",", " ").split())
