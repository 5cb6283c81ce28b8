"""The recipe: schedule, weight decay, learning rate, metrics, and the comparison before and after merging."""

import math

import lightning as L
import pytest
import timm
import torch
from conftest import randomise_norms
from timm.scheduler import CosineLRScheduler
from torch import nn

from repmlp import build_model
from repmlp.layers import SetSharingFC
from repmlp.locality import kernel_map, locality_index, locality_profile, network_profiles, uniform_profile
from repmlp.randomness import derive_seed
from repmlp.training.classifier import Classifier, PartAccuracy
from repmlp.training.merge_check import compare_merged
from repmlp.training.schedule import cosine_with_warmup

RECIPE = {
    "epochs": 100, "warmup_epochs": 10, "lr_per_256": 0.002, "batch_size": 128, "weight_decay": 0.1,
    "betas": [0.9, 0.999], "label_smoothing": 0.1,
}  # fmt: skip


def test_schedule_equals_timms():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = CosineLRScheduler(optimizer, t_initial=1000, warmup_t=100, warmup_lr_init=0.0, t_in_epochs=False)
    for step in range(1000):
        reference.step_update(step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(cosine_with_warmup(step, 1000, 100), abs=1e-12)
    assert cosine_with_warmup(100, 1000, 100) == pytest.approx(0.9755, abs=1e-4)
    assert cosine_with_warmup(1000, 1000, 100) == pytest.approx(0.0, abs=1e-12)
    assert cosine_with_warmup(0, 10, 0) == 1.0


@pytest.mark.parametrize("arch", ["repmlpnet", "resmlp"])
def test_weight_decay_spares_biases_and_vectors(arch):
    net = build_model({"arch": arch})
    classifier = Classifier(net, RECIPE, 390, 100)
    classifier._trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    optimizer = classifier.configure_optimizers()["optimizer"]
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in net.named_parameters():
        spared = name.endswith("bias") or parameter.ndim <= 1
        assert decay.pop(id(parameter)) == (0.0 if spared else 0.1), name
    assert not decay
    assert {group["initial_lr"] for group in optimizer.param_groups} == {0.001}
    classifier.recipe["decay_all"] = True
    groups = classifier.configure_optimizers()["optimizer"].param_groups
    assert {group["weight_decay"] for group in groups} == {0.1}
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))


def test_layer_decay_and_the_linear_probe():
    net = timm.create_model("repmlpnet_t224", img_size=32, num_classes=7)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    decayed = Classifier(net, {**RECIPE, "layer_decay": 0.5}, 390, 7)
    decayed._trainer = trainer
    groups = decayed.configure_optimizers()["optimizer"].param_groups
    rates = {id(p): group["initial_lr"] for group in groups for p in group["params"]}
    assert len(rates) == len(list(net.parameters()))
    assert rates[id(net.head.weight)] == pytest.approx(0.001) and rates[id(net.head.weight)] == max(rates.values())
    assert min(rates.values()) == rates[id(next(net.stem.parameters()))] < 0.0005
    probe = Classifier(net, {**RECIPE, "train_only": "head"}, 390, 7)
    probe._trainer = trainer
    trained = [p for group in probe.configure_optimizers()["optimizer"].param_groups for p in group["params"]]
    assert {id(p) for p in trained} == {id(p) for p in net.get_classifier().parameters()}
    net.train()
    probe.on_train_epoch_start()
    assert not net.norm.training and net.get_classifier().training
    with pytest.raises(ValueError, match="Linear does not say which its classifier is"):
        Classifier(nn.Linear(3, 3), {**RECIPE, "train_only": "head"}, 390, 7)


