"""What several test files need: randomised batch norms, a tiny row's configuration, the command as a user types it."""

from __future__ import annotations

import copy
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny nets: more threads only wait for each other

import hypothesis
import pytest

# torch, Hydra and the others are imported where they are used: pytest-xdist's own process reads this file, runs no
# tests, and its workers wait for it
if TYPE_CHECKING:
    from torch import nn

hypothesis.settings.register_profile("busy", deadline=None)  # how long an example takes is the machine's matter
hypothesis.settings.load_profile("busy")
ROOT = Path(__file__).resolve().parents[1]
LIMIT = 800  # seconds a command may take: minutes of patience for a machine that does other work
SOCKET = "REPMLP_TESTS_SOCKET"  # where the process that forks commands listens
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
    import torch

    torch.manual_seed(0)


def randomise_norms(model: nn.Module) -> nn.Module:
    """Give every batch norm statistics and affine values far from their initial ones."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 3.0)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


def write_camvid(root: Path, train: int = 6, test: int = 4, size: tuple[int, int] = (48, 64)) -> Path:
    """Write noise images of (height, width) with squares of 11 classes and void, in CamVid's layout; returns root."""
    import numpy as np
    from PIL import Image

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


@functools.cache
def _composed(name: str, overrides: tuple[str, ...]) -> dict:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(ROOT / "experiments/conf"), version_base="1.3"):
        config = compose(name, overrides=list(overrides))
    return OmegaConf.to_container(config, resolve=True)


def compose_config(*overrides: str, name: str = "config") -> dict:
    """Compose the configuration of a single run as `ablate.py` would, as a plain dictionary; name: of the command."""
    return copy.deepcopy(_composed(name, overrides))


def tiny_config(folder: Path, *overrides: str) -> dict:
    """Compose a run of seconds that writes below `folder`."""
    config = compose_config(*TINY, *overrides)
    given = {text.partition("=")[0] for text in overrides}
    folders = {"results_dir": f"{folder}/results", "output_dir": f"{folder}/outputs"}
    return config | {name: path for name, path in folders.items() if name not in given}


def interrupt(config: dict, epoch: int) -> None:
    """Start a run and end it by Ctrl-C at the first step of an epoch, counted from 0."""
    from repmlp.runs.run import execute
    from repmlp.training.history import History

    def stop(self, trainer, module, batch, number):
        if trainer.current_epoch == epoch:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(History, "on_train_batch_start", stop)
        with pytest.raises(KeyboardInterrupt):
            execute(config)


class Preloaded:
    """The process whose forks are the commands (preloaded.py). It imports what they need with the first of them.

    Started by pytest, or by pytest-xdist for all of its workers: `address` is how they know of it.
    """

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp())
        self.address = str(self.folder / "socket")
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(self.address)
            listening.listen(64)
            number = listening.fileno()
            start = [sys.executable, str(ROOT / "tests/preloaded.py"), str(number)]
            self.process = subprocess.Popen(start, pass_fds=[number])

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def pytest_configure(config: pytest.Config) -> None:
    if SOCKET not in os.environ and sys.platform == "linux":
        started = Preloaded()
        os.environ[SOCKET] = started.address
        config.add_cleanup(started.end)
        config.add_cleanup(lambda: os.environ.pop(SOCKET))
    if not hasattr(config, "workerinput") and config.getoption("numprocesses", None):
        return  # pytest-xdist's own process
    from repmlp.runs.launch import register_settings

    register_settings()


class Forked:
    """A script in a fork of `Preloaded`'s process, which goes on beside the test.

    pid: number of its process.
    """

    def __init__(self, arguments: list[str], cwd: str, env: dict[str, str]):
        address = Path(os.environ[SOCKET])
        self.arguments, self.folder = arguments, tempfile.mkdtemp(dir=address.parent)
        self.out, self.err = Path(self.folder, "out"), Path(self.folder, "err")
        request = {"arguments": arguments, "cwd": cwd, "env": env, "stdout": str(self.out), "stderr": str(self.err)}
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.settimeout(LIMIT)
        self.connection.connect(str(address))
        self.connection.sendall(json.dumps(request).encode() + b"\n")
        self.answer = self.connection.makefile()
        self.pid = int(self.answer.readline())

    def has_ended(self) -> bool:
        try:
            os.kill(self.pid, 0)  # sends nothing
        except ProcessLookupError:
            return True
        return False

    def wait(self) -> subprocess.CompletedProcess:
        """Return how it ended and what it said; once."""
        with self.connection, self.answer:
            status = int(self.answer.readline())
        done = subprocess.CompletedProcess(self.arguments, status, self.out.read_text(), self.err.read_text())
        shutil.rmtree(self.folder)
        return done


def environment_of_commands() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("REPMLP_DATA", "REPMLP_LAUNCH", SOCKET)}


def start(*arguments: str) -> Forked:
    """Start a script of the project, as `command` does, and go on (Linux alone)."""
    if sys.platform != "linux":
        pytest.skip("commands are forked on Linux alone")
    return Forked([str(ROOT / arguments[0]), *arguments[1:]], "/", environment_of_commands())


def command(*arguments: str, check: bool = False, fresh: bool = False, **kwargs) -> subprocess.CompletedProcess:
    """Run a script of the project with this Python, from another folder than the repository's.

    fresh: in a Python that has imported nothing yet, as a user's has; slow. Without it, the script runs in a fork of
    a process that has imported torch and the others.
    """
    environment = environment_of_commands() | kwargs.pop("env", {})
    script, cwd = str(ROOT / arguments[0]), str(kwargs.pop("cwd", "/"))
    read_at_start = {name for name in environment if name.startswith(("OMP_", "PYTHON", "LD_"))}
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
    done = Forked([script, *arguments[1:]], cwd, environment).wait()
    if check:
        done.check_returncode()
    return done
