"""Starting from the weights of another network: what is taken, what stays fresh, what is refused; through the library
and through a run."""

import json

import pytest
import torch
from conftest import compose_config, tiny_config

from repmlp.checkpoints import load_model, save_model
from repmlp.finetuning import classifier_of, start_from
from repmlp.models.build import build_model
from repmlp.resizing import resize
from repmlp.runs.record import record_path
from repmlp.runs.run import execute

CONFIG = {
    "arch": "repmlpnet", "img_size": 32, "stem_stride": 2, "channels": [8, 16], "blocks": [1, 1], "share_sets": [2, 4],
    "kernels": [1, 3],
}  # fmt: skip


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "first.safetensors"
    save_model(path, build_model(CONFIG, 7), CONFIG)
    return path


def test_the_same_network_takes_everything(file):
    net = build_model(CONFIG, 7)
    assert str(start_from(net, file)) == "fresh: nothing"
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(net.eval()(x), load_model(file)[0](x))


def test_another_number_of_classes_gives_a_fresh_head(file):
    net = build_model(CONFIG, 5)
    head = classifier_of(net).weight.clone()
    assert start_from(net, file) == (("head",), None)
    assert torch.equal(classifier_of(net).weight, head)
    assert torch.equal(net.stem.conv.weight, load_model(file)[0].stem.conv.weight)


def test_other_classes_of_the_same_number_get_a_fresh_head(tmp_path):
    """As many, but cats where there were dogs: a head that answers for the dogs is no start."""
    trained = build_model(CONFIG, 2)
    save_model(tmp_path / "w.safetensors", trained, CONFIG, {"classes": json.dumps(["cat", "dog"])})
    for classes, fresh in ((("cat", "dog"), ()), ((), ()), (("cat", "emu"), ("head",))):
        net = build_model(CONFIG, 2)
        before = classifier_of(net).weight.clone()
        assert start_from(net, tmp_path / "w.safetensors", classes).fresh == fresh
        assert torch.equal(classifier_of(net).weight, before if fresh else classifier_of(trained).weight)
        assert torch.equal(net.stem.conv.weight, trained.stem.conv.weight)


def test_another_resolution_is_resized(file):
    net = build_model({**CONFIG, "img_size": [64, 32]}, 7)
    start = start_from(net, file)
    assert start == ((), (32, 32)) and "resized from 32x32 pixels" in str(start)
    expected = resize(load_model(file)[0], (64, 32))
    x = torch.randn(2, 3, 64, 32)
    assert torch.equal(net.eval()(x), expected(x))


def test_more_branches_stay_fresh(file):
    net = build_model({**CONFIG, "kernels": [1, 3, 5]}, 7)
    fresh = start_from(net, file).fresh
    assert len(fresh) == 4 and all(".local_perceptron." in name and name.endswith(".5") for name in fresh)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kernels": [1]}, "convs.3 that the network has not: use the kernels of the file"),
        ({"channels": [8, 32]}, "there and .* here"),
        ({"global_perceptron": False}, "unexpected: it is another network's"),
    ],
)
def test_another_network_is_refused_and_nothing_changes(file, change, words):
    net = build_model({**CONFIG, **change}, 7)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        start_from(net, file)
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


def test_merged_weights_are_refused(file, tmp_path):
    model, _ = load_model(file)
    for module in model.modules():
        if hasattr(module, "reparameterize"):
            module.reparameterize()
    save_model(tmp_path / "merged.safetensors", model, CONFIG)
    with pytest.raises(ValueError, match="merged weights; start from those before reparameterize"):
        start_from(build_model(CONFIG, 7), tmp_path / "merged.safetensors")


def test_a_run_starts_from_weights(tmp_path, caplog):
    """Its key follows the content of the file, not its place; its own checkpoint does not need the file."""
    caplog.set_level("INFO")
    first = tiny_config(tmp_path, "study=first")
    assert execute(first).state == "finished"
    weights = next((tmp_path / "outputs/first").glob("*/model.safetensors"))
    tuned = tiny_config(tmp_path, f"weights={weights}", "study=tuned")
    outcome = execute(tuned)
    assert outcome.state == "finished", outcome.message
    assert f"weights from {weights}; fresh: nothing" in caplog.text
    text = record_path(tmp_path / "results", "tuned", outcome.key).read_text()
    assert str(tmp_path) not in text and len(json.loads(text)["config"]["model"]["weights"]) == 64
    own = next((tmp_path / "outputs/tuned").glob("*/model.safetensors"))
    moved = weights.rename(tmp_path / "moved.safetensors")
    again = execute(tiny_config(tmp_path, f"weights={moved}", "study=tuned"))
    assert (again.state, again.key) == ("skipped", outcome.key)
    load_model(own)
    record = json.loads(text)
    bare = json.loads(record_path(tmp_path / "results", "first", execute(first).key).read_text())
    assert record["curve"][0]["train_loss"] < bare["curve"][0]["train_loss"]
    gone = execute(tiny_config(tmp_path, "weights=nowhere.safetensors", "study=tuned"))
    assert gone.state == "failed" and "weights=nowhere.safetensors: there is no such file" in gone.message


def test_segmentation_says_which_setting_it_has():
    config = compose_config("weights=x.safetensors", name="segment")
    assert "a network that labels pixels starts from backbone=FILE" in execute(config).message
