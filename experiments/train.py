"""Train one network on images in folders, by the paper's ImageNet recipe: RepMLPNet or any model of timm.

    python experiments/train.py data.root=FOLDER                                        # RepMLPNet-T224, 1x1 and 3x3
    python experiments/train.py model=repmlpnet_d256 trainer.devices=8 trainer.precision=bf16-mixed
    python experiments/train.py model=timm model.variant=resmlp_12_224 model.kernels=[1,3]    # branches injected
    python experiments/train.py model=timm model.variant=resnext101_32x4d recipe.epochs=120

FOLDER holds train/CLASS/ and val/CLASS/. Everything else is as in experiments/ablate.py: a record in results/, the same
command goes on after an interruption. Expected on ImageNet (100 epochs, 8 GPUs): Table 2 of the paper.
"""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig

from repmlp.runs.launch import run_command, run_job


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> float | None:
    return run_job(config)


if __name__ == "__main__":
    run_command(main, Path(__file__).resolve().parents[1])
