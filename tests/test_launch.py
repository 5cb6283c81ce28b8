"""What every command sets up before it runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

COUNT_FAULTS = """
import pathlib, resource, torch
from repmlp.training.launch import run_command

def main():
    torch.ones(2**26)  # 256 MiB; torch reads the environment at its first tensor
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**26)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

run_command(main, pathlib.Path.cwd())
"""


def page_faults(**environment: str) -> int:
    keep = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    run = subprocess.run(
        [sys.executable, "-c", COUNT_FAULTS], env=keep | environment, capture_output=True, text=True, check=True
    )
    return int(run.stdout)


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or not re.search(r"\[(madvise|always)\]", HUGE_PAGES.read_text()),
    reason="this system has no transparent huge pages",
)
def test_commands_ask_for_huge_pages():
    """Of 65,536 small pages or 128 huge ones; the system may be short of these, so the bound is loose."""
    assert page_faults() < 2**15


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[madvise]" not in HUGE_PAGES.read_text(), reason="huge pages are not on request here"
)
def test_who_wants_no_huge_pages_gets_none():
    assert page_faults(THP_MEM_ALLOC_ENABLE="0") >= 2**16
