"""Work down the queue: whole rows, the most valuable first, as many side by side as gets most of them done in time.

    python second.py SECONDS

Each row is its own `python experiments/ablate.py`. A row starts only if its predicted time fits into what is left; of
rows that all would be late, the last one is given up for the others. A row that fails is tried once more in a simpler
mode. What is finished goes to OUT at once, so that nothing is lost however this ends.

Two things may be said by what the first call showed: MODE=eager (a mode for all rows, where the quickest is not to be
trusted) and LEAVE_OUT='resmlp12_cifar' (a regular expression: rows whose names it matches are left).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

from kit import (
    KIT,
    PART,
    PLAN,
    PROJECT,
    PYTHON,
    SETTINGS,
    WORK,
    Clock,
    benchmark,
    last_line,
    put,
    put_tar,
    start,
    stop,
)  # fmt: skip

PATIENCE = 20.0  # seconds from giving up a row to the next
UNMEASURED = {"mode": "eager", "seconds": {"1": 200, "2": 250}}  # where nothing can tell
LOGS, KEPT = WORK / "rows", WORK / "kept"
RESULTS, OUTPUTS = PROJECT / "results", PROJECT / "outputs"
MODE, LEAVE_OUT = os.environ.get("MODE"), os.environ.get("LEAVE_OUT")


class Row:
    """A row of the queue, and the process that trains it."""

    def __init__(self, settings: dict):
        self.key, self.name, self.model, self.study = (settings[k] for k in ("key", "name", "model", "study"))
        self.overrides, self.keep, self.epochs = settings["overrides"], settings.get("keep"), settings["epochs"]
        self.plan = plan(self.model, settings.get("guess"))
        self.mode = self.plan["mode"]
        self.kind = f"{self.study} {self.model}"  # rows that take the same time
        self.log = LOGS / f"{self.key}.log"
        self.record = RESULTS / self.study / "records" / f"{self.key}.json"
        self.state, self.tries, self.seconds, self.process = "waiting", 0, 0.0, None
        self.progress: list[tuple[float, int]] = []  # (time, epochs done)
        self.look()  # at the log of an earlier call, which cut the row off: it goes on from its last checkpoint
        done = self.progress[-1][1] / self.epochs if self.progress else 0.0
        self.share = max(0.1, 1 - done)  # of the whole row's time; its start and its end take time in any case

    def start(self) -> None:
        self.state, self.began, self.progress = "running", time.monotonic(), []
        self.tries += 1
        self.log.unlink(missing_ok=True)
        more = [f"data.root={WORK}/cifar", *SETTINGS["modes"][self.mode]]
        self.process = start([PYTHON, "experiments/ablate.py", *self.overrides, *more], self.log)

    def look(self) -> None:
        """Read off the log how many epochs are done."""
        done = re.findall(r"epoch (\d+)/", self.log.read_text(errors="replace")) if self.log.exists() else []
        if done and (not self.progress or int(done[-1]) > self.progress[-1][1]):
            self.progress.append((time.monotonic(), int(done[-1])))

    def to_go(self) -> float | None:
        """Return the seconds that the rest takes at the present pace; None where that cannot be told yet."""
        recent = self.progress[-10:]
        if len(recent) < 5:
            return None
        (t0, e0), (t1, e1) = recent[0], recent[-1]
        rest = (self.epochs - e1) * (t1 - t0) / (e1 - e0) - (time.monotonic() - t1)
        return max(0.0, rest)  # past its time: about to end

    def __str__(self) -> str:
        return f"{self.name} {self.progress[-1][1] if self.progress else 0}/{self.epochs}"


def plan(model: str, guess: dict[str, float] | None) -> dict:
    """Return mode and seconds of a row; `guess`: the seconds of one whose network the first call does not time.

    As the first call measured it, or else as it was measured before the kit was packed.
    """
    plans = dict(SETTINGS["plans"])
    with contextlib.suppress(OSError, ValueError):
        plans |= json.loads(PLAN.read_text())
    if guess:
        # A short row does not earn what compiling takes; the step captured as a graph it does.
        captured = any(each["mode"].startswith("captured") for each in plans.values())
        found = {"mode": "captured" if captured else "eager", "seconds": guess}
    else:
        found = plans.get(model, UNMEASURED)
    return found | {"mode": MODE or found["mode"]}


def side_by_side(plan: dict, left: float, factor: float) -> tuple[int, float]:
    """Return how many rows at once get most of them done in what is left, and a row's seconds then; 0 for none."""
    offers = [(int(n), 1.05 * factor * seconds) for n, seconds in plan["seconds"].items()]
    n, seconds = max(offers, key=lambda o: (left // o[1] * o[0], o[0] / o[1]))
    return (n, seconds) if seconds <= left else (0, seconds)


class Queue:
    """All rows, what runs, what is finished, and what of it lies in OUT."""

    def __init__(self, clock: Clock):
        self.clock = clock
        asked = [row for row in SETTINGS["rows"] if not (LEAVE_OUT and re.search(LEAVE_OUT, row["name"]))]
        self.rows = [Row(each) for each in asked]
        self.factor: dict[str, float] = {}  # measured over predicted, by kind of row
        self.keeping: list[subprocess.Popen] = []
        self.given_up, self.hold = 0.0, False  # when a row was given up last; whether none is to be started
        LOGS.mkdir(parents=True, exist_ok=True)
        for row in self.rows:
            if row.record.exists():  # of an earlier call that was cut off
                row.state = "finished"
                self.keep(row)

    def keep(self, row: Row) -> None:
        """Have the weights of a row and its heatmaps put aside, where it is one of those."""
        if row.keep and not (KEPT / row.key).exists():
            command = [PYTHON, str(KIT / "keep.py"), row.key, str(OUTPUTS / row.study), str(KEPT)]
            self.keeping.append(start(command, LOGS / f"{row.key}.keep.log"))

    def of(self, *states: str) -> list[Row]:
        return [row for row in self.rows if row.state in states]

    def start_what_fits(self) -> None:
        left = self.clock.left() - 5
        for row in self.of("waiting") if not (self.hold and self.of("running")) else ():
            factor = self.factor.get(row.kind, 1.0)
            n, seconds = side_by_side(row.plan, left, factor * row.share)
            if len(self.of("running")) < n:
                self.clock.say(f"start {row.name}, {row.mode}; about {seconds:.0f} s, {n} at once")
                row.predicted = seconds / 1.05 / factor
                row.start()

    def see_what_ended(self) -> None:
        for row in self.of("running"):
            row.look()
            if row.process.poll() is None:
                continue
            row.seconds = time.monotonic() - row.began
            if row.record.exists():
                row.state, self.hold = "finished", False
                self.factor[row.kind] = min(3.0, max(0.3, row.seconds / row.predicted))
                self.clock.say(f"FINISHED {row.name} in {row.seconds:.0f} s, {row.predicted:.0f} were predicted")
                self.keep(row)
            elif row.tries < 2 and row.mode != "eager":
                self.clock.say(f"FAILED {row.name}, {row.mode}: {last_line(row.log)}; once more")
                row.log.replace(row.log.with_suffix(".failed"))
                row.state, row.mode = "waiting", "eager" if row.mode == "compiled" else "compiled"
            else:
                row.state = "failed"
                self.clock.say(f"FAILED {row.name}, {row.mode}: {last_line(row.log)}")
            self.bring()

    def give_up_what_is_late(self) -> None:
        """Stop the row with most to go for the others' sake, where none would be ready in time, or one never."""
        running = self.of("running")
        to_go = {row: row.to_go() for row in running}
        if not running or None in to_go.values() or time.monotonic() - self.given_up < PATIENCE:
            return
        left = self.clock.left() - max(row.plan.get("end", 0) for row in running) - 5
        last = [row for row in running if to_go[row] >= 0.9 * max(to_go.values())][-1]  # of those, the least valuable
        # alone it would be faster, at most as many times as there are rows
        if to_go[last] / len(running) > left or (len(running) > 1 and min(to_go.values()) > left):
            self.clock.say(f"GIVEN UP {last}: {to_go[last]:.0f} s to go; no new row before one is finished")
            stop(last.process)
            last.state, self.given_up, self.hold = "given up", time.monotonic(), True

    def bring(self) -> None:
        """Copy to OUT what there is by now: at most eight files of 16 MiB."""
        rows = [{k: getattr(row, k) for k in ("key", "name", "state", "mode", "seconds")} for row in self.rows]
        (LOGS / "second.json").write_text(json.dumps({"seconds": self.clock.now(), "rows": rows}, indent=1) + "\n")
        records = [row.record for row in self.of("finished") if row.record.exists()]
        if records:
            put_tar("records.tar", RESULTS, records)
        put_tar("logs.tar.gz", WORK, [*LOGS.glob("*"), *OUTPUTS.glob("*/*/error.log")])
        if (KEPT / "pictures").exists():
            put_tar("pictures.tar", KEPT / "pictures", sorted((KEPT / "pictures").glob("*.p*")))
        if weights := sorted(KEPT.glob("*/*.safetensors")):
            whole = WORK / "weights.tar"
            subprocess.run(["tar", "-cf", whole, "-C", KEPT, *(w.relative_to(KEPT) for w in weights)], check=True)
            with open(whole, "rb") as file:
                for number, part in enumerate(iter(lambda: file.read(PART), b"")):
                    piece = WORK / f"weights.tar.{number}"
                    piece.write_bytes(part)
                    put(piece, piece.name)

    def work(self) -> None:
        said = brought = time.monotonic()
        while True:
            self.see_what_ended()
            if self.clock.left() < 8:
                self.clock.say("time is up")
                return
            self.start_what_fits()
            self.give_up_what_is_late()
            now = time.monotonic()
            if not self.of("running"):
                break
            if now - brought > 60:
                brought = now
                self.bring()
            if now - said > 30:
                said = now
                states = ", ".join(map(str, self.of("running")))
                self.clock.say(f"{states}; {len(self.of('finished'))} finished; {self.clock.left():.0f} s left")
            time.sleep(0.5)
        self.clock.say(f"nothing more fits: {len(self.of('waiting'))} rows wait")
        for process in self.keeping:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(1, self.clock.left() - 8))
        self.bring()
        benchmark(self.clock, spare=8)

    def end(self) -> None:
        for process in [row.process for row in self.of("running")] + self.keeping:
            stop(process)
        for row in self.of("running"):
            row.state = "finished" if row.record.exists() else "cut off"
        self.bring()
        for row in self.rows:
            self.clock.say(f"  {row.key}  {row.name}: {row.state}")


def data(clock: Clock) -> None:
    """Decode what the first call has not decoded, and join it all."""
    parts = WORK / "parts"
    shards = [*sorted((WORK / "shards").glob("*.parquet")), *sorted((WORK / "carried").glob("test-*.parquet"))]
    shards = [each for each in shards if not (parts / f"{each.stem}.raw").exists()]
    for arguments in (["decode", parts, *shards], ["join", parts, WORK / "carried/cifar", WORK / "cifar"]):
        run = subprocess.run([PYTHON, KIT / "cifar.py", *arguments], capture_output=True, text=True, timeout=90)
        clock.say(" ".join((run.stdout + run.stderr).split("\n")).strip())
        if run.returncode:
            sys.exit("error: no data, no rows")


def end_once(*_: object) -> None:
    """End by the first signal alone: a time limit may send it to the process and again to its group."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit("stopped by a signal")


def main(seconds: float) -> None:
    clock = Clock(seconds, "second.log")
    signal.signal(signal.SIGTERM, end_once)
    queue = Queue(clock)
    try:
        if not (WORK / "cifar/cifar-100-python/meta").exists():
            data(clock)
        queue.work()
    finally:
        queue.end()
        clock.say("second.py ends")


if __name__ == "__main__":
    main(float(sys.argv[1]))
