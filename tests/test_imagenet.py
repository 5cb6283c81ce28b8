"""Images in folders: what a loader yields for any number of processes, errors; the ImageNet recipe; DDP."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import command, compose_config, interrupt
from PIL import Image
from torchvision.transforms import v2

from repmlp import build_model, load_model
from repmlp.data.decoded import SharedOrder
from repmlp.data.imagenet import ImageFolderData, eval_transform
from repmlp.locality import locality_index
from repmlp.runs import fit
from repmlp.runs.key import config_key, determining, run_key
from repmlp.runs.run import execute
from repmlp.training.classifier import Classifier

SIZE = 32
# a mixer of two blocks without batch norm; timm's own have 15 million parameters
NARROW = ("model=timm", "model.variant=resmlp_12_patch4_32", "model.arguments={num_blocks: 2, embed_dim: 24}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Write 4 classes of 10 training and 5 evaluation images of noise, each class with a colour of its own."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, number in (("train", 10), ("val", 5)):
        for label in range(4):
            folder = root / split / f"n{label}"
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = generator.integers(0, 100, (40 + i, 48, 3))
                pixels[..., label % 3] += 50 * (1 + label // 3)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def data(folders, **kwargs) -> ImageFolderData:
    built = ImageFolderData(folders, SIZE, **{"batch_size": 8, "workers": 0, "randaugment": 15, **kwargs})
    built.prepare_data()
    built.setup()
    return built


def test_folders_are_read_and_shown_once(folders):
    ours = data(folders, n_train=20, eval_batch_size=6)
    assert ours.info.num_classes == 4 and ours.n_images == (20, 20)
    loader = ours.train_dataloader()
    assert len(loader) == 2  # 20 images, batches of 8
    images, labels = next(iter(loader))
    assert images.shape == (8, 3, SIZE, SIZE) and images.dtype == torch.float32 and labels.dtype == torch.int64
    evaluated = list(ours.whole_evaluation())
    assert sum(len(labels) for _, labels in evaluated) == 20 and max(len(labels) for _, labels in evaluated) <= 6
    assert torch.bincount(torch.cat([labels for _, labels in evaluated])).tolist() == [5] * 4


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_evaluation_resizes_the_shorter_side_and_crops_the_middle(folders, interpolation):
    image = Image.open(folders / "val/n0/4.png")  # 44 rows, 48 columns
    resized = v2.functional.resize(image, SIZE, interpolation=v2.InterpolationMode(interpolation))
    width, height = resized.size
    assert (width, height) == (34, 32)
    middle = resized.crop((1, 0, 33, 32))
    expected = torch.from_numpy(np.asarray(middle).copy()).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (expected - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(eval_transform(SIZE, interpolation)(image), expected, rtol=1e-5, atol=1e-5)


def test_augmentation_depends_on_seed_epoch_and_image_alone(folders):
    def first_epochs(seed=0, **kwargs):
        loader = data(folders, seed=seed, **kwargs).train_dataloader()
        out = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            out.append(list(loader))
        return out

    def images_of(epoch):
        return torch.cat([images for images, _ in epoch])

    a, b = first_epochs(), first_epochs(workers=2)
    for one, other in zip(a, b, strict=True):
        assert torch.equal(images_of(one), images_of(other))
    assert not torch.equal(images_of(a[0]), images_of(a[1]))
    assert not torch.equal(images_of(a[0]), images_of(first_epochs(seed=1)[0]))


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_batches_of_one(world):
    indices = torch.arange(100, 143)

    def epoch(rank, world):
        order = SharedOrder(indices, 8, seed=3, rank=rank, world=world)
        order.set_epoch(1)
        keys = list(order)
        assert len(keys) == len(order) and all(key[0] == 1 for key in keys)
        return [index for _, index in keys]

    alone = epoch(0, 1)
    assert len(alone) == 40 and len(set(alone)) == 40 and set(alone) <= set(indices.tolist())
    shares = [epoch(rank, world) for rank in range(world)]
    size = 8 // world
    for step in range(5):
        together = {index for share in shares for index in share[step * size : (step + 1) * size]}
        assert together == set(alone[step * 8 : (step + 1) * 8])


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_evaluation_is_split_into_as_many_batches_for_each_process(folders, world):
    ours = data(folders, eval_batch_size=2)
    shares = [list(ours._evaluation(rank, world).batch_sampler) for rank in range(world)]
    assert len({len(batches) for batches in shares}) == 1
    assert sorted(index for batches in shares for batch in batches for index in batch) == list(range(20))
    assert max(len(batch) for batches in shares for batch in batches) <= 2


def test_holdout_comes_from_the_training_images(folders):
    ours = data(folders, holdout=0.2)
    assert ours.n_images == (32, 8) and ours.eval_folder is ours.train_folder
    assert not set(ours.train_indices.tolist()) & set(ours.eval_indices.tolist())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_train": 41}, r"data\.n_train=41: there are 40 images"),
        ({"n_eval": 0}, r"data\.n_eval=0: there are 20 images"),
        ({"holdout": 0.01}, r"0 images to evaluate on: raise data\.holdout"),
        ({"workers": -1}, r"data\.workers=-1: use a whole number, at least 0"),
        ({"eval_batch_size": 0}, r"data\.eval_batch_size=0: use a whole number, at least 1"),
        ({"batch_size": 64}, "40 training images are less than one batch of 64: lower recipe.batch_size"),
        ({"randaugment": 31}, r"data\.randaugment=31: use a magnitude from 0 to 30"),
        ({"holdout": 1.0}, r"data\.holdout=1\.0"),
    ],
)
def test_bad_settings_are_named(folders, change, words):
    with pytest.raises(ValueError, match=words):
        data(folders, **change).train_dataloader()


def test_bad_folders_are_named(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*train: pass data\.root=FOLDER"):
        data(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="does not hold CLASS/image files"):
        data(tmp_path)
    other = tmp_path / "other"
    for split, names in (("train", ("a", "b")), ("val", ("a", "c"))):
        for name in names:
            (other / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(other / split / name / "0.png")
    with pytest.raises(ValueError, match="'b' is in one of them alone"):
        data(other)
    alone = tmp_path / "alone"
    for split in ("train", "val"):
        (alone / split / "a").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(alone / split / "a/0.png")
    with pytest.raises(ValueError, match="has one class only, 'a'"):
        data(alone)


def test_a_part_of_the_images_is_exactly_as_large_as_asked(folders):
    ours = data(folders, n_train=10, n_eval=6)
    assert ours.n_images == (10, 6)
    labels = torch.tensor(ours.train_folder.targets)[ours.train_indices]
    assert sorted(torch.bincount(labels).tolist()) == [2, 2, 3, 3]


# ---- the recipe


def test_mixup_mixes_images_and_labels_alike():
    """The loss is the cross-entropy of the mixed labels, smoothed once; the draw is a function of the step."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    recipe = {"label_smoothing": 0.1, "mixup": 0.4, "cutmix": 0.0, "epochs": 1, "warmup_epochs": 0}
    classifier = Classifier(net, recipe, 1, 5)
    classifier._trainer = type("T", (), {"current_epoch": 0, "global_rank": 0})()
    images, labels = torch.randn(6, 3, 2, 2), torch.tensor([0, 1, 2, 3, 4, 0])

    def loss(step):
        classifier.on_train_batch_start(None, step)
        return classifier.training_step((images.clone(), labels), step)

    value = loss(0)
    classifier.on_train_batch_start(None, 0)
    np.random.rand()  # timm asks first whether to mix at all
    lam = float(np.random.beta(0.4, 0.4))
    smoothed = F.one_hot(labels, 5) * 0.9 + 0.1 / 5
    target = lam * smoothed + (1 - lam) * smoothed.flip(0)
    mixed = lam * images + (1 - lam) * images.flip(0)
    expected = -(target * F.log_softmax(net(mixed), dim=1)).sum(1).mean()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    assert torch.equal(loss(0), value) and not torch.equal(loss(1), value)


