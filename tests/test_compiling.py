"""A compiled run: one compilation, for training, and the results of an uncompiled one."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny_config
from torch import nn

from repmlp.runs.key import run_key
from repmlp.runs.record import read_record, record_path
from repmlp.runs.run import execute

TINY_NET = ("model=resmlp_tiny", "model.depth=1")


@pytest.fixture
def graphs(monkeypatch):
    """Let networks be compiled by a backend that runs the graph as it is; returns whether each was for training."""
    torch._dynamo.reset()
    compiled, original = [], nn.Module.compile

    def backend(graph, inputs):
        compiled.append(torch.is_grad_enabled())
        return graph.forward

    monkeypatch.setattr(nn.Module, "compile", lambda net, mode=None: original(net, backend=backend))
    yield compiled
    torch._dynamo.reset()


def test_a_run_compiles_once_and_for_training(tmp_path, graphs):
    records = []
    for compiled in (False, True):
        config = tiny_config(tmp_path / str(compiled), *TINY_NET, f"trainer.compile={str(compiled).lower()}")
        outcome = execute(config)
        assert outcome.state == "finished", outcome.message
        assert len(graphs) == compiled and all(graphs)
        records.append(read_record(record_path(config["results_dir"], config["study"], run_key(config))))
    plain, through_graphs = records
    assert [entry["train_loss"] for entry in through_graphs["curve"]] == [
        pytest.approx(entry["train_loss"], rel=1e-5) for entry in plain["curve"]
    ]
    assert through_graphs["top1_pct"] == plain["top1_pct"]
    assert len(plain["curve"]) > 1  # evaluated between epochs, then trained on
