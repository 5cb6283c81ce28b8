"""Train UperNet or PSPNet on CamVid or Cityscapes with any timm network as its backbone, RepMLPNet's and RepMLP's too.

    python experiments/segment.py data.root=FOLDER                                       # CamVid, a slim RepMLPNet
    python experiments/segment.py +sweep=segmentation_small data.root=FOLDER             # conv3, conv5 and a ResNet
    python experiments/segment.py +sweep=small/pspnet data.root=FOLDER                   # PSPNet, ResNet and RepMLP
    python experiments/segment.py data=cityscapes recipe=segmentation model=upernet_d256 backbone=RepMLPNet-D256.pth \\
        data.root=FOLDER trainer.precision=bf16-mixed                                    # Table 6, run by run
    python experiments/segment.py data=cityscapes recipe=segmentation model=upernet_resnet101 data.root=FOLDER

Everything else is as in experiments/ablate.py: a record in results/, the same command goes on after an interruption.
experiments/borders.py says how good the result is at the borders of tiles.
"""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig

from repmlp.runs.launch import run_command, run_job


@hydra.main(version_base="1.3", config_path="conf", config_name="segment")
def main(config: DictConfig) -> float | None:
    return run_job(config)


if __name__ == "__main__":
    run_command(main, Path(__file__).resolve().parents[1])
