"""How a sweep is told: which run of how many, the time left, and at the end every run that failed.

`SweepReport` is a Hydra callback (experiments/conf/config.yaml names it). Runs may be in other processes or on other
machines, so what they tell each other lies in files of the sweep's own folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from repmlp.runs.outcome import Outcome, first_process, one_line
from repmlp.runs.record import check_writable, write_json
from repmlp.runs.settings import BadSetting

log = logging.getLogger(__name__)

PLAN, OUTCOMES = "plan.json", "outcomes"
STATES = ("finished", "skipped", "busy", "postponed", "failed")
SWEEPS: list[tuple[Path, Path]] = []  # folder and results of the sweep that this process started
# What run_label says of a run in its own words
SAID = ("model", "model.name", "model.kernels", "model.share_sets", "model.global_perceptron", "model.embed_kernel",
        "data.n_train", "recipe.epochs", "seed")  # fmt: skip


class SweepReport(Callback):
    """Count the runs before a sweep, name its failed ones after it; one that failed makes the exit status 1."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        # Another sweeper than Hydra's own (Optuna's, say) draws its runs one by one: nobody knows them beforehand.
        basic = config.hydra.sweeper._target_.endswith("BasicSweeper")
        if not basic and not config.get("data", {}).get("holdout"):
            sys.exit(
                "error: a sweeper that searches would choose by the images that results are reported on: "
                "use data.holdout=0.1, a tenth of the training images to choose by"
            )
        SWEEPS.append((Path(config.hydra.sweep.dir), results_of(config)))
        given = list(config.hydra.overrides.task)
        rows = sweep_rows(config.hydra.sweeper.params, given) if basic else None
        start_plan(Path(config.hydra.sweep.dir), rows, given)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        finish(Path(config.hydra.sweep.dir), results_of(config))

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        if first_process():
            start_plan(Path(config.hydra.run.dir), [[]])

    def on_run_end(self, config: DictConfig, **kwargs: Any) -> None:
        if first_process():
            finish(Path(config.hydra.run.dir), results_of(config))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Note what was raised where nothing else tells of it: outside of a run, before or after it."""
        swept = config.hydra.mode is not None and config.hydra.mode.name == "MULTIRUN"
        folder = Path(config.hydra.sweep.dir if swept else config.hydra.run.dir)
        number = int(config.hydra.job.num) if swept else 0
        raised = getattr(job_return, "_return_value", None)
        if job_return.status is not JobStatus.FAILED or not isinstance(raised, Exception) or not first_process():
            return
        if number not in outcomes(folder):
            outcome = Outcome("failed", " ".join(job_return.overrides or []) or "run", "", one_line(raised))
            note_outcome(folder, number, outcome)
            log.error(outcome_line(outcome, number))


def ended_without_a_word(error: Exception) -> bool:
    """Say whether a launcher complains that the process of a run is gone: joblib's workers, submitit's jobs."""
    return any(kind.__name__ in ("BrokenProcessPool", "UncompletedJobError") for kind in type(error).__mro__)


def summary_so_far() -> None:
    """Print the summary of the sweep that this process started, where its launcher gave up."""
    for folder, results in SWEEPS:
        with contextlib.suppress(SystemExit):
            finish(folder, results)


def results_of(config: DictConfig) -> Path:
    return Path(config.results_dir) / str(config.study)


def sweep_rows(params: Mapping[str, Any] | None, overrides: list[str]) -> list[list[str]]:
    """Return the overrides of every run of a sweep, as Hydra will do them."""
    swept = [f"{key}={value}" for key, value in (params or {}).items()]
    return [
        list(row)
        for row in BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(swept + overrides), None)[0]
    ]


def told_apart(rows: list[list[str]], number: int) -> list[str]:
    """Return what else than a label's own words tells run `number` from the others: "recipe.lr_per_256=0.004"."""
    settings = [dict(text.lstrip("+").split("=", 1) for text in row if "=" in text) for row in rows]
    names = dict.fromkeys(name for each in settings for name in each)
    varied = [name for name in names if name not in SAID and len({each.get(name) for each in settings}) > 1]
    return [f"{name}={settings[number][name]}" for name in varied if name in settings[number]]


def drawn(overrides: Sequence[str], given: Sequence[str]) -> list[str]:
    """Return what a search drew for a run, "recipe.lr_per_256=0.004": its overrides that the command did not give.

    Numbers to four digits, for a reader; the record has them whole.
    """
    said = []
    for name, equals, value in (text.lstrip("+").partition("=") for text in overrides if text not in given):
        if not equals or name in SAID:
            continue
        with contextlib.suppress(ValueError):
            value = f"{float(value):.4g}"
        said.append(f"{name}={value}")
    return said


def differing(plan: Mapping[str, Any], overrides: Sequence[str], number: int) -> list[str]:
    """Return what tells run `number` from the others of a plan; overrides: the run's own."""
    return drawn(overrides, plan["given"]) if plan["rows"] is None else told_apart(plan["rows"], number)


