"""What the commands share: run one row and say how it ended, mistakes in one line, a status at the end."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from repmlp.runs.run import first_process, one_line, row_label, run_row
from repmlp.runs.sweep import note_outcome, outcome_line, progress_line

log = logging.getLogger(__name__)


def run_job(config: DictConfig) -> None:
    """Run one row; Hydra calls this once a row, perhaps in another process."""
    plain = OmegaConf.to_container(config, resolve=True)
    if not first_process():  # one of several devices of a row: the first process tells what there is to tell
        outcome = run_row(plain)
        sys.exit(f"{outcome.label}: {outcome.message}" if outcome.state == "failed" else 0)
    hydra_config = HydraConfig.get()
    swept = hydra_config.mode == RunMode.MULTIRUN
    if swept and plain["trainer"]["devices"] != 1:
        sys.exit(
            "error: a sweep trains each row on one device: leave trainer.devices=1, or run the row by itself, "
            "without -m and +sweep, e.g. with experiments/train.py and the sweep's study=NAME"
        )
    folder = Path(hydra_config.sweep.dir if swept else hydra_config.run.dir)
    number = hydra_config.job.num if swept else 0
    log.info(progress_line(folder, number, row_label(plain)))
    outcome = run_row(plain)
    note_outcome(folder, number, outcome)
    log.log(logging.ERROR if outcome.state == "failed" else logging.INFO, outcome_line(outcome, number))


def device_of(name: str) -> torch.device:
    """Return the device that a setting names: "cpu", "cuda", or "auto" for a GPU where there is one.

    Raises ValueError for another name, and for a GPU that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r}: use cpu, cuda or auto")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': torch finds no GPU here; use cpu")
    return torch.device(name)


@contextlib.contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """End the program with one line for what a user can mend. Inside Hydra's main: outside, Hydra adds a line."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.exit(f"error: {one_line(error)}")


def run_command(main: Callable[[], None], repository: Path) -> None:
    """Run a Hydra main with the repository as its folder; Hydra's errors come out as one line."""
    os.chdir(repository)
    os.environ.setdefault("REPMLP_LAUNCH", f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{os.getpid()}")
    wanted_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come out as they are raised, and are told below
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        if wanted_traceback:
            raise
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        if first_process():
            print("interrupted: the same command goes on from here", file=sys.stderr)
        sys.exit(130)
