"""Merging in the middle of training: the function stays, the batch norms are measured, the optimiser forgets what it
has to, a resumed run is the same."""

import json

import pytest
import torch
from conftest import interrupt, randomise_norms, tiny_config
from torch import nn

from repmlp.checkpoints import load_model
from repmlp.injection import InjectedLinear
from repmlp.layers import SetSharingFC
from repmlp.models.build import build_model
from repmlp.runs.record import record_path
from repmlp.runs.run import execute
from repmlp.training.history import History
from repmlp.training.merging import merge_midway

NET = {
    "arch": "repmlpnet", "img_size": 16, "stem_stride": 2, "channels": [8, 16], "blocks": [1, 1], "share_sets": [2, 4],
}  # fmt: skip
MIXER = {"arch": "timm", "variant": "resmlp_12_224", "img_size": 64}


def build(kernels, config=NET):
    return randomise_norms(build_model({**config, "kernels": kernels}, 5)).double()


@pytest.mark.parametrize("kernels", [[], [1], [1, 3], [1, "3s"], ["1x3", "3d2"]])
def test_the_function_stays_and_the_statistics_are_those_of_its_input(kernels):
    net = build(kernels)
    images = torch.randn(3, 4, 3, 16, 16, dtype=torch.float64)
    expected = net.eval()(images[0])
    merge_midway(net.train(), lambda: images)
    assert net.training
    for module in net.modules():
        if isinstance(module, SetSharingFC):
            assert module.local_perceptron is None and module.bias is None
            seen = []
            handle = module.norm.register_forward_pre_hook(lambda norm, inputs, seen=seen: seen.append(inputs[0]))
            net.eval()(images.flatten(0, 1))
            handle.remove()
            assert torch.allclose(module.norm.running_mean, seen[0].mean(dim=(0, 2, 3)), rtol=1e-10, atol=1e-12)
            variance = seen[0].var(dim=(0, 2, 3), correction=0)
            assert torch.allclose(module.norm.running_var, variance, rtol=1e-10, atol=1e-12)
    out = net.eval()(images[0])
    assert (out - expected).abs().max() < 1e-12 * expected.abs().max()


def test_layers_without_a_batch_norm_get_the_merged_bias():
    net = build([1, 3], MIXER)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = net.eval().forward_features(x)
    changed = merge_midway(net, lambda: [x])
    layers = [module for module in net.modules() if isinstance(module, InjectedLinear)]
    assert layers and not any(layer.kernels for layer in layers)
    assert len(changed) == 2 * len(layers)
    assert (net.forward_features(x) - expected).abs().max() < 1e-12 * expected.abs().max()


def test_calibration_is_the_average_of_the_batches():
    net = build([1, 3])
    images = torch.randn(3, 4, 3, 16, 16, dtype=torch.float64)
    merge_midway(net, lambda: images, calibrate=True)
    with torch.no_grad():
        maps = torch.stack([net.stem.conv(x) for x in images])
    mean = maps.mean(dim=(0, 1, 3, 4))
    variance = torch.stack([each.var(dim=(0, 2, 3)) for each in maps]).mean(dim=0)
    assert torch.allclose(net.stem.norm.running_mean, mean) and torch.allclose(net.stem.norm.running_var, variance)


def test_a_network_without_such_layers_is_refused():
    with pytest.raises(ValueError, match="Linear has no fully-connected layers that branches merge into"):
        merge_midway(nn.Linear(3, 3), list)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_run_goes_on_after_an_interruption_on_either_side(tmp_path, share):
    options = ("recipe.epochs=4", f"recipe.merge_after={share}", "model.kernels=[1,3]")
    whole = tiny_config(tmp_path / "whole", *options)
    outcome = execute(whole, label="whole")
    assert outcome.state == "finished", outcome.message
    expected = json.loads(record_path(whole["results_dir"], whole["study"], outcome.key).read_text())
    broken = tiny_config(tmp_path / "broken", *options)
    for epoch in (1, 2, 3):
        interrupt(broken, epoch)
    assert execute(broken).state == "finished"
    record = json.loads(record_path(broken["results_dir"], broken["study"], outcome.key).read_text())
    assert record["curve"] == expected["curve"] and record["top1_pct"] == expected["top1_pct"]
    weights = [
        load_model(next((tmp_path / name / "outputs").rglob("model.safetensors")))[0].state_dict()
        for name in ("whole", "broken")
    ]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())
    assert not any("local_perceptron" in name for name in weights[0])


def test_the_optimiser_forgets_what_is_new(tmp_path, monkeypatch):
    """Moments of W* and of its batch norm start at the merge, all others go on; no branch is trained any more."""
    steps = []

    def look(self, trainer, module):
        named = {parameter: name for name, parameter in module.net.named_parameters()}
        groups = {parameter for group in trainer.optimizers[0].param_groups for parameter in group["params"]}
        assert groups == set(named)
        steps.append({named[p]: int(state["step"]) for p, state in trainer.optimizers[0].state.items()})

    monkeypatch.setattr(History, "on_train_end", look, raising=False)
    assert execute(tiny_config(tmp_path, "recipe.epochs=4", "recipe.merge_after=0.5")).state == "finished"
    counts = steps[0]
    total = max(counts.values())
    fresh = {name for name, count in counts.items() if count == total // 2}
    assert {name.split("channel_perceptron.")[-1] for name in fresh} == {"weight", "norm.weight", "norm.bias"}
    assert all("channel_perceptron" in name for name in fresh)
    assert all(count in (total, total // 2) for count in counts.values())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["recipe.merge_after=1.5"], "recipe.merge_after=1.5"),
        (["recipe.merge_after=0.5", "recipe.ema_decay=0.9"], "use ema_decay=0"),
        (["recipe.merge_after=0.5", "trainer.devices=2"], "use trainer.devices=1"),
    ],
)
def test_mistakes_are_one_line(tmp_path, overrides, words):
    message = execute(tiny_config(tmp_path, *overrides)).message
    assert words in message and "\n" not in message
