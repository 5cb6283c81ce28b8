"""One door for weights: what is saved is loaded, foreign objects are never built, and what does not fit is named."""

import builtins
import copy
import io
import itertools
import json
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import randomise_norms
from torch import nn

import repmlp
from repmlp import RepMLPNet, build_model, deploy, fold_batch_norms, load, save
from repmlp.backbones import load_backbone
from repmlp.branches import BranchSpec
from repmlp.checkpoints import load_model, open_checkpoint, to_official
from repmlp.models.build import merged_copy
from repmlp.older_key_names import to_older
from repmlp.reading import read

NET = {"arch": "repmlpnet", "img_size": 16, "stem_stride": 2, "channels": [8, 16], "blocks": [1, 1]}
NET |= {"share_sets": [2, 4], "kernels": [1, "3s"]}
OLDER = {"arch": "timm", "variant": "repmlp_res50_224", "img_size": 64, "kernels": [1, 3]}
OLDER["arguments"] = {"layers": [2, 2, 2, 2], "channels": [8, 16, 32, 64], "partition": 4, "groups": 4}
CONFIGS = {
    "repmlpnet": NET,
    "rectangle": {**NET, "img_size": [16, 24]},
    "older": OLDER,
    "timm, injected": {
        "arch": "timm",
        "variant": "resmlp_12_patch4_32",
        "kernels": [3],
        "arguments": {"num_blocks": 1},
    },
    "timm, its own branches": {"arch": "timm", "variant": "mobileone_s0"},
}


def size_of(config: dict) -> tuple[int, int]:
    size = config.get("img_size", 32)
    return tuple(size) if isinstance(size, list) else (size, size)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_every_form_that_is_saved_is_loaded(name, tmp_path):
    config = CONFIGS[name]
    net = randomise_norms(build_model(config, 5)).eval()
    forms = {"train-time": net, "merged": merged_copy(net), "DataParallel": nn.DataParallel(net)}
    forms |= {"compiled": torch.compile(net), "compiled and merged": torch.compile(merged_copy(net))}
    if not name.startswith("timm"):
        forms |= {"deployed": deploy(net), "of a merged one": deploy(merged_copy(net))}
    x = torch.randn(2, 3, *size_of(config))
    for form, model in forms.items():
        path = tmp_path / f"{form}.safetensors"
        before = torch.get_rng_state()
        save(str(path), model, config, {"key": "abc"})
        assert torch.equal(before, torch.get_rng_state())
        again, metadata = load_model(str(path))
        inner = model.module if form == "DataParallel" else getattr(model, "_orig_mod", model)
        assert torch.equal(again(x), inner(x)), form
        assert not again.training and metadata["key"] == "abc"
        assert again.state_dict().keys() == inner.state_dict().keys()
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors"}


def test_folded_without_branches(tmp_path):
    config = {"arch": "timm", "variant": "repmlp_res50_224", **{k: OLDER[k] for k in ("img_size", "arguments")}}
    config["kernels"] = []
    net = fold_batch_norms(randomise_norms(build_model(config, 3)).eval())
    save(tmp_path / "f.safetensors", net, config)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(load(tmp_path / "f.safetensors")(x), net(x))


def test_configurations_become_plain(tmp_path):
    config = {
        **NET,
        "img_size": np.int64(16),
        "channels": (np.int64(8), 16),
        "kernels": [np.int64(1), BranchSpec((3, 3), 1, True)],
    }
    save(tmp_path / "a.safetensors", build_model(NET, 3), config)
    metadata = load_model(tmp_path / "a.safetensors")[1]
    assert json.loads(metadata["repmlp_model"]) == NET
    with pytest.raises(ValueError, match=r"config.drop_rate=<object.* cannot be written"):
        save(tmp_path / "b.safetensors", build_model(NET, 3), {**NET, "drop_rate": object()})
    with pytest.raises(ValueError, match="config=None: a Linear does not tell it"):
        save(tmp_path / "b.safetensors", nn.Linear(1, 1))
    save(tmp_path / "c.safetensors", build_model({**NET, "img_size": [16, 32]}, 3))
    assert load(tmp_path / "c.safetensors").img_size == (16, 32)


