"""The one runner of all benchmarks: things are timed in turn, and what was found is recorded and said."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from repmlp.runs.key import config_key
from repmlp.runs.provenance import device_name, git_state, processor, versions
from repmlp.runs.record import write_json

from .memory import peak_memory
from .settings import DTYPES

MATMUL_SIDE = 2048
MATMUL_FLOP = 2 * MATMUL_SIDE**3
# what a record's key is made of: everything that says what was measured and where
KEY = (
    *("kind", "model", "form", "img_size", "size", "batch_size", "engine", "device", "threads", "dtype"),
    *("of", "kernels", "freed_memory"),
)


class Case(NamedTuple):
    """A thing that is timed.

    label: how its line of output begins. fact: what its record says of it before anything was measured; what it says
    of the setting (dtype) goes before what was asked for. run: does it once.
    """

    label: str
    fact: Mapping[str, Any]
    run: Callable[[], Any]


class Bench:
    """Where things run and how they are timed, and the writing of records."""

    def __init__(self, options: Mapping[str, Any]):
        cuda = options["device"] == "cuda" or (options["device"] == "auto" and torch.cuda.is_available())
        self.device = torch.device("cuda" if cuda else "cpu")
        if options["threads"]:
            torch.set_num_threads(options["threads"])
        self.dtype, self.rounds, self.warmup = DTYPES[options["dtype"]], options["rounds"], options["warmup"]
        self.folder = Path(options["results_dir"]) / "benchmark" / "measured"
        packages = ("torch", "timm", *(e for e in ("onnxruntime", "openvino") if e == options["engine"]))
        self.common = {
            "device": device_name(self.device),
            "processor": processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "dtype": options["dtype"],
            "versions": versions(packages),
            **git_state(),
        }
        self.run = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())  # ratios are taken within one run

    def measure(
        self,
        kind: str,
        title: str,
        cases: Sequence[Case],
        batch_size: int | None = None,
        beside_matmul: bool = False,
        memory: bool = True,
        kernels: bool = False,
    ) -> list[dict[str, Any]]:
        """Time all cases in turn, write a record of each and print its line; returns the records.

        batch_size: images of a run, for images a second. beside_matmul: take the machine's matrix product into the
        rounds and tell the share of its rate; the facts then hold `macs`, of one image. memory: measure the peak, less
        `result_bytes` where the facts have them. kernels: count what a run starts on a GPU.
        """
        runs: dict[Any, Callable[[], Any]] = {"matmul": matmul(self)} if beside_matmul else {}
        runs |= dict(enumerate(case.run for case in cases))
        print(f"{title}, {self.rounds} rounds", flush=True)
        seconds = self.in_turn(runs)
        records = []
        for number, case in enumerate(cases):
            found: dict[str, Any] = {}
            typical = middle(seconds[number])
            if batch_size is not None:
                found |= {"batch_size": batch_size, "images_per_second": batch_size / typical}
            if beside_matmul:
                peak = MATMUL_FLOP / middle(seconds["matmul"])
                share = 2 * case.fact["macs"] * (batch_size or 1) / typical / peak
                found |= {"share_of_matmul_peak": share, "matmul_flops": peak}
            if memory:
                size = peak_memory(case.run, self.device)
                more = None if size is None else max(0, size - case.fact.get("result_bytes", 0))
                found["peak_memory_bytes"] = more
            if kernels:
                found["kernels_started"] = self.kernels_started(case.run)
            records.append(self.write(kind, {**case.fact, **found}, seconds[number]))
            print(f"  {case.label} {line(records[-1])}", flush=True)
        return records

    def in_turn(
        self, runs: Mapping[Any, Callable[[], Any]], clock: Callable[[], float] = time.perf_counter
    ) -> dict[Any, Tensor]:
        """Time every run once a round; returns the seconds of the rounds, (rounds,) each, warm-up left out."""
        taken: dict[Any, list[float]] = {key: [] for key in runs}
        for _ in range(self.warmup + self.rounds):
            for key, run in runs.items():
                taken[key].append(self._seconds(run, clock))
        return {key: torch.tensor(times[self.warmup :], dtype=torch.float64) for key, times in taken.items()}

    def _seconds(self, run: Callable[[], Any], clock: Callable[[], float]) -> float:
        self._wait()
        start = clock()
        run()
        self._wait()
        return clock() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def kernels_started(self, run: Callable[[], Any]) -> int | None:
        """Count what a run starts on the GPU, kernels, copies and fills; None on a CPU."""
        if self.device.type != "cuda":
            return None
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watched:
            run()
            self._wait()
        return sum(event.device_type == DeviceType.CUDA for event in watched.events())

    def write(self, kind: str, fact: Mapping[str, Any], seconds: Tensor | None = None) -> dict[str, Any]:
        """Write one record, named by its key, and return it; seconds: of the rounds, (rounds,)."""
        record = {"kind": kind, **self.common, **fact, "run": self.run, "rounds": self.rounds}
        if seconds is not None:
            record |= {"seconds": middle(seconds), "seconds_quartiles": quartiles(seconds)}
        write_json(self.folder / f"{record_key(record)}.json", record)
        return record


def record_key(record: Mapping[str, Any]) -> str:
    """Return the key of a record, which is its file's name."""
    return config_key({name: record[name] for name in KEY if name in record})


def middle(seconds: Tensor) -> float:
    """Return the median."""
    return float(seconds.quantile(0.5))


def quartiles(seconds: Tensor) -> list[float]:
    """Return the lower and the upper one."""
    return seconds.quantile(torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist()


def matmul(bench: Bench) -> Callable[[], Any]:
    """A square matrix product: what the machine can do at this moment."""
    a, b = (torch.randn(MATMUL_SIDE, MATMUL_SIDE, device=bench.device, dtype=bench.dtype) for _ in range(2))
    return partial(torch.mm, a, b)


def line(record: Mapping[str, Any]) -> str:
    """Write a record's times, and what it says of images a second and memory."""
    low, high = (1000 * s for s in record["seconds_quartiles"])
    text = f"{1000 * record['seconds']:9.2f} ms ({low:.2f} to {high:.2f})"
    if "images_per_second" in record:
        text += f", {record['images_per_second']:8.1f} images/s"
    elif record.get("peak_memory_bytes") is not None:
        text += f", {record['peak_memory_bytes'] / 2**20:.1f} MiB more at the peak"
    if "share_of_matmul_peak" in record:
        text += f", {100 * record['share_of_matmul_peak']:3.0f} % of the matrix product's rate"
    return text
