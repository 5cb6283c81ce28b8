"""How a sweep is told: which row of how many runs, the time left, and at the end every row that failed.

`SweepReport` is a Hydra callback (experiments/conf/config.yaml names it). Rows may run in other processes or on other
machines, so what they tell each other lies in files of the sweep's own folder.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from repmlp.runs.record import write_json
from repmlp.runs.run import Outcome, first_process

log = logging.getLogger(__name__)

PLAN, OUTCOMES = "plan.json", "outcomes"


class SweepReport(Callback):
    """Count the rows before a sweep, name its failed rows after it; one that failed makes the exit status 1."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        rows = sweep_rows(config.hydra.sweeper.params, list(config.hydra.overrides.task))
        start_plan(Path(config.hydra.sweep.dir), len(rows))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        finish(Path(config.hydra.sweep.dir))

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        if first_process():
            start_plan(Path(config.hydra.run.dir), 1)

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        if first_process():
            finish(Path(config.hydra.run.dir))


def sweep_rows(params: Mapping[str, Any] | None, overrides: list[str]) -> list[list[str]]:
    """Return the overrides of every row of a sweep, as Hydra will run them."""
    swept = [f"{key}={value}" for key, value in (params or {}).items()]
    return [
        list(row)
        for row in BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(swept + overrides), None)[0]
    ]


def start_plan(folder: Path, rows: int) -> None:
    """Write down how many rows there are and when they were started."""
    (folder / OUTCOMES).mkdir(parents=True, exist_ok=True)
    (folder / PLAN).write_text(json.dumps({"rows": rows, "started": time.time()}))


def outcomes(folder: Path) -> dict[int, Outcome]:
    """Read how the rows ended so far, by the number of the row, from 0."""
    paths = sorted((folder / OUTCOMES).glob("*.json"))
    return {int(path.stem): Outcome(**json.loads(path.read_text())) for path in paths}


def note_outcome(folder: Path, number: int, outcome: Outcome) -> None:
    """Write down how row `number` (from 0) ended, in one step, for whoever looks meanwhile."""
    write_json(folder / OUTCOMES / f"{number:05d}.json", asdict(outcome))


def progress_line(folder: Path, number: int, label: str) -> str:
    """Say which row this is of how many, and about how long the rest takes, from the rows trained in this sweep."""
    plan = json.loads((folder / PLAN).read_text())
    ended = outcomes(folder)
    trained = [o for o in ended.values() if o.state == "finished"]
    line = f"row {number + 1}/{plan['rows']}: {label}"
    if trained:
        # Wall time over trained rows, not the mean of their times: right for rows side by side too.
        left = (time.time() - plan["started"]) / len(trained) * (plan["rows"] - len(ended))
        line += f" (about {format_seconds(left)} left)"
    return line


def format_seconds(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 2 else f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"


def outcome_line(outcome: Outcome, number: int) -> str:
    if outcome.state == "finished":
        return f"row {number + 1} finished in {format_seconds(outcome.seconds)}: {outcome.label}"
    if outcome.state == "skipped":
        note = f" ({outcome.message})" if outcome.message else ""
        return f"row {number + 1} skipped, it is finished already: {outcome.label}{note}"
    if outcome.state == "busy":
        return f"row {number + 1} left alone, {outcome.message}: {outcome.label}"
    return f"row {number + 1} FAILED: {outcome.label}: {outcome.message}"


def finish(folder: Path) -> None:
    """Print the summary of a sweep; raises SystemExit(1) where a row failed or never reported."""
    rows = json.loads((folder / PLAN).read_text())["rows"]
    ended = outcomes(folder)
    counts = {
        state: sum(o.state == state for o in ended.values()) for state in ("finished", "skipped", "busy", "failed")
    }
    counts["without a report"] = rows - len(ended)
    summary = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
    print(f"{rows} row{'s' if rows > 1 else ''}: {summary}", file=sys.stderr)
    # rows that failed for one reason (no data set, say) are named together
    reasons: dict[tuple[str, str], list[str]] = {}
    for number, outcome in ended.items():
        if outcome.state in ("failed", "busy"):
            reasons.setdefault((outcome.state, outcome.message), []).append(f"row {number + 1} ({outcome.label})")
    for (state, message), named in reasons.items():
        print(f"{'FAILED' if state == 'failed' else 'left alone'}: {'; '.join(named)}: {message}", file=sys.stderr)
    if counts["failed"] or counts["without a report"]:
        raise SystemExit(1)