@torch.no_grad()
def test_any_nesting_and_prefix(tmp_path):
    """For each of our formats and the older one, as a whole network and as a backbone."""
    net = randomise_norms(build_model({**NET, "kernels": [1, 3]}, 5)).eval()
    older = randomise_norms(build_model(OLDER, 5)).eval()
    path, backbone = tmp_path / "w.ckpt", build_model({**NET, "kernels": [1, 3]}, 0).eval()
    states = ((net, net.state_dict()), (net, to_official(net.state_dict())), (older, to_older(older.state_dict())))
    states += ((older, older.state_dict()), (older, to_older(fold_batch_norms(older).state_dict())))
    prefixes = ("", "module.", "net.", "backbone.", "_orig_mod.", "module._orig_mod.", "net._orig_mod.")
    nests = (None, "model", "state_dict", "model_ema", "net")
    every_pair = list(itertools.product(prefixes, nests))
    some_pairs = list(zip(prefixes, itertools.cycle(nests)))  # each prefix and each nest, once or twice
    for number, (model, state) in enumerate(states):
        x = torch.randn(1, 3, *(16, 16) if model is net else (64, 64))
        expected = model(x) if "stage0.0.conv.bias" not in state else fold_batch_norms(model)(x)
        # how they stand together does not depend on the format: every pair with one of them
        for prefix, nest in some_pairs if number else every_pair:
            named = {prefix + name: tensor for name, tensor in state.items()}
            torch.save(named if nest is None else {nest: named, "epoch": 3, "pytorch-lightning_version": "2"}, path)
            assert torch.equal(load(path)(x), expected), (prefix, nest)
        opened = open_checkpoint(path)
        save(tmp_path / "again.safetensors", opened.model, opened.config)
        assert torch.equal(load(tmp_path / "again.safetensors")(x), expected)
        if model is net:
            assert load_backbone(backbone, path) == []
            assert torch.equal(backbone.stages[0](backbone.stem(x)), net.stages[0](net.stem(x)))
    torch.save({**net.state_dict(), "new": torch.zeros(1)}, path)
    for use in (load, lambda file: load_backbone(backbone, file)):
        with pytest.raises(ValueError, match=r"w\.ckpt: .* new is unexpected"):
            use(path)


class Settings:
    """An object of a class that the reader of the file has not."""

    def __init__(self, **values):
        self.values = values


class CfgNode(dict):
    """A configuration as published checkpoints hold one: a dictionary of its own class, with attributes."""


