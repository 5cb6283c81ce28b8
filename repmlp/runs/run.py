"""One run, from its settings to its record: fit, merge, evaluate, write.

A finished run is skipped, a half-finished one goes on from its last checkpoint, and two processes never do the same
run. Only plain dictionaries come in, so any launcher can do it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from repmlp.runs.fit import train
from repmlp.runs.key import run_key
from repmlp.runs.lock import run_lock
from repmlp.runs.outcome import Outcome, first_process, one_line, run_label
from repmlp.runs.provenance import git_state
from repmlp.runs.record import BadRecord, check_writable, reached, read_record, record_path, set_aside, write_record
from repmlp.runs.settings import BadSetting, Run, one_of, run_of
from repmlp.runs.tasks import TASKS
from repmlp.training.callbacks import OutOfTime

log = logging.getLogger(__name__)


def execute(config: Mapping[str, Any], label: str | None = None, deadline: float | None = None) -> Outcome:
    """Do one run; an error is reported in the outcome and never raised, so that the other runs of a sweep go on.

    config: the settings of settings.Run in plain values. label: what it is called; None for `run_label`'s words.
    deadline: seconds, as time.time() counts them, after which no further epoch is started.
    """
    started, clock = time.perf_counter(), time.time()
    key, folder = "", None
    try:
        settings = run_of(config)
        one_of("task", settings.task, TASKS)
        TASKS[settings.task].check(settings)
        label = label or run_label(asdict(settings))
        settings = with_identities(settings)
        key = run_key(asdict(settings))
        folder = Path(settings.output_dir) / settings.study / key
        path = record_path(settings.results_dir, settings.study, key)
        outcome = _attempt(settings, folder, path, label, deadline)
    except OutOfTime:
        outcome = Outcome("postponed", label, key, "the time is over; the same command goes on with it")
    except Exception as error:
        message = one_line(error)
        if folder is not None:
            message = _logged(error, folder / "error.log", clock)
        outcome = Outcome("failed", label or _named(config), key, message)
    return replace(outcome, seconds=time.perf_counter() - started)


def _attempt(settings: Run, folder: Path, path: Path, label: str, deadline: float | None) -> Outcome:
    """Do a run unless it has been done or is being done."""
    if skipped := _finished(settings, path, label):
        return skipped
    if not first_process():  # started by a first process that holds the lock
        return Outcome("finished", label, path.stem, "", value=train(settings, folder, path, deadline, git_state()))
    check_writable(path.parent, "results_dir")
    with run_lock(folder) as owner:
        if owner:
            return Outcome("busy", label, path.stem, f"{owner} trains it now")
        # Another process may have finished it between the look above and the lock.
        if skipped := _finished(settings, path, label) or _taken_over(settings, path, label):
            return skipped
        return Outcome(
            "finished", label, path.stem, str(path), value=train(settings, folder, path, deadline, git_state())
        )


def _logged(error: Exception, path: Path, started: float) -> str:
    """Write an error's traceback into a log; returns its message in one line.

    Of several processes of a run one may have failed first, which the others meet as a broken connection: where the log
    has been written since the run started, the message points there.
    """
    message = one_line(error)
    with contextlib.suppress(OSError):
        if path.exists() and path.stat().st_mtime >= started:
            message = f"another process of this run failed, see {path} and above ({message})"
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.write("".join(traceback.format_exception(error)))
    return message


def _named(config: Mapping[str, Any]) -> str:
    """Name a run whose settings make no run."""
    model = config.get("model")
    return str(model.get("name", "run")) if isinstance(model, Mapping) else "run"


def with_identities(settings: Run) -> Run:
    """Let files stand in the settings by what they are, not by where they lie: weights to start from, images.

    Raises BadSetting where one is absent.
    """
    model = dict(settings.model)
    for name in ("weights", "backbone"):
        if file := getattr(settings, name):
            path = Path(file).expanduser()
            if not path.is_file():
                raise BadSetting(f"{name}={file}: there is no such file (looked for {path.absolute()})")
            model[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    data = settings.data
    kind = TASKS[settings.task].datasets.get(data["name"])  # an unknown one is told of when it is built
    if kind is not None and (digest := kind.fingerprint(data)):
        data = {**data, "fingerprint": digest}
    return replace(settings, model=model, data=data)


def _finished(settings: Run, path: Path, label: str) -> Outcome | None:
    """Return the outcome of a run that has a record already, None where it is to be done."""
    if settings.rerun or not path.exists():
        return None
    try:
        record = read_record(path)
    except BadRecord as error:
        aside = set_aside(path)
        log.warning("%s; set aside as %s, the run is done again", error, aside.name)
        return None
    commit = git_state()["commit"]
    message = ""
    if record["commit"] != commit:
        message = f"recorded at commit {_short(record['commit'])}, now {_short(commit)}; rerun=true runs it again"
    return Outcome("skipped", label, path.stem, message, value=reached(record))


def _taken_over(settings: Run, path: Path, label: str) -> Outcome | None:
    """With `reuse`, take the record of the same run from another study; None where there is none."""
    if settings.rerun or not settings.reuse:
        return None
    for other in sorted(Path(settings.results_dir).glob(f"*/records/{path.name}")):
        with contextlib.suppress(BadRecord):
            record = read_record(other)
            first = record.get("same_run_as", record["study"])
            write_record(path, {**record, "study": settings.study, "sweep": settings.sweep, "same_run_as": first})
            message = f"its record is that of the same run in {first}"
            return Outcome("skipped", label, path.stem, message, value=reached(record))
    return None


def _short(commit: str | None) -> str:
    return commit[:9] if commit else "unknown"
