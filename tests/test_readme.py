"""What the README, the guide and the results tell a reader to type runs, or at least parses; links lead somewhere."""

import argparse
import csv
import functools
import importlib
import re
import shlex
import sys

import pytest
from conftest import ROOT, compose_config
from hydra.core.override_parser.overrides_parser import OverridesParser

README = ROOT / "README.md"
TEXTS = [
    README,
    *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "results/README.md", "results/RUNBOOK.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
SWEEPS = ROOT / "experiments/conf/sweep"
GROUPS = r"'?\+?(model|data|recipe|trainer|hydra|change|fraction)[./=]"  # what a setting's dotted name starts with
for room in ("analysis", "experiments"):
    sys.path.insert(0, str(ROOT / room))

each_text = pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))


def name_of(path) -> str:
    return str(path.relative_to(ROOT))


def python_blocks() -> list:
    blocks = []
    for path in TEXTS:
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL), 1):
            blocks.append(pytest.param(path, code, id=f"{name_of(path)}-{number}"))
    return blocks


def commands(text: str) -> list[list[str]]:
    """Return the words of every command in a text, `python SCRIPT ...`, in blocks and in lines; variables filled in."""
    variables = dict(re.findall(r'^(\w+)="([^"]*)"$', text, re.MULTILINE))

    def filled(line: str) -> str:
        return re.sub(r"\$(\w+)", lambda m: filled(variables[m[1]]), line)

    lines = []
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        lines += re.sub(r"\\\n\s*", "", block).splitlines()
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = []
    for line in lines:
        if line.startswith("python "):
            found.append(shlex.split(filled(line), comments=True)[1:])
    return found


def first_values(overrides: list[str]) -> list[str]:
    """Return one row of a sweep: of every choice the first value."""
    chosen = []
    for text, parsed in zip(overrides, OverridesParser.create().parse_overrides(overrides), strict=True):
        if parsed.is_sweep_override():
            value = next(iter(parsed.sweep_string_iterator()))
            text = f"{text.split('=', 1)[0]}={value}"
        chosen.append(text)
    return chosen


@functools.cache
def composed(config: str, overrides: tuple[str, ...]) -> bool:
    """Compose a command's configuration; unknown settings raise."""
    compose_config(
        *first_values([text.replace("+sweep=NAME", "+sweep=demo") for text in overrides if text != "-m"]), name=config
    )
    return True


class Parsed(Exception):
    """Raised in the place of what a command would do."""


def parse(script: str, arguments: list[str], monkeypatch) -> None:
    """Let a command parse its arguments, and no more; a wrong one raises SystemExit."""
    real = argparse.ArgumentParser.parse_known_args

    def stop(self, args=None, namespace=None):
        _, unknown = real(self, args, namespace)
        raise Parsed(unknown)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
    main = importlib.import_module(script.split("/")[1].removesuffix(".py")).main
    with pytest.raises(Parsed) as end:
        main(arguments)
    assert end.value.args == ([],), (script, arguments)


@pytest.mark.parametrize(("path", "code"), python_blocks())
def test_python_examples_run(path, code, capsys, tmp_path, monkeypatch):
    (tmp_path / "results").symlink_to(ROOT / "results")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, name_of(path), "exec"), {})
    printed = capsys.readouterr().out
    if "print" in code:
        assert float(re.search(r"[\d.]+e-\d+", printed).group()) < 2e-6


@each_text
def test_commands_parse(path, monkeypatch):
    for script, *arguments in commands(path.read_text()):
        file = ROOT / script
        assert file.is_file(), script
        hydra = re.search(r'config_name="(\w+)"', file.read_text())
        if hydra:
            assert composed(hydra[1], tuple(arguments)), (script, arguments)
        elif "ArgumentParser" in file.read_text() or "Parser(" in file.read_text():
            with monkeypatch.context() as patch:
                parse(script, arguments, patch)
        else:
            assert script.startswith("tests/") or not arguments, f"{script} takes no arguments"


def test_a_wrong_command_is_found(monkeypatch):
    assert commands('`python a.py x=1`\n```sh\nG="y=2 z"\npython b.py \\\n  $G  # why\n```') == [
        ["b.py", "y=2", "z"],
        ["a.py", "x=1"],
    ]
    with pytest.raises(Exception, match="epoch"):
        composed("config", ("recipe.epoch=3",))
    with pytest.raises(AssertionError, match="no-such-option"):
        parse("analysis/plot_kernels.py", ["--no-such-option", "FILE"], monkeypatch)


