"""Run an ablation: every run of a sweep is trained, merged, evaluated before and after, and recorded.

    python experiments/ablate.py +sweep=locality                    # Table 5, CIFAR-100 half: the full recipe
    python experiments/ablate.py +sweep=locality seed=0,1,2         # three seeds
    python experiments/ablate.py +sweep=demo                        # minutes on two cores, nothing to download
    python experiments/ablate.py model=resmlp12_cifar               # one run

Finished runs are skipped, half-finished runs go on from their last checkpoint, and the exit status is 1 where a run
failed. Relative paths are anchored at the repository. `python analysis/make_tables.py` shows the results.
"""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig

from repmlp.runs.launch import run_command, run_job


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> float | None:
    return run_job(config)


if __name__ == "__main__":
    run_command(main, Path(__file__).resolve().parents[1])