def row(folders, folder, *overrides):
    return compose_config(
        *("data=imagenet", "recipe=imagenet", f"data.root={folders}", "data.workers=0"),
        *NARROW,
        *(f"model.img_size={SIZE}", "trainer.accelerator=cpu"),
        *("recipe.epochs=2", "recipe.warmup_epochs=1", "recipe.batch_size=8", "model.kernels=[]"),
        *(f"results_dir={folder}/results", f"output_dir={folder}/outputs", *overrides),
    )


def test_a_foreign_model_gets_branches_and_a_record(folders, tmp_path):
    foreign = ("model.variant=resmlp_12_224", "model.arguments=null")
    config = row(folders, tmp_path, *foreign, "model.kernels=[1,3]", "recipe.ema_decay=0.9")
    outcome = execute(config)
    assert outcome.state == "finished", outcome.message
    record = json.loads(Path(outcome.message).read_text())
    assert record["model"] == "resmlp_12_224" and record["kernels"] == [1, 3] and record["n_eval"] == 20
    # layer scale starts at 1e-4 there, so on some processors the merged layers change no bit of the logits
    assert record["top1_pct"] == record["top1_merged_pct"] and record["merge_error"] < 2e-6
    assert all(layer["trained"] != layer["injected"] for layer in record["locality"]), "something was merged"
    assert [layer["layer"] for layer in record["locality"]] == [f"blocks.{i}.linear_tokens" for i in range(12)]
    for which, by_layer in record["curve"][-1]["locality"].items():
        of_average = [locality_index(layer[which], layer["size"]) for layer in record["locality"]]
        assert by_layer == pytest.approx(of_average, abs=2e-5), "of the weights that were evaluated"
    net, _ = load_model(next(tmp_path.glob("outputs/*/*/model.safetensors")))
    assert any("local_perceptron" in name for name in net.state_dict()) and net.num_classes == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.variant=resmlp_12_225", "timm has no model 'resmlp_12_225': did you mean"),
        ("trainer.strategy=fsdp", "trainer.strategy='fsdp': use auto, ddp or"),
        ("trainer.devices=0", "trainer.devices=0: use a whole number, at least 1"),
        ("recipe.label_smoothing=1.5", "recipe.label_smoothing=1.5: use a number below 1"),
        ("recipe.batch_size=0", "recipe.batch_size=0: use a whole number, at least 1"),
        ("recipe.batch_size=7", "recipe.batch_size=7: mixup pairs the images of a process"),
        ("recipe.mixup=-1", r"recipe.mixup=-1.0: use a number not below 0"),
    ],
)
def test_bad_runs_fail_in_one_line(folders, tmp_path, change, words):
    outcome = execute(row(folders, tmp_path, change))
    assert outcome.state == "failed" and words.replace("\\", "") in outcome.message and "\n" not in outcome.message


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(folders, tmp_path, monkeypatch):
    """With worker processes, mixup and averaged weights; then once more after the last epoch, without a record."""
    overrides = ("recipe.epochs=4", "data.workers=1", "recipe.ema_decay=0.9", "seed=3")
    interrupted, whole = row(folders, tmp_path / "a", *overrides), row(folders, tmp_path / "b", *overrides)

    interrupt(interrupted, epoch=2)
    records, weights = [], []
    for config in (interrupted, whole):
        outcome = execute(config)
        assert outcome.state == "finished", outcome.message
        records.append(json.loads(Path(outcome.message).read_text()))
        folder = Path(config["output_dir"]) / config["study"] / outcome.key
        weights.append(load_model(folder / "model.safetensors")[0].state_dict())
    assert records[0]["curve"] == records[1]["curve"] and len(records[0]["curve"]) == 4
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    again = row(folders, tmp_path / "c", *overrides)
    with monkeypatch.context() as patched:
        patched.setattr(fit, "write_record", full_disk)
        assert execute(again).state == "failed"
    outcome = execute(again)
    assert json.loads(Path(outcome.message).read_text())["top1_pct"] == records[0]["top1_pct"]
    folder = Path(again["output_dir"]) / again["study"] / outcome.key
    found = load_model(folder / "model.safetensors")[0].state_dict()
    assert all(torch.equal(found[name], value) for name, value in weights[1].items())


