"""Runs that a cluster takes away: killed between two jobs, sent away and queued again, beside Lightning's own ways."""

import json
import os
import signal
import time

import pytest
import torch
from conftest import TINY, command, start, tiny_config
from test_run import assert_same_result, record_of, run_folder

from repmlp.runs.run import execute

LONGER = ["recipe.epochs=5", "data.n_train=400"]
# local: the executor of submitit that starts processes of this machine, with the code of its jobs for Slurm
SUBMITIT = ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=30"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    """The configuration of a run that nothing disturbed, in a process of its own too."""
    config = tiny_config(tmp_path_factory.mktemp("whole"), *LONGER)
    done = command("experiments/ablate.py", *overrides(config))
    assert done.returncode == 0, done.stdout + done.stderr
    return config


def overrides(config: dict, *launcher: str) -> list[str]:
    folders = [f"results_dir={config['results_dir']}", f"output_dir={config['output_dir']}"]
    return ["-m", *launcher, *TINY, *LONGER, *folders, "trainer.threads=1"]


def interrupt(config: dict, how: signal.Signals, *launcher: str) -> tuple[int, str]:
    """Do a sweep of one run and send the run a signal after its first epoch; returns exit status and what was told."""
    process = start("experiments/ablate.py", *overrides(config, *launcher))
    deadline = time.time() + 300
    while not (run_folder(config) / "last.ckpt").exists():
        assert not process.has_ended(), process.wait()
        assert time.time() < deadline, "no checkpoint in five minutes"
        time.sleep(0.05)
    os.kill(json.loads((run_folder(config) / "owner.json").read_text())["pid"], how)
    ended = process.wait()
    return ended.returncode, ended.stdout + ended.stderr


def logs(config: dict) -> str:
    """Return what the jobs of submitit wrote."""
    return "".join(path.read_text() for path in run_folder(config).parents[1].rglob("*_log.out"))


ENDED = "error: the process of a run was ended from outside"


def test_a_run_killed_in_one_job_goes_on_in_the_next_bit_for_bit(undisturbed, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="hydra-submitit-launcher is not installed")
    config = tiny_config(tmp_path, *LONGER)
    status, told = interrupt(config, signal.SIGKILL, *SUBMITIT)
    assert status == 1 and "Traceback" not in told, told
    assert "1 run: 1 without a report" in told and ENDED in told and "the same command goes on" in told
    again = command("experiments/ablate.py", *overrides(config, *SUBMITIT))
    assert again.returncode == 0 and "1 run: 1 finished" in again.stderr, again.stdout + again.stderr
    assert "taking over from a run that did not end" in logs(config) and "continuing from" in logs(config)
    assert_same_result(config, undisturbed)


def test_a_killed_worker_of_joblib_is_told_in_one_line(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="hydra-joblib-launcher is not installed")
    status, told = interrupt(tiny_config(tmp_path, *LONGER), signal.SIGKILL, "hydra/launcher=joblib")
    assert status == 1 and "Traceback" not in told, told
    assert "1 run: 1 without a report" in told and ENDED in told


def test_a_job_that_is_sent_away_queues_itself_again(undisturbed, tmp_path):
    """SIGUSR2 is what submitit lets Slurm send before a time limit, and before another job gets the machine."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="hydra-submitit-launcher is not installed")
    config = tiny_config(tmp_path, *LONGER)
    status, told = interrupt(config, signal.SIGUSR2, *SUBMITIT)
    assert status == 0 and "1 run: 1 finished" in told, told
    assert "Requeued job" in logs(config) and "continuing from" in logs(config)
    assert_same_result(config, undisturbed)


def test_lightnings_own_checkpoints_of_slurm_jobs_are_neither_read_nor_written(undisturbed, tmp_path, monkeypatch):
    """Lightning goes on from any hpc_ckpt_N.ckpt in the folder that it is started in, whichever run wrote it."""
    monkeypatch.chdir(tmp_path)
    torch.save({"of": "another run"}, tmp_path / "hpc_ckpt_1.ckpt")
    for name in ("JOB_ID", "NTASKS", "NTASKS_PER_NODE", "NNODES"):
        monkeypatch.setenv(f"SLURM_{name}", "1")
    for name in ("PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    monkeypatch.setenv("SLURM_JOB_NAME", "sweep")
    before = signal.getsignal(signal.SIGUSR1)
    config = tiny_config(tmp_path, "trainer.threads=1")
    outcome = execute(config)
    assert outcome.state == "finished", outcome.message
    assert len(record_of(config)["curve"]) == 2 and signal.getsignal(signal.SIGUSR1) == before
    assert not list(tmp_path.rglob("hpc_ckpt_[02-9].ckpt"))
