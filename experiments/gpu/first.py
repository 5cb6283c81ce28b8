"""Which way of training is fastest: compiled or not, branches by convolutions or as matrices, how many runs at once.

Measured on the project's own command.

    python first.py SECONDS

Every mode of every network is started at once (probe.py) and compiles on its own; when all wait, they are timed one
by one. Then the other sets of branches join in the best mode, which also fills the cache of compiled kernels for the
second call, and two and four runs are timed side by side. The decision is WORK/plan.json, the figures OUT/first.json.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from kit import PLAN, PYTHON, SETTINGS, WORK, Clock, benchmark, last_line, put_json, put_tar, start, stop

EPOCHS = 4  # that one timing runs; 50 steps each
PROBES = WORK / "probes"
EVALUATIONS = 5  # of a row


class Probe:
    """A run that waits between epochs."""

    def __init__(self, model: str, branches: str, mode: str):
        self.name = f"{model} {branches} {mode}"
        self.model, self.branches, self.mode = model, branches, mode
        self.folder = PROBES / f"{model}-{''.join(filter(str.isdigit, branches)) or 'none'}-{mode}"
        self.folder.mkdir(parents=True)
        self.order(1)
        self.started = time.time()
        overrides = [
            f"model={model}",
            f"model.kernels={branches}",
            *SETTINGS["modes"][mode],
            f"study={self.folder.name}",
        ]
        folders = [f"output_dir={PROBES}/outputs", f"results_dir={PROBES}/results"]
        command = [PYTHON, str(Path(__file__).with_name("probe.py")), str(self.folder)]
        self.process = start([*command, *SETTINGS["probe"], *overrides, *folders], self.folder / "log")

    def order(self, epochs: int) -> None:
        partial = self.folder / "order.partial"
        partial.write_text(str(epochs))
        partial.replace(self.folder / "order")

    def epochs(self) -> list[dict[str, float]]:
        path = self.folder / "epochs"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def ready(self) -> bool:
        return len(self.epochs()) >= 2

    def alive(self) -> bool:
        return self.process.poll() is None


def wait_for(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def time_together(probes: list[Probe], seconds: float) -> float | None:
    """Let probes run EPOCHS epochs at the same time; the mean of their seconds a step, None where one did not."""
    before = {probe: len(probe.epochs()) for probe in probes}
    for probe in probes:
        probe.order(before[probe] - 1 + EPOCHS)
    done = wait_for(lambda: all(len(p.epochs()) >= before[p] + EPOCHS or not p.alive() for p in probes), seconds)
    if not done or any(len(p.epochs()) < before[p] + EPOCHS for p in probes):
        return None
    # the first epoch after a pause is left out
    return statistics.mean(e["train"] for p in probes for e in p.epochs()[before[p] + 1 :]) / probe_steps()


def probe_steps() -> int:
    sizes = [o.split("=")[1] for o in SETTINGS["probe"] if o.startswith("data.n_train=")]
    return int(sizes[0]) // 128


def device() -> str:
    """Name the GPU as torch does, where there is one."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or "no GPU"
    return "no GPU"


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "lightning")}


def main(seconds: float) -> None:
    clock = Clock(seconds, "first.log")
    shutil.rmtree(PROBES, ignore_errors=True)
    probes: list[Probe] = []
    facts: dict[str, dict] = {}
    try:
        measure(clock, probes, facts)
    finally:
        for probe in probes:
            stop(probe.process)
        plan = {model: row_seconds(fact) for model, fact in facts.items()}
        PLAN.write_text(json.dumps(plan, indent=1))
        told = {"device": device(), "commit": SETTINGS["commit"], "versions": versions()}
        told |= {"batch": 128, "steps_an_epoch": probe_steps(), "plan": plan, "measured": facts}
        put_json("first.json", told | {"probes": {p.name: p.epochs() for p in probes}})
        put_tar("probes.tar.gz", PROBES, [p.folder / "log" for p in probes])
        for model, each in plan.items():
            clock.say(f"PLAN {model}: {each['mode']}; seconds a row, by rows at once: {each['seconds']}")
    benchmark(clock, spare=2)
    clock.say("first.py ends")


