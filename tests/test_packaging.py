"""Files that have to agree with each other: pyproject, conda environment, lock file, versions."""

import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import repmlp

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

# conda's name of a package where it is not PyPI's
CONDA = {"torch": "pytorch", "matplotlib": "matplotlib-base", "build": "python-build"}


def parse(requirement: str) -> tuple[str, str]:
    name, bound = re.fullmatch(r"([\w-]+)(.*)", requirement.strip()).groups()
    return name.lower(), bound.strip()


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements() -> dict[str, str]:
    lists = [project()["dependencies"], *project()["optional-dependencies"].values()]
    return dict(parse(r) for group in lists for r in group if not r.startswith("repmlp["))


def test_environment_names_what_pyproject_names():
    lines = re.findall(r"^ +- ([a-z][^\n:]*)$", (ROOT / "environment.yml").read_text(), re.MULTILINE)
    conda = dict(parse(line) for line in lines if line not in ("pip", "conda-forge"))
    assert conda.pop("python") == project()["requires-python"]
    assert conda == {CONDA.get(name, name): bound for name, bound in requirements().items()}


def test_lock_pins_every_requirement_and_names_no_address():
    text = (ROOT / "requirements.lock").read_text()
    pins = dict(re.findall(r"^([\w.-]+)==(\S+) ; ", text, re.MULTILINE))
    assert {name.lower().replace("_", "-") for name in pins} >= requirements().keys()
    assert "://" not in text and "@" not in text
    assert all(line.startswith("#") or "==" in line for line in text.splitlines())


def test_versions_agree():
    assert repmlp.__version__ == project()["version"]
    assert f"version: {repmlp.__version__}" in (ROOT / "CITATION.cff").read_text()


def test_types_are_shipped():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "py.typed" in settings["package-data"]["repmlp"] and (ROOT / "repmlp/py.typed").is_file()


WINGS = ("data", "training", "runs")  # what needs Lightning; runs/ alone may import Hydra


def test_the_source_archive_holds_the_commands_and_what_the_guide_links_to():
    lines = (ROOT / "MANIFEST.in").read_text().splitlines()
    rules = [line.split() for line in lines if not line.startswith("#")]
    wanted = {
        path for room in ("analysis", "experiments") for path in (ROOT / room).rglob("*.*") if "pyc" not in path.suffix
    }
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        wanted |= {(page.parent / target).resolve() for target in re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", text)}
    for path in sorted(wanted):
        target = path.relative_to(ROOT).as_posix()
        assert any(
            target in rule[1:]
            if rule[0] == "include"
            else target.startswith(f"{rule[1]}/") and any(Path(target).match(pattern) for pattern in rule[2:])
            for rule in rules
        ), target


def test_rooms_import_from_below_only():
    """reparam.py knows no module; no Hydra or Lightning below the wings; analysis trains nothing."""
    outside = re.compile(r"^(import|from) (hydra|lightning|torchmetrics|experiments|analysis)", re.MULTILINE)
    for path in (ROOT / "repmlp").rglob("*.py"):
        text, wing = path.read_text(), path.relative_to(ROOT / "repmlp").parts[0]
        if wing not in WINGS:
            assert not outside.search(text), path
            assert not re.search(r"from repmlp\.(data|training|runs)", text), path
        elif wing != "runs":
            assert not re.search(r"^ *(import|from) (hydra|omegaconf)", text, re.MULTILINE), path
            assert not re.search(r"from repmlp\.runs", text), path
    assert "torch.nn" not in (ROOT / "repmlp/reparam.py").read_text()
    for path in (ROOT / "analysis").glob("*.py"):
        assert "repmlp.training" not in path.read_text(), path