def test_a_damaged_image_is_named_in_one_line(folders, tmp_path):
    root = tmp_path / "images"
    shutil.copytree(folders, root)
    (root / "train/n2/3.png").write_bytes(b"no picture")
    for workers in (0, 1):
        outcome = execute(row(root, tmp_path, f"data.workers={workers}", "recipe.batch_size=40"))
        assert outcome.state == "failed" and "\n" not in outcome.message
        start = f"{root / 'train/n2/3.png'} is no readable image: replace it or remove it ("
        assert outcome.message.startswith(start), outcome.message


def test_other_images_are_another_run(folders, tmp_path):
    config = row(folders, tmp_path, "data.label=noise", "recipe.epochs=1", "recipe.warmup_epochs=0")
    assert run_key(config) != run_key(row(folders, tmp_path, "recipe.epochs=1", "recipe.warmup_epochs=0"))
    record = json.loads(Path(execute(config).message).read_text())
    assert (record["data"], record["num_classes"]) == ("noise", 4)


def test_a_sweep_refuses_several_devices(folders, tmp_path):
    done = command(
        *("experiments/ablate.py", "+sweep=locality_imagenet", f"data.root={folders}", "trainer.devices=2"),
        *(f"results_dir={tmp_path}/r", f"output_dir={tmp_path}/o"),
    )
    assert done.returncode == 1 and "a sweep trains each run on one device" in done.stderr


