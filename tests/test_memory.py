"""Memory kept between the steps of a training on a CPU."""

import platform
import resource
from pathlib import Path

import pytest
import torch

from repmlp.training.memory import freed_memory_kept

MIB = 2**20


def page_faults() -> int:
    """Touch 256 MiB of new tensors and return how many pages of the system's that took."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (64, 128, 64):
        torch.ones(size * MIB // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    """Return the process's memory in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept_and_given_back():
    before = resident()
    with freed_memory_kept():
        page_faults()
        assert page_faults() < 100
        assert resident() - before > 100 * MIB
    assert resident() - before < 20 * MIB
    again = page_faults()
    assert again > 100  # huge pages, where the system has them, are few
    with pytest.raises(RuntimeError, match="stop"):
        with freed_memory_kept():
            page_faults()
            raise RuntimeError("stop")
    assert resident() - before < 20 * MIB


def test_it_does_nothing_elsewhere(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with freed_memory_kept():
        assert torch.ones(MIB).sum() == MIB
