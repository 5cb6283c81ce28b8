"""What is committed keeps its promises: records lie under their keys, tables and figures come out of the records."""

import json
import shutil
import subprocess
from importlib.metadata import version

import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT, command

from repmlp.runs.key import run_key

RECORDS = sorted((ROOT / "results").glob("*/records/*.json"))
# made of trained weights or of images; no others are committed than those in weights/
FROM_WEIGHTS = ("*/kernel_*.*", "*/borders/*.png", "*/scrambled.png", "weights/*/README.md")
TEXTS = ("README.md", "RUNBOOK.md")


def committed() -> list:
    """Return the files below results/ that git tracks, relative to it; skips outside a clone."""
    found = subprocess.run(["git", "ls-files", "results"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode or not found.stdout:
        pytest.skip("no git clone: nothing says which files are committed")
    return [(ROOT / line).relative_to(ROOT / "results") for line in found.stdout.splitlines() if (ROOT / line).exists()]


def test_there_are_records():
    assert len(RECORDS) > 60


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: f"{path.parts[-3]}/{path.stem}")
def test_a_record_lies_under_the_key_of_its_configuration(path):
    assert run_key(json.loads(path.read_text())["config"]) == path.stem


def pixels(path) -> np.ndarray:
    return matplotlib.image.imread(path)


def test_tables_and_figures_come_out_of_the_committed_records_alone(tmp_path):
    """Whatever else lies in the working tree: only what is committed is copied to where the command looks."""
    files = committed()
    made = [
        file
        for file in files
        if file.suffix in (".md", ".csv", ".tex", ".png", ".pdf")
        and file.name not in TEXTS
        and (file.parts[0] == "weights" or not any(file.match(pattern) for pattern in FROM_WEIGHTS))
    ]
    assert len(made) > 100
    for file in set(files) - set(made):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "results" / file, tmp_path / file)
    ran = command("analysis/make_all.py", "--results", str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    pinned = f"matplotlib=={version('matplotlib')} " in (ROOT / "requirements.lock").read_text()
    different = []
    for file in made:
        ours, theirs = tmp_path / file, ROOT / "results" / file
        if not ours.exists():
            different.append(f"{file} is not made")
        elif file.suffix == ".png":
            if pinned and not np.array_equal(pixels(ours), pixels(theirs)):
                different.append(f"{file} has other pixels")
        elif file.suffix != ".pdf" and ours.read_bytes() != theirs.read_bytes():  # a PDF names matplotlib's version
            different.append(f"{file} has other bytes")
    assert not different, "; ".join(different)