def test_settings_that_came_later_leave_older_keys_alone():
    config = compose_config("model=repmlpnet_tiny", "data=patterns", "recipe=demo")
    key = run_key(config)
    config["recipe"] |= {"mixup": 0.0, "cutmix": 0.0, "ema_decay": 0.0}
    config["model"]["drop_path_rate"] = 0.0
    assert run_key(config) == key
    config["recipe"]["mixup"] = 0.2
    assert run_key(config) != key
    config["trainer"]["devices"] = 2
    assert determining(config)["processes"] == 2
    assert config_key(determining(config)) != key


def test_two_processes_take_the_steps_of_one(folders, tmp_path):
    """The command with trainer.devices=2 (gloo) against one process with the same global batch.

    A net without batch norm, so that nothing but the sum over processes differs; RandAugment on, mixup off, as mixup
    mixes within a process.
    """
    records = []
    for devices in (1, 2):
        out = tmp_path / str(devices)
        done = command(
            *("experiments/train.py", f"data.root={folders}", "data.workers=0", *NARROW),
            *(f"model.img_size={SIZE}", "trainer.accelerator=cpu", "seed=5"),
            *("recipe.epochs=2", "recipe.warmup_epochs=1", "recipe.batch_size=8", "recipe.mixup=0", "recipe.cutmix=0"),
            *(f"trainer.devices={devices}", f"trainer.strategy={'ddp' if devices > 1 else 'auto'}"),
            *(f"results_dir={out}/results", f"output_dir={out}/outputs"),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (path,) = out.glob("results/*/records/*.json")
        records.append(json.loads(path.read_text()))
    one, two = records
    assert one["processes"] == 1 and two["processes"] == 2
    for a, b in zip(one["curve"], two["curve"], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-4)
        assert a["lr"] == b["lr"]
        assert a["top1_pct"] == pytest.approx(b["top1_pct"], abs=5.01)  # one of 20 images on the edge
    assert one["curve"][-1]["train_loss"] != one["curve"][0]["train_loss"]


def test_every_variant_has_a_configuration_that_builds():
    for name in ("t224", "b224", "t256", "b256", "d256", "l256"):
        config = compose_config(f"model=repmlpnet_{name}")["model"]
        with torch.device("meta"):
            net, plain = (
                build_model(config, 1000),
                build_model({"arch": "timm", "variant": f"repmlpnet_{name}", "kernels": (1, 3)}, 1000),
            )
        assert {k: v.shape for k, v in net.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
