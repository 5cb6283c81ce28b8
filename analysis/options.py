"""What the commands of this folder have in common on their command line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SWEEPS = ROOT / "experiments/conf/sweep"  # the sweep files, which name contrasts


class Parser(argparse.ArgumentParser):
    """A command's parser: --results, and a study by place or by name where the command is about one.

    doc: the command's own words. study: "one", "optional" (all without one) or None. makes: "tables" and "figures",
    which have formats that are written on demand.
    """

    def __init__(self, doc: str | None, study: str | None = None, makes: tuple[str, ...] = ()):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.study = study
        if study:
            self.add_argument("study_by_place", nargs="?", metavar="STUDY", help="a folder under results/")
            self.add_argument("--study", help="the same by name")
        self.add_argument("--results", type=Path, default=ROOT / "results", help="folder of the records")
        if "tables" in makes:
            self.add_argument("--latex", action="store_true", help="write LaTeX beside Markdown and CSV")
        if "figures" in makes:
            self.add_argument("--pdf", action="store_true", help="write PDF beside PNG")

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        options = super().parse_args(args, namespace)
        if self.study:
            named = [each for each in (options.study_by_place, options.study) if each]
            if len(set(named)) > 1:
                self.error(f"two studies, {' and '.join(named)}: give one")
            options.study = named[0] if named else None
            if self.study == "one" and not named:
                self.error(f"which study? There is: {studies(options.results)}")
        return options


def studies(results: Path) -> str:
    """Name the studies that have records."""
    return ", ".join(sorted(path.parent.name for path in results.glob("*/records"))) or "none"


def no_records(study: str | None, results: Path, what: str = "records") -> None:
    """End the command with one line: there is nothing to show."""
    of = f" of study {study!r}" if study else ""
    sys.exit(f"error: no {what}{of} in {results}; there is: {studies(results)}")
