"""Memory kept between the steps of a training on a CPU."""

import json
import platform

import pytest
import torch
from conftest import command

from repmlp.training.memory import freed_memory_kept

# In a process of its own, which has imported what a run has and computed nothing: in an old heap, holes that were never
# touched before are used again
MEASURE = """
import json, pathlib, resource, lightning, timm, torch
from repmlp.training.memory import freed_memory_kept

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for mib in (64, 128, 64):
        torch.ones(mib * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

page_faults()
start, found = resident(), {}
with freed_memory_kept():
    for _ in range(4):  # small blocks that stay may cut the first holes in two
        page_faults()
    found["faults within"], found["MiB within"] = page_faults(), resident() - start
found["MiB after"], found["faults after"] = resident() - start, page_faults()
try:
    with freed_memory_kept():
        page_faults()
        raise RuntimeError
except RuntimeError:
    found["MiB after an error"] = resident() - start
print(json.dumps(found))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept_and_given_back(tmp_path):
    (tmp_path / "measure.py").write_text(MEASURE)
    found = json.loads(command(str(tmp_path / "measure.py"), check=True).stdout)
    assert found["faults within"] < 50 < found["faults after"], found  # huge pages, where there are any, are few
    assert found["MiB within"] > 100 > 10 > found["MiB after"], found
    assert found["MiB after an error"] < 10, found


def test_it_does_nothing_elsewhere(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with freed_memory_kept():
        assert torch.ones(2**20).sum() == 2**20
