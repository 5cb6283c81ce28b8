"""Run an ablation: every row of a sweep is trained, merged, evaluated before and after, and recorded.

    python experiments/ablate.py +sweep=locality                    # Table 5, CIFAR-100 half: the full recipe
    python experiments/ablate.py +sweep=locality seed=0,1,2         # three seeds
    python experiments/ablate.py +sweep=demo                        # minutes on two cores, nothing to download
    python experiments/ablate.py model=resmlp12_cifar               # one run

Finished rows are skipped, half-finished rows go on from their last checkpoint, and the exit status is 1 where a row
failed. Relative paths are anchored at the repository. `python analysis/make_tables.py` shows the results.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from repmlp.training.rows import row_label, run_row
from repmlp.training.sweep import note_outcome, outcome_line, progress_line

log = logging.getLogger("ablate")


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    """Run one row; Hydra calls this once a row, perhaps in another process."""
    hydra_config = HydraConfig.get()
    swept = hydra_config.mode == RunMode.MULTIRUN
    folder = Path(hydra_config.sweep.dir if swept else hydra_config.run.dir)
    number = hydra_config.job.num if swept else 0
    plain = OmegaConf.to_container(config, resolve=True)
    log.info(progress_line(folder, number, row_label(plain)))
    outcome = run_row(plain)
    note_outcome(folder, number, outcome)
    log.log(logging.ERROR if outcome.state == "failed" else logging.INFO, outcome_line(outcome, number))


def cli() -> None:
    """Give Hydra the repository as its folder and a name for this launch; print its errors as one line."""
    os.chdir(Path(__file__).resolve().parents[1])
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
        print("interrupted: the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    cli()