def test_part_accuracy():
    parts = {"tens": torch.arange(100) // 10, "ones": torch.arange(100) % 10}
    metric = PartAccuracy(parts)
    logits = torch.eye(100)[[12, 34, 56, 78]]
    metric.update(logits, torch.tensor([12, 35, 16, 91]))
    assert {name: float(value) for name, value in metric.compute().items()} == {"tens": 0.5, "ones": 0.5}


def test_derived_seeds_differ():
    keys = [(seed, epoch, step) for seed in range(3) for epoch in range(11) for step in range(11)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    assert derive_seed(1, 11) != derive_seed(11, 1) != derive_seed(1, "1", 1)
    assert 0 <= derive_seed(0) < 2**63


class Biased(nn.Module):
    """A net whose merged form differs by a known amount: its logits, plus `shift` on class 0."""

    def __init__(self, shift: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.shift = shift
        self.merged = False

    def forward(self, x):
        logits = x.flatten(1)[:, :10] * self.weight
        if self.merged:
            logits = logits.clone()
            logits[:, 0] += self.shift
        return logits

    def reparameterize(self):
        self.merged = True


def test_compare_merged_measures_what_merging_changes():
    images = torch.randn(64, 1, 1, 10)
    labels = images.flatten(1).argmax(1)
    loader = [(images[:40], labels[:40]), (images[40:], labels[40:])]
    _, same = compare_merged(Biased(0.0), loader, 10)
    assert (
        same["top1_pct"] == same["top1_merged_pct"] == 100 and same["merge_error"] == same["merge_disagreements"] == 0
    )
    _, off = compare_merged(Biased(100.0), loader, 10)
    zeros = int((labels == 0).sum())
    assert off["top1_merged_pct"] == pytest.approx(100 * zeros / 64)
    assert off["merge_disagreements"] == 64 - zeros
    assert off["merge_error"] == pytest.approx(100 * math.sqrt(64) / float(images.norm()), rel=1e-5)


def test_compare_merged_leaves_the_net_as_it_was():
    net = randomise_norms(build_model({"arch": "repmlpnet", "channels": [8], "blocks": [1], "share_sets": [2]}, 10))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    merged, result = compare_merged(net, [(torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,)))], 10)
    assert result["merge_error"] < 2e-6
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert len(merged.state_dict()) < len(before)


# ---- locality


def test_locality_profile_of_known_matrices():
    assert locality_profile(torch.eye(12).expand(2, 12, 12), (3, 4)) == pytest.approx([1, 1, 1, 1])
    for size in ((3, 3), (5, 8), (1, 7)):
        ones = torch.ones(1, size[0] * size[1], size[0] * size[1])
        assert uniform_profile(size) == pytest.approx(locality_profile(ones, size), abs=1e-12)
    assert uniform_profile((3, 3))[0] == pytest.approx(1 / 9)
    # 3x3 neighbourhoods on a 3x3 map: 4 cells at corners, 6 at edges, 9 in the middle
    assert uniform_profile((3, 3))[1] == pytest.approx((4 * 4 + 4 * 6 + 9) / 81)
    assert locality_profile(torch.randn(1, 25, 25), (5, 5))[-1] == pytest.approx(1)


@pytest.mark.parametrize("size", [(3, 4), (5, 5), (1, 7), (8, 8)])
def test_locality_index_is_one_less_the_mean_distance_over_a_flat_kernels(size):
    h, w = size
    weight = torch.randn(2, h * w, h * w, dtype=torch.float64)
    means = []
    for magnitude in (weight.abs(), torch.ones_like(weight)):
        distances = []
        for s in range(2):
            for out in range(h * w):
                share = magnitude[s, out] / magnitude[s, out].sum()
                far = [max(abs(out // w - i // w), abs(out % w - i % w)) for i in range(h * w)]
                distances.append(float(share @ torch.tensor(far, dtype=torch.float64)))
        means.append(sum(distances) / len(distances))
    assert locality_index(locality_profile(weight, size), size) == pytest.approx(1 - means[0] / means[1], abs=1e-12)
    identity = torch.eye(h * w).unsqueeze(0)
    assert locality_index(locality_profile(identity, size), size) == pytest.approx(1)
    assert locality_index(uniform_profile(size), size) == pytest.approx(0)
    assert locality_index(locality_profile(1 - identity, size), size) < 0
    assert locality_index(uniform_profile((1, 1)), (1, 1)) == 0.0


def test_profiles_of_a_network_tell_the_fc_from_its_branches():
    net = build_model({"arch": "repmlpnet", "channels": [8], "blocks": [2], "share_sets": [2], "kernels": [3]}, 10)
    layers = [module for module in net.modules() if isinstance(module, SetSharingFC)]
    with torch.no_grad():
        layers[1].local_perceptron.norms["3"].weight.zero_()  # a branch that adds nothing
    first, second = network_profiles(net)
    assert first["injected"][1] > first["trained"][1] and second["injected"] == second["trained"]
    assert second["size"] == list(layers[1].size) and net.get_submodule(second["layer"]) is layers[1]
    assert network_profiles(nn.Linear(3, 3)) == []


def test_kernel_map_is_the_papers():
    weight = torch.randn(2, 12, 12)
    picture = kernel_map(weight, (3, 4), 1, (2, 1))
    smallest = weight[1].abs().min()
    for y in range(3):
        for x in range(4):
            expected = math.log(abs(float(weight[1, 2 * 4 + 1, y * 4 + x])) / float(smallest))
            assert float(picture[y, x]) == pytest.approx(expected, abs=1e-5)
    assert bool(torch.isfinite(kernel_map(torch.eye(4).unsqueeze(0), (2, 2), 0, (0, 0))).all())
    with pytest.raises(ValueError, match="share-set 2 does not exist"):
        kernel_map(weight, (3, 4), 2, (0, 0))
    with pytest.raises(ValueError, match=r"point \(3, 0\) lies outside the 3x4 map"):
        kernel_map(weight, (3, 4), 0, (3, 0))