@each_text
def test_settings_compose(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for line in re.findall(r"`([^`\n]+)`", text):
        words = shlex.split(line) if re.match(GROUPS, line) and "=" in line else []
        if not words or not all("=" in word for word in words):
            continue
        faults = []
        for config in ("config", "segment", "train", "evaluate"):
            try:
                composed(config, tuple(words))
                break
            except Exception as error:
                faults.append(str(error))
        else:
            pytest.fail(f"{line}: {faults[0]}")


@each_text
def test_make_targets_and_sweeps_exist(path):
    makefile, text = (ROOT / "Makefile").read_text(), path.read_text()
    for target in re.findall(r"`make (\w+)|^make (\w+)", text, re.MULTILINE):
        assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), target
    for sweep in set(re.findall(r"\+sweep=([\w/]+)", text)) - {"NAME"}:
        assert (SWEEPS / f"{sweep}.yaml").is_file(), sweep


@each_text
def test_links_and_pictures_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        place = path.parent / file if file else path
        assert place.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", place.read_text(), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], target


def test_every_sweep_is_in_the_guide():
    text = (ROOT / "docs/sweeps.md").read_text()
    for path in SWEEPS.rglob("*.yaml"):
        name = path.relative_to(SWEEPS).with_suffix("")
        assert f"+sweep={name}`" in text, name


def test_every_page_is_in_the_guides_list():
    text = (ROOT / "docs/README.md").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name == "README.md" or f"({path.name})" in text, f"docs/README.md lists no {path.name}"


def test_the_readme_is_read_in_a_minute():
    assert len(README.read_text().splitlines()) <= 150


def test_its_gains_are_those_of_the_contrasts():
    """A study that goes on must not leave yesterday's figures on the first screen."""
    with open(ROOT / "results/small_locality_cifar100/contrasts.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["contrast"] == "1x1+3x3 - none"]
    for path in (README, ROOT / "docs/reading_results.md"):
        for row in rows:
            difference, low, high = (f"{float(row[name]):+.2f}" for name in ("difference", "low", "high"))
            text = path.read_text()
            assert difference in text and f"{low} to {high}" in text, (name_of(path), row)
        assert f"n = {rows[0]['n']}:" in README.read_text()


def figures_of(*paths) -> list[float]:
    """Return the numbers that stand alone in cells of tables, with "34.35" and "5e-05", without their signs."""
    cells = [cell for path in paths for row in csv.reader(path.read_text().splitlines()) for cell in row]
    return [abs(float(cell)) for cell in cells if re.fullmatch(r"[+-]?\d+(\.\d+)?(e-?\d+)?", cell)]


def strange(text: str, known: list[float]) -> list[str]:
    """Return the figures with a decimal point in a text that no known number is rounded to; "p < 0.01" is no figure."""
    written = re.findall(r"(?<![\w.])(?<!< )\d+\.\d+", text)
    return [
        figure
        for figure in written
        if not any(abs(number - float(figure)) <= 0.500001 * 10.0 ** -len(figure.partition(".")[2]) for number in known)
    ]


def test_figures_in_the_readings_are_those_of_the_tables():
    """A study that goes on must not leave yesterday's figures in the reading of its results either."""
    results = ROOT / "results"
    text = (results / "README.md").read_text()
    studies = 0
    for title, body in re.findall(r"^## (.*)\n((?:(?!## ).*\n?)*)", text, re.MULTILINE):
        number = re.search(r"^- \*\*Number\*\*(.*?)^- \*\*", body, re.MULTILINE | re.DOTALL)
        linked = re.search(r"\((\w+)/contrasts\.md\)", body)
        if number and linked:
            known = figures_of(*(p for p in (results / linked[1]).glob("*.csv") if p.name != "runs.csv"))
            assert not strange(number[1], known), title
            studies += 1
    for row in re.findall(r"^\| .*/contrasts\.md\).*$", text, re.MULTILINE):
        _, here, interval = row.split(" | ")[:3]
        known = figures_of(results / re.search(r"\((\w+)/contrasts\.md\)", here)[1] / "contrasts.csv")
        assert not strange(f"{here} {interval}", known), row
    assert studies >= 6


def test_figures_of_locality_are_those_of_its_table():
    text = (ROOT / "results/README.md").read_text().partition("## Does a number for locality predict accuracy?\n")[2]
    text = " ".join(text.partition("\n## ")[0].split())
    written = re.findall(r"[+-]\d\.\d+|p = \d\.\d+", text)
    assert len(written) >= 7 and not strange(" ".join(written), figures_of(ROOT / "results/locality.csv")), written
