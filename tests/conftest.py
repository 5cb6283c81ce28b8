"""What several test files need: randomised batch norms, a tiny row's configuration, the command as a user types it."""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny nets: more threads only wait for each other

import hypothesis
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from repmlp.runs.launch import register_settings

register_settings()
hypothesis.settings.register_profile("busy", deadline=None)  # how long an example takes is the machine's matter
hypothesis.settings.load_profile("busy")
ROOT = Path(__file__).resolve().parents[1]
LIMIT = 800  # seconds a command may take: minutes of patience for a machine that does other work
TINY = [
    "data=patterns",
    "model=repmlpnet_tiny",
    "recipe=demo",
    "recipe.epochs=2",
    "recipe.warmup_epochs=1",
    "data.n_train=200",
    "data.n_test=100",
    "trainer.accelerator=cpu",
    "trainer.checkpoint_every=1",
]
TINY_UPERNET = {
    "name": "tiny",
    "arch": "upernet",
    "encoder": "repmlpnet_t224",
    "img_size": 32,
    "kernels": [1, 3],
    "embed_kernel": 3,
    "decoder_channels": 16,
    "auxiliary_channels": 8,
    "arguments": {"channels": [8, 16, 32, 64], "blocks": [1, 1, 1, 1], "share_sets": [1, 2, 4, 8]},
}


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


def write_camvid(root: Path, train: int = 6, test: int = 4, size: tuple[int, int] = (48, 64)) -> Path:
    """Write noise images of (height, width) with squares of 11 classes and void, in CamVid's layout; returns root."""
    generator = np.random.default_rng(0)
    squares = (np.arange(size[0])[:, None] // 8 + 3 * (np.arange(size[1]) // 8)) % 12
    for split, number in (("train", train), ("test", test)):
        for folder in (split, f"{split}annot"):
            (root / "CamVid" / folder).mkdir(parents=True)
        for i in range(number):
            noise = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(noise).save(root / f"CamVid/{split}/a{i}.png")
            Image.fromarray(((squares + i) % 12).astype(np.uint8)).save(root / f"CamVid/{split}annot/a{i}.png")
    return root


def compose_config(*overrides: str, name: str = "config") -> dict:
    """Compose the configuration of a single run as `ablate.py` would, as a plain dictionary; name: of the command."""
    with initialize_config_dir(str(ROOT / "experiments/conf"), version_base="1.3"):
        config = compose(name, overrides=list(overrides))
    return OmegaConf.to_container(config, resolve=True)


def tiny_config(folder: Path, *overrides: str) -> dict:
    """Compose a run of seconds that writes below `folder`."""
    return compose_config(*TINY, f"results_dir={folder}/results", f"output_dir={folder}/outputs", *overrides)


class Preloaded:
    """The process whose forks are the commands (preloaded.py); started with the first of them, ended with the tests."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp())
        self.process = subprocess.Popen([sys.executable, str(ROOT / "tests/preloaded.py"), str(self.folder / "socket")])
        atexit.register(self.end)
        while not (self.folder / "socket").exists():
            assert self.process.poll() is None, "tests/preloaded.py ended"
            time.sleep(0.05)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(self, arguments: list[str], cwd: str, env: dict[str, str]) -> subprocess.CompletedProcess:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            request = {"arguments": arguments, "cwd": cwd, "env": env, "stdout": str(out), "stderr": str(err)}
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(LIMIT)
                connection.connect(str(self.folder / "socket"))
                connection.sendall(json.dumps(request).encode() + b"\n")
                answer = connection.makefile().readline()
            return subprocess.CompletedProcess(arguments, int(answer), out.read_text(), err.read_text())


@functools.cache
def preloaded() -> Preloaded:
    return Preloaded()


def command(*arguments: str, check: bool = False, fresh: bool = False, **kwargs) -> subprocess.CompletedProcess:
    """Run a script of the project with this Python, from another folder than the repository's.

    fresh: in a Python that has imported nothing yet, as a user's has; slow. Without it, the script runs in a fork of
    a process that has imported torch and the others.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("REPMLP_DATA", "REPMLP_LAUNCH")}
    environment |= kwargs.pop("env", {})
    script, cwd = str(ROOT / arguments[0]), str(kwargs.pop("cwd", "/"))
    read_at_start = {name for name in environment if name.startswith(("OMP_", "PYTHON", "LD_"))}
    # these start processes themselves, which wants a Python that is no fork
    fresh |= any(word in text for text in arguments for word in ("launcher=", "devices=2"))
    if fresh or kwargs or sys.platform != "linux" or any(environment[n] != os.environ.get(n) for n in read_at_start):
        return subprocess.run(
            [sys.executable, script, *arguments[1:]],
            capture_output=True,
            text=True,
            check=check,
            cwd=cwd,
            env=environment,
            timeout=LIMIT,
            **kwargs,
        )
    done = preloaded().run([script, *arguments[1:]], cwd, environment)
    if check:
        done.check_returncode()
    return done