def start_plan(folder: Path, rows: list[list[str]] | None, given: Sequence[str] = ()) -> None:
    """Write down which runs there are (None: nobody knows), the command's overrides, and when they were started."""
    try:
        check_writable(folder / OUTCOMES, "output_dir")
    except BadSetting as error:
        sys.exit(f"error: {error}")  # Hydra makes a warning of any other error of a callback
    (folder / PLAN).write_text(json.dumps({"rows": rows, "given": list(given), "started": time.time()}))


def plan_of(folder: Path) -> dict[str, Any]:
    """Read the plan of a sweep: {"rows": overrides of each run or None, "given": the command's, "started": seconds}."""
    return json.loads((folder / PLAN).read_text())


def outcomes(folder: Path) -> dict[int, Outcome]:
    """Read how the runs ended so far, by the number of the run, from 0."""
    paths = sorted((folder / OUTCOMES).glob("*.json"))
    return {int(path.stem): Outcome(**json.loads(path.read_text())) for path in paths}


def note_outcome(folder: Path, number: int, outcome: Outcome) -> None:
    """Write down how run `number` (from 0) ended, in one step, for whoever looks meanwhile."""
    write_json(folder / OUTCOMES / f"{number:05d}.json", asdict(outcome))


def progress_line(folder: Path, number: int, label: str) -> str:
    """Say which run this is of how many, and about how long the rest takes, from the runs trained in this sweep."""
    plan, ended = plan_of(folder), outcomes(folder)
    if plan["rows"] is None:
        return f"run {number + 1}: {label}"
    trained = [o for o in ended.values() if o.state == "finished"]
    line = f"run {number + 1}/{len(plan['rows'])}: {label}"
    if trained:
        # Wall time over trained runs, not the mean of their times: right for runs side by side too.
        left = (time.time() - plan["started"]) / len(trained) * (len(plan["rows"]) - len(ended))
        line += f" (about {format_seconds(left)} left)"
    return line


def deadline_of(folder: Path, minutes: float | None) -> float | None:
    """Return when a sweep's time is over, in seconds as time.time() counts them; None where there is no limit."""
    return None if minutes is None else plan_of(folder)["started"] + 60 * minutes


def enough_time(folder: Path, deadline: float | None) -> bool:
    """Say whether a run can end before the deadline, going by the longest that this sweep has trained."""
    longest = max((o.seconds for o in outcomes(folder).values() if o.state == "finished"), default=0.0)
    return deadline is None or time.time() + longest < deadline


def format_seconds(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 2 else f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"


def outcome_line(outcome: Outcome, number: int) -> str:
    """Say in one line how a run ended; its key names its record and its folder."""
    key = f" [{outcome.key}]" if outcome.key else ""
    if outcome.state == "finished":
        return f"run {number + 1} finished in {format_seconds(outcome.seconds)}: {outcome.label}{key}"
    if outcome.state == "skipped":
        note = f" ({outcome.message})" if outcome.message else ""
        return f"run {number + 1} skipped, it is finished already: {outcome.label}{key}{note}"
    if outcome.state == "busy":
        return f"run {number + 1} left alone, {outcome.message}: {outcome.label}{key}"
    if outcome.state == "postponed":
        return f"run {number + 1} postponed: {outcome.label}{key}: {outcome.message}"
    return f"run {number + 1} FAILED: {outcome.label}{key}: {outcome.message}"


def finish(folder: Path, results: Path | None = None) -> None:
    """Print the summary of a sweep; raises SystemExit(1) where a run failed or never reported.

    results: the study's folder, whose tables the summary says how to make.
    """
    ended = outcomes(folder)
    rows = plan_of(folder)["rows"]
    number = len(ended) if rows is None else len(rows)
    counts = {state: sum(o.state == state for o in ended.values()) for state in STATES}
    counts["without a report"] = number - len(ended)
    summary = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
    print(f"{number} run{'s' if number != 1 else ''}: {summary}", file=sys.stderr)
    # runs that failed for one reason (no data set, say) are named together
    reasons: dict[tuple[str, str], list[str]] = {}
    for which, outcome in ended.items():
        if outcome.state in ("failed", "busy", "postponed"):
            reasons.setdefault((outcome.state, outcome.message), []).append(f"run {which + 1} ({outcome.label})")
    words = {"failed": "FAILED", "busy": "left alone", "postponed": "postponed"}
    for (state, message), named in reasons.items():
        print(f"{words[state]}: {'; '.join(named)}: {message}", file=sys.stderr)
    if results is not None and (counts["finished"] or counts["skipped"]):
        study, there = shlex.quote(results.name), shlex.quote(str(results.parent))
        elsewhere = "" if results.parent.absolute() == Path("results").absolute() else f" --results {there}"
        print(
            f"records: {results / 'records'}; python analysis/make_tables.py --study {study}{elsewhere} and "
            f"python analysis/plot_curves.py {study}{elsewhere} show them",
            file=sys.stderr,
        )
    if counts["failed"] or counts["without a report"]:
        raise SystemExit(1)
