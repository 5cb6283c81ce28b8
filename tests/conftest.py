"""What several test files need: randomised batch norms, a tiny row's configuration, the command as a user types it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny nets: more threads only wait for each other

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "data=patterns",
    "model=repmlpnet_tiny",
    "recipe=demo",
    "recipe.epochs=2",
    "recipe.warmup_epochs=1",
    "data.n_train=200",
    "data.n_test=100",
    "trainer.accelerator=cpu",
]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randomise_norms(model: nn.Module) -> nn.Module:
    """Give every batch norm statistics and affine values far from their initial ones."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3.0)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


def compose_config(*overrides: str) -> dict:
    """Compose the configuration of a single run as `ablate.py` would, as a plain dictionary."""
    with initialize_config_dir(str(ROOT / "experiments/conf"), version_base="1.3"):
        config = compose("config", overrides=list(overrides))
    return OmegaConf.to_container(config, resolve=True)


def tiny_config(folder: Path, *overrides: str) -> dict:
    """Compose a run of seconds that writes below `folder`."""
    return compose_config(*TINY, f"results_dir={folder}/results", f"output_dir={folder}/outputs", *overrides)


def command(*arguments: str, check: bool = False, **kwargs) -> subprocess.CompletedProcess:
    """Run a script of the project with this Python, from another folder than the repository's."""
    environment = {k: v for k, v in os.environ.items() if k not in ("REPMLP_DATA", "REPMLP_LAUNCH")}
    return subprocess.run(
        [sys.executable, str(ROOT / arguments[0]), *arguments[1:]],
        capture_output=True,
        text=True,
        check=check,
        cwd=kwargs.pop("cwd", "/"),
        env={**environment, **kwargs.pop("env", {})},
        timeout=280,
        **kwargs,
    )