def measure(clock: Clock, probes: list[Probe], facts: dict[str, dict]) -> None:
    both, *others = SETTINGS["branches"]
    probes += [Probe(model, both, mode) for model in SETTINGS["models"] for mode in SETTINGS["timed"]]
    clock.say(f"{len(probes)} probes started")
    wait_for(lambda: all(p.ready() or not p.alive() for p in probes), 0.6 * clock.left())
    # one compiled network of each kind is worth more than a timing side by side
    compiled = [[p for p in probes if p.model == model and p.mode != "eager"] for model in SETTINGS["models"]]
    wait_for(
        lambda: all(any(p.ready() for p in of) or not any(p.alive() for p in of) for of in compiled), 0.6 * clock.left()
    )
    for probe in probes:
        epochs = probe.epochs()
        if probe.ready() and probe.alive():
            begin, first = epochs[0]["time"] - probe.started, epochs[1]["train"]
            clock.say(f"{probe.name}: ready; {begin:.1f} s to the first epoch, which took {first:.1f} s")
        else:
            clock.say(f"{probe.name}: NOT READY, left out: {last_line(probe.folder / 'log')}")
            stop(probe.process)
    for model in SETTINGS["models"]:
        steps = {}
        for probe in probes:
            if probe.model == model and probe.alive() and probe.ready():
                step = time_together([probe], 0.25 * clock.left())
                if step is None:
                    clock.say(f"{probe.name}: did not run: {last_line(probe.folder / 'log')}")
                    stop(probe.process)
                    continue
                steps[probe] = step
                clock.say(f"{probe.name}: {1000 * step:.2f} ms a step, {128 / step:.0f} images/s")
        for probe in steps:
            if probe is not (best := min(steps, key=steps.get)):
                stop(probe.process)
        if steps:
            epochs = best.epochs()
            facts[model] = {
                "mode": best.mode,
                "ms_a_step": {p.mode: 1000 * s for p, s in steps.items()},
                "step": {"1": steps[best]},
                "start": epochs[0]["time"] - best.started,
                "compiling": epochs[1]["train"] + epochs[1]["rest"],
                "rest": statistics.median(e["rest"] for e in epochs[2:]),
                "end": 30.0,  # until it is measured
            }
    together = {model: [p for p in probes if p.model == model and p.alive()] for model in facts}
    for model, fact in facts.items():
        together[model] += [Probe(model, b, fact["mode"]) for b in others[: max(SETTINGS["side_by_side"]) - 1]]
        probes += together[model][1:]
    clock.say(f"{sum(map(len, together.values()))} probes for runs side by side")
    wait_for(lambda: all(p.ready() or not p.alive() for p in probes if p.alive()), 0.75 * clock.left())
    for model, fact in facts.items():
        ready = [p for p in together[model] if p.alive() and p.ready()]
        for n in SETTINGS["side_by_side"]:
            if n <= len(ready) and clock.left() > 10 and (step := time_together(ready[:n], 0.4 * clock.left())):
                fact["step"][str(n)] = step
                clock.say(f"{model}, {n} at once: {1000 * step:.2f} ms a step, {128 * n / step:.0f} images/s in all")
    # to the end: merging, last evaluation, record; also for the cache
    began = time.monotonic()
    for probe in (waiting := [p for p in probes if p.alive() and p.ready()]):
        probe.order(-1)
    ended: dict[str, float] = {}

    def all_ended() -> bool:
        for p in waiting:
            if not p.alive():
                ended.setdefault(p.name, time.monotonic() - began)
        return len(ended) == len(waiting)

    wait_for(all_ended, clock.left() - 4)
    for model, fact in facts.items():
        if together[model] and together[model][0].name in ended:
            fact["end"] = ended[together[model][0].name]
            last = last_line(together[model][0].folder / "log")
            clock.say(f"{model}: {fact['end']:.1f} s from the last epoch to the end; {last}")


def row_seconds(fact: dict) -> dict:
    """Predict the wall time of a row, cold start and all, by how many run at once."""
    step = dict(fact["step"])
    if {"2", "4"} <= step.keys():
        step["3"] = (step["2"] + step["4"]) / 2
    elif "2" not in step:
        step["2"] = 1.6 * step["1"]  # a guess
    fixed = fact["start"] + fact["compiling"] + fact["end"] + EVALUATIONS * 3 * fact["rest"] + 0.03 * SETTINGS["epochs"]
    seconds = {n: round(fixed + SETTINGS["epochs"] * SETTINGS["steps"] * s) for n, s in sorted(step.items())}
    told = {"measured": sorted(fact["step"]), "fixed": round(fixed, 1), "end": round(fact["end"], 1)}
    return {"mode": fact["mode"], "seconds": seconds, **told}


if __name__ == "__main__":
    main(float(sys.argv[1]))
