"""The kit for a short loan of a GPU: in step with the project's names, its rows the sweep's own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from repmlp.runs import fit
from repmlp.runs.settings import run_of

ROOT = Path(__file__).parents[1]
KIT = ROOT / "experiments/gpu"


@pytest.fixture
def kit(monkeypatch, tmp_path):
    """Import modules of the kit as its scripts do, with the settings that pack.sh would have made."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(KIT))
    monkeypatch.setenv("OUT", str(tmp_path))
    yield lambda name: __import__(name)
    for path in KIT.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("script", sorted(path.name for path in KIT.glob("*.sh")))
def test_scripts_are_shell(script):
    subprocess.run(["bash", "-n", KIT / script], check=True)


def test_runs_of_the_queue_are_the_sweeps_and_others_are_refused(kit, tmp_path, monkeypatch):
    rows, queue = kit("rows"), tmp_path / "queue.txt"
    asked = rows.asked(KIT / "queue.txt")
    lines = [line for line, sweep in asked if sweep == rows.SWEEP]
    assert len(set(asked)) == len(asked) and len(lines) == len(rows.sweep()) == 24
    monkeypatch.setattr(rows, "record_path", lambda *_: tmp_path / "none")  # as if no row had its record yet
    queue.write_text(f"{lines[0]}\n{lines[-1]}\n")
    rows.pack(queue, tmp_path / "kit.json")
    packed = json.loads((tmp_path / "kit.json").read_text())
    assert {row["key"] for row in packed["rows"]} <= set(rows.sweep())
    assert (packed["epochs"], packed["steps"], packed["models"]) == (100, 390, rows.MODELS)
    queue.write_text("repmlpnet_cifar [5] 0\n")
    with pytest.raises(SystemExit, match=r"repmlpnet_cifar \[5\] 0' is no row of \+sweep=locality"):
        rows.pack(queue, tmp_path / "kit.json")


def test_a_queue_takes_rows_of_other_sweeps_with_their_own_study_and_length(kit, tmp_path, monkeypatch):
    rows, queue = kit("rows"), tmp_path / "queue.txt"
    monkeypatch.setattr(rows, "record_path", lambda *_: tmp_path / "none")
    queue.write_text("repmlpnet_small [1,3] 0 sweep=small/more_data\nrepmlpnet_cifar [1,3] 0\n")
    rows.pack(queue, tmp_path / "kit.json")
    packed = json.loads((tmp_path / "kit.json").read_text())
    short, whole = packed["rows"]
    assert short["key"] in rows.sweep("small/more_data") and short["study"] == "small_more_data_cifar100"
    assert (short["epochs"], short["steps"]) == (25, 390) and "trainer.eval_every=20" not in short["overrides"]
    assert whole["study"] == rows.STUDY and "guess" in short and "guess" not in whole
    assert (packed["epochs"], packed["models"]) == (100, ["repmlpnet_cifar"])  # what the first call times
    queue.write_text("repmlpnet_small [3] 0 sweep=small/more_data\n")
    with pytest.raises(SystemExit, match=r"is no row of \+sweep=small/more_data"):
        rows.pack(queue, tmp_path / "kit.json")


def test_modes_are_settings_that_change_no_key(kit, monkeypatch):
    for rehearsal in ("", "1"):
        monkeypatch.setenv("GPU_REHEARSAL", rehearsal)
        rows = kit("rows")
        plain = rows.composed(["+sweep=locality"])
        assert len(rows.MODES) > 2 and rows.MODES["eager"] == []
        for overrides in rows.MODES.values():
            config = rows.composed(["+sweep=locality", *overrides])
            settings = run_of(config)
            assert rows.run_key(config) == rows.run_key(plain)
            assert overrides == [] or settings.trainer != run_of(plain).trainer
        sys.modules.pop("rows")


def test_every_mode_has_its_words_in_the_table_of_steps(kit, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "analysis"))
    assert list(__import__("step_tables").WAYS) == list(kit("rows").MODES)


def test_a_probe_stands_where_runs_keep_their_history(kit):
    assert issubclass(kit("probe").Ordered, fit.History)
    assert "History(" in Path(fit.__file__).read_text()  # the name that the probe takes the place of


@pytest.fixture
def second(kit, tmp_path, monkeypatch):
    """Return second.py as it lies beside its kit.json on the other machine, with two rows that run."""
    folder = tmp_path / "kit"
    shutil.copytree(KIT, folder)
    row = {"key": "a", "name": "net [] seed 0", "model": "net", "study": "s", "overrides": [], "epochs": 100}
    plans = {"net": {"mode": "eager", "end": 10, "seconds": {"1": 100, "2": 150}}}
    (folder / "kit.json").write_text(json.dumps({"rows": [row, row | {"key": "b"}], "plans": plans, "modes": {}}))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("GPU_WORK", str(tmp_path / "work"))
    (tmp_path / "work" / "rows").mkdir(parents=True)
    yield lambda: __import__("second")
    for name in ("second", "kit"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("since_the_last_epoch", [(6.0, 4.0), (6.0, 0.5)])
def test_rows_past_their_time_are_about_to_end_and_none_is_given_up(second, since_the_last_epoch):
    module = second()
    queue = module.Queue(module.Clock(100, "log"))
    now = time.monotonic()
    for row, seconds in zip(queue.rows, since_the_last_epoch, strict=True):
        row.state = "running"
        row.progress = [
            (now - seconds - (99 - epoch), epoch) for epoch in range(90, 100)
        ]  # a second an epoch, one to go
        assert row.to_go() == pytest.approx(max(0, 1 - seconds), abs=0.2)
    queue.give_up_what_is_late()
    assert [row.state for row in queue.rows] == ["running", "running"]


def test_a_row_that_was_cut_off_needs_what_is_left_of_it(second, tmp_path):
    log = tmp_path / "work/rows/a.log"
    log.write_text("12:00:00 epoch 99/100: loss 1\n12:00:01 epoch 100/100: loss 1\n")
    module = second()
    assert module.Queue(module.Clock(100, "log")).rows[0].share == 0.1  # it was cut off before its record
    log.write_text("12:00:00 epoch 74/100: loss 1\n12:00:01 epoch 75/100: loss 1\n")
    rows = module.Queue(module.Clock(100, "log")).rows
    assert [row.share for row in rows] == [0.25, 1.0]
    assert module.side_by_side(rows[0].plan, 60, rows[0].share)[0] > 0 == module.side_by_side(rows[1].plan, 60, 1.0)[0]
