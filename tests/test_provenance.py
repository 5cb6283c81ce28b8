"""Where a record says that it comes from."""

import pathlib
import platform

import pytest

from repmlp.runs.provenance import processor, versions

CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC 9R14
flags\t\t: fpu avx512f{flags}

processor\t: 1
model name\t: another
"""


@pytest.mark.parametrize("flags, amx", [("", False), (" amx_bf16 amx_tile", True)])
def test_the_processor_is_named(monkeypatch, flags, amx):
    monkeypatch.setattr(pathlib.Path, "read_text", lambda self: CPUINFO.replace("{flags}", flags))
    assert processor() == {"name": "AMD EPYC 9R14", "family": "25.17", "amx": amx}


def test_a_system_without_cpuinfo_is_told_as_far_as_it_is_known(monkeypatch):
    def absent(self):
        raise FileNotFoundError

    monkeypatch.setattr(pathlib.Path, "read_text", absent)
    assert processor() == {"name": platform.processor() or platform.machine(), "family": None, "amx": None}


def test_versions_name_python_too():
    assert versions(["torch"]).keys() == {"torch", "python"}
