"""What the commands share: do one run and say how it ended, mistakes in one line, a status at the end."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from repmlp.runs.command_line import does_runs, message_of, place, place_files, quote_file_names, quote_names, refused
from repmlp.runs.outcome import Outcome, first_process, one_line, run_label
from repmlp.runs.settings import BadSetting, Recipe, Run, SegmentationRecipe, run_of
from repmlp.runs.sweep import (
    deadline_of,
    differing,
    ended_without_a_word,
    enough_time,
    note_outcome,
    outcome_line,
    plan_of,
    progress_line,
    summary_so_far,
)

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def register_settings() -> None:
    """Give Hydra the settings of a run, so that their defaults are composed and anything else is refused."""
    store = ConfigStore.instance()
    store.store(name="run", node=Run)
    store.store(group="recipe", name="settings", node=Recipe)
    store.store(group="recipe", name="segmentation_settings", node=SegmentationRecipe)
    OmegaConf.register_new_resolver("folder_name", lambda path: Path(path).name, replace=True)


register_settings()


def run_job(config: DictConfig) -> float | None:
    """Do one run; Hydra calls this once a run, perhaps in another process.

    Returns what the run reached in percent (top-1 or mIoU of the images that it is evaluated on), for a sweeper that
    searches; None where it reached nothing.
    """
    plain = OmegaConf.to_container(config, resolve=True)
    if not first_process():  # one of several devices of a run: the first process tells what there is to tell
        outcome = execute(plain)
        sys.exit(f"{outcome.label}: {outcome.message}" if outcome.state == "failed" else 0)
    hydra_config = HydraConfig.get()
    swept = hydra_config.mode == RunMode.MULTIRUN
    if swept and plain["trainer"]["devices"] != 1:
        sys.exit(
            "error: a sweep trains each run on one device: leave trainer.devices=1, or do the run by itself, "
            "without -m and +sweep, e.g. with experiments/train.py and the sweep's study=NAME"
        )
    folder = Path(hydra_config.sweep.dir if swept else hydra_config.run.dir)
    number = hydra_config.job.num if swept else 0
    label = ", ".join([run_label(plain), *differing(plan_of(folder), list(hydra_config.overrides.task), number)])
    minutes = plain["trainer"]["minutes"]
    deadline = deadline_of(folder, minutes) if minutes and minutes > 0 else None  # the run refuses what is no limit
    if enough_time(folder, deadline):
        log.info(progress_line(folder, number, label))
        outcome = execute(plain, label, deadline)
    else:
        outcome = Outcome(
            "postponed", label, "", "it cannot end in the time left; the same command does it another time"
        )
    note_outcome(folder, number, outcome)
    log.log(logging.ERROR if outcome.state == "failed" else logging.INFO, outcome_line(outcome, number))
    return outcome.value


def execute(config: dict[str, Any], label: str | None = None, deadline: float | None = None) -> Outcome:
    """Do a run, see run.execute; what it takes, torch and Lightning, is imported once its settings are right."""
    try:
        run_of(config)
    except BadSetting as error:
        return Outcome("failed", label or run_label(config), "", str(error))
    from repmlp.runs import run

    return run.execute(config, label, deadline)


def checkpoint_of(config: Mapping[str, Any]) -> Path:
    """Return where the checkpoint of a command lies, looked for before torch is imported.

    Raises ValueError where none is named, FileNotFoundError where there is none.
    """
    if not config["checkpoint"]:
        raise ValueError("which checkpoint? pass checkpoint=FILE")
    path = place(config["checkpoint"])
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    return path


def device_of(name: str) -> torch.device:
    """Return the device that a setting names: "cpu", "cuda", or "auto" for a GPU where there is one.

    Raises ValueError for another name, and for a GPU that is not there.
    """
    import torch  # here, so that a command says its help without it

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


def quicken_help() -> None:
    """Let Hydra list its groups without a copy of all stored settings for each: 2 of the 2.5 s that --help took.

    What is loaded from the store is copied on its way out as ever.
    """
    store = ConfigStore.instance()
    store.__deepcopy__ = lambda memo: store  # of this one object


def run_command(main: Callable[[], None], repository: Path) -> None:
    """Run a Hydra main with the repository as its folder; Hydra's errors come out as one line.

    REPMLP_CWD keeps the folder that the user stands in. Threads of torch that have nothing to do sleep, unless the user
    says otherwise (OMP_WAIT_POLICY): by default they spin, which on a machine with other work takes the core from the
    thread that they wait for. It is read when torch is imported, which is later.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("REPMLP_CWD", os.getcwd())  # noqa: PTH109  (a worker process inherits it)
    if data := os.environ.get("REPMLP_DATA"):
        os.environ["REPMLP_DATA"] = str(place(data))
    os.chdir(repository)
    os.environ.setdefault("REPMLP_LAUNCH", f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{os.getpid()}")
    flags = [text for text in sys.argv[1:] if text in ("-m", "--multirun")]  # Hydra takes it at either end alone
    sys.argv[1:] = flags + [text for text in sys.argv[1:] if text not in flags]
    configuration = repository / "experiments/conf"
    groups = [path.name for path in configuration.iterdir() if path.is_dir()]
    sys.argv[1:] = quote_file_names(place_files(quote_names(sys.argv[1:], groups)))
    if {"-h", "--help", "--hydra-help"} & set(sys.argv):
        quicken_help()
    wanted_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come out as they are raised, and are told below
    command = Path(sys.argv[0]).stem.replace("ablate", "config")
    try:
        if mistake := refused(sys.argv[1:], configuration, command):
            sys.exit(f"error: {mistake}")
        main()
    except (HydraException, OmegaConfBaseException) as error:
        if wanted_traceback:
            raise
        sys.exit(f"error: {message_of(error, does_runs(configuration, command))}")
    except Exception as error:
        if wanted_traceback or not ended_without_a_word(error):
            raise
        summary_so_far()
        sys.exit(
            "error: the process of a run was ended from outside (by a time limit, the limit of its memory, a signal): "
            f"the same command goes on from its last checkpoint ({type(error).__name__}: {str(error).splitlines()[0]})"
        )
    except KeyboardInterrupt:
        if first_process():
            print("interrupted: the same command goes on from here", file=sys.stderr)
        sys.exit(130)