class Runs:
    """Unpickled, it would call a function with arguments."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def pickled_away(content, path: Path, zipped: bool) -> None:
    """Write a file whose classes are not installed when it is read."""
    module = types.ModuleType("training_code_of_the_authors")
    originals = [cls.__module__ for cls in (Settings, CfgNode)]
    for cls in (Settings, CfgNode):
        cls.__module__ = module.__name__
        setattr(module, cls.__name__, cls)
    sys.modules[module.__name__] = module
    try:
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    finally:
        del sys.modules[module.__name__]
        for cls, original in zip((Settings, CfgNode), originals, strict=True):
            cls.__module__ = original


@torch.no_grad()
@pytest.mark.parametrize("zipped", [True, False])
def test_objects_of_absent_classes_are_left_out(zipped, tmp_path):
    net = randomise_norms(build_model({**NET, "kernels": [1, 3]}, 5)).eval()
    node = CfgNode(lr=0.1, nested=CfgNode(a=[1, 2]))
    node.frozen = True
    content = {"config": node, "args": Settings(a=node), "lr": np.float64(3)}
    content |= {"when": {1, 2}, "path": Path("x"), "state_dict": to_official(net.state_dict())}
    path = tmp_path / "checkpoint.pth"
    pickled_away(content, path, zipped)
    modules = set(sys.modules)
    found = read(path)
    # what torch itself imports when it loads for the first time is no business of the file's
    assert {name for name in set(sys.modules) - modules if not name.startswith("torch.")} == set()
    assert type(found["config"]).__name__ == type(found["args"]).__name__ == "_Inert"
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(load(path)(x), net(x))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (os.system, ("touch {}",)),
        (builtins.eval, ("__import__('pathlib').Path('{}').touch()",)),
        (builtins.exec, ("open('{}', 'w')",)),
        (builtins.open, ("{}", "w")),
        (Path.touch, (Path("{}"),)),
        (builtins.getattr, (os, "system")),
        (io.open, ("{}", "w")),
        (torch.save, ([1], "{}")),
        (torch.serialization.load, ("{}",)),
        (copy.deepcopy, ([1],)),
        (builtins.__import__, ("antigravity",)),
    ],
)
def test_no_code_of_a_file_is_run(zipped, function, arguments, tmp_path):
    victim = tmp_path / "victim"
    filled = [
        Path(str(victim)) if isinstance(a, Path) else a.format(victim) if isinstance(a, str) else a for a in arguments
    ]
    if function is builtins.getattr:
        filled = ["os", "system"]
    net = build_model({**NET, "kernels": [1]}, 5)
    path = tmp_path / "w.pth"
    torch.save(
        {"trap": Runs(function, *filled), "model": net.state_dict()}, path, _use_new_zipfile_serialization=zipped
    )
    assert isinstance(load(path), RepMLPNet)
    assert not victim.exists() and "antigravity" not in sys.modules


def test_a_trap_cannot_change_what_builds_tensors(tmp_path):
    """A pickle that sets attributes on an allowed function sets them on a wrapper of its own."""
    stream = b"\x80\x02" + b"ctorch._utils\n_rebuild_tensor_v2\n" + pickle.dumps({"trap": 1}, 2)[2:-1] + b"b."
    from repmlp.reading import _TensorUnpickler

    _TensorUnpickler(io.BytesIO(stream)).load()
    assert not hasattr(torch._utils._rebuild_tensor_v2, "trap")


def test_whole_pickled_objects_and_places_are_named(tmp_path):
    torch.save(Settings(a=1), tmp_path / "whole.pth")
    with pytest.raises(ValueError, match=r"whole\.pth holds a whole pickled object, expected a state_dict"):
        load(tmp_path / "whole.pth")
    with pytest.raises(FileNotFoundError, match=rf"no checkpoint at {Path.cwd()}/absent\.pth"):
        load("absent.pth")


def test_foreign_networks_are_told_with_the_first_names(tmp_path):
    path = tmp_path / "other.pth"
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(ValueError, match=r"other\.pth: .* conv_embedding\S+ is missing and weight is unexpec"):
        open_checkpoint(path)
    assert repmlp.load is load


SMALL = {
    "repmlpnet_t224": {"channels": (8, 16, 32, 64), "blocks": (1, 1, 1, 1), "share_sets": (1, 2, 4, 8), "img_size": 32},
    "repmlp_res50_224": {"layers": (1, 1, 1, 1), "channels": (8, 16, 32, 64), "partition": 2, "groups": 4,
                         "img_size": 64},
    "resmlp_12_patch4_32": {"num_blocks": 1, "img_size": 16},
    "resmlp_12_patch2_32": {"depth": 1, "img_size": 16},
    "gmlp_12_patch4_32": {"num_blocks": 1, "img_size": 16},
}  # fmt: skip


@pytest.mark.parametrize("variant", SMALL)
def test_timm_keeps_the_head_of_a_file_with_as_many_classes(tmp_path, variant):
    """Of the 1000 classes that timm's configuration tells, too; a network that is asked for none has the file's."""
    trained = timm.create_model(variant, num_classes=5, **SMALL[variant])
    torch.save(trained.state_dict(), tmp_path / "own.pth")
    overlay = {"file": str(tmp_path / "own.pth")}
    name = f"{trained.pretrained_cfg['classifier']}.weight"
    for given, number in (
        ({"num_classes": 5}, 5), ({}, 5), ({"pretrained_cfg_overlay": {**overlay, "num_classes": 5}}, 5),
        ({"num_classes": 7}, 7), ({"num_classes": 1000}, 1000),
    ):  # fmt: skip
        net = timm.create_model(
            variant, pretrained=True, **{"pretrained_cfg_overlay": overlay, **SMALL[variant], **given}
        )
        head = net.state_dict()[name]
        assert len(head) == number == net.num_classes
        assert (head.shape == trained.state_dict()[name].shape and head.equal(trained.state_dict()[name])) is (
            number == 5
        )
        others = [each for each in trained.state_dict() if each.rpartition(".")[0] != name.rpartition(".")[0]]
        assert all(net.state_dict()[each].equal(trained.state_dict()[each]) for each in others)


@pytest.mark.parametrize("variant", SMALL)
def test_timm_tells_the_images_of_the_network_that_was_built(variant):
    side = SMALL[variant]["img_size"]
    for given, channels in (({}, 3), ({"in_chans": 1}, 1), ({"img_size": np.int64(side)}, 3)):
        net = timm.create_model(variant, **{**SMALL[variant], **given})
        assert timm.data.resolve_model_data_config(net)["input_size"] == (channels, side, side)
