"""A compiled run: one compilation, for training, and the results of an uncompiled one."""

from __future__ import annotations

import pytest
import torch
from conftest import interrupt, tiny_config
from torch import nn

from repmlp import build_model
from repmlp.runs.key import run_key
from repmlp.runs.record import read_record, record_path
from repmlp.runs.run import execute
from repmlp.training import compiling
from repmlp.training.compiling import compile_for_training

TINY_NET = ("model=resmlp_tiny", "model.depth=1")


class Graphs(list):
    """Whether each graph was made for training; how often each was called."""

    def __init__(self):
        super().__init__()
        self.calls = []


@pytest.fixture
def graphs(monkeypatch):
    """Let networks be compiled by a backend that runs the graph as it is; returns them."""
    torch._dynamo.reset()
    compiled, original = Graphs(), nn.Module.compile

    def backend(graph, inputs):
        number = len(compiled)
        compiled.append(torch.is_grad_enabled())
        compiled.calls.append(0)

        def called(*arguments):
            compiled.calls[number] += 1
            return graph.forward(*arguments)

        return called

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


SMALL = {"arch": "repmlpnet", "channels": [8, 8], "share_sets": [2, 2], "kernels": [1]}
MIXER = {"arch": "resmlp", "width": 8, "patch_size": 8, "kernels": [1]}


@pytest.mark.parametrize(
    ("config", "most", "kinds", "units"),
    [
        ({**SMALL, "blocks": [3, 2]}, 8, 2, 5),  # two sizes of maps
        ({**SMALL, "blocks": [2, 2], "drop_path_rate": 0.2}, 8, 4, 4),
        ({**SMALL, "blocks": [2, 2], "drop_path_rate": 0.2}, 3, 1, 1),  # too many kinds: the whole network
        ({**MIXER, "depth": 3}, 8, 1, 3),
        ({**MIXER, "depth": 1}, 8, 1, 1),  # no units: the whole network
    ],
)
def test_equal_units_share_a_graph(graphs, monkeypatch, config, most, kinds, units):
    """As many graphs as there are different units, as many calls as there are units; loss and gradients the same."""
    assert compiling.MOST_KINDS == 8
    monkeypatch.setattr(compiling, "MOST_KINDS", most)
    torch.manual_seed(0)
    net = build_model(config, 5).double()
    names, x = list(net.state_dict()), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    results = []
    for compiled in (False, True):
        if compiled:
            compile_for_training(net)
        torch.manual_seed(1)
        net(x).square().sum().backward()
        results.append([parameter.grad.clone() for parameter in net.parameters()])
        net.zero_grad()
    assert list(net.state_dict()) == names
    assert len(graphs) == kinds and sum(graphs.calls) == units
    for plain, found in zip(*results, strict=True):
        torch.testing.assert_close(found, plain, rtol=1e-9, atol=1e-12)


def test_a_compiled_run_goes_on_after_an_interruption(tmp_path, graphs):
    options = ("model=resmlp_tiny", "model.depth=2", "trainer.compile=true")
    whole, broken = tiny_config(tmp_path / "whole", *options), tiny_config(tmp_path / "broken", *options)

    interrupt(broken, epoch=1)
    assert graphs
    curves = []
    for config in (broken, whole):
        torch._dynamo.reset()
        outcome = execute(config)
        assert outcome.state == "finished", outcome.message
        curves.append(read_record(record_path(config["results_dir"], config["study"], run_key(config)))["curve"])
    assert curves[0] == curves[1] and len(curves[0]) == 2
