"""What the README tells a newcomer to type."""

import re

import pytest
from conftest import ROOT, compose_config

README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_examples_run(code, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    if "print" in code:
        assert float(re.search(r"[\d.]+e-\d+", printed).group()) < 2e-6


def test_commands_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for script in re.findall(r"python (\w+/\w+\.py)", README):
        assert (ROOT / script).is_file(), script
    for sweep in re.findall(r"\+sweep=([\w/]+)", README):
        assert (ROOT / f"experiments/conf/sweep/{sweep}.yaml").is_file(), sweep


def test_every_sweep_is_in_the_readme():
    for path in (ROOT / "experiments/conf/sweep").rglob("*.yaml"):
        name = path.relative_to(ROOT / "experiments/conf/sweep").with_suffix("")
        assert f"+sweep={name}`" in README, name


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_settings_it_names_exist():
    for line in re.findall(r"`(recipe\.epochs=20 [^`]+)`", README):
        compose_config(*line.split())
