"""One row of a sweep, from its configuration to its record: train, merge, evaluate both, write.

A finished row is skipped, a half-finished one goes on from its last checkpoint, and two processes never train the
same row. Only plain dictionaries come in, so any launcher can run it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from filelock import FileLock, Timeout
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from repmlp import branches
from repmlp.cost import count_macs, count_params, count_params_paper
from repmlp.locality import network_profiles
from repmlp.models.build import check_state_dict, save_model
from repmlp.runs.key import PATHS, branch_label, config_key, determining
from repmlp.runs.provenance import device_name, git_state, processor, versions
from repmlp.runs.record import BadRecord, read_record, record_path, write_record
from repmlp.runs.tasks import TASKS
from repmlp.training.base import RecipeModule
from repmlp.training.callbacks import AveragedWeights, EpochLine, KernelImages
from repmlp.training.memory import freed_memory_kept
from repmlp.training.schedule import SCHEDULES

log = logging.getLogger(__name__)

# fields of `model` that hold lists: of branches, the others of whole numbers
LISTS = ("kernels", "share_sets", "channels", "blocks")
ADDITIONS = {  # settings that are said of a row where they are on
    "model": ("drop_path_rate",), "data": ("randaugment",), "recipe": ("mixup", "cutmix", "ema_decay", "decay_all"),
}  # fmt: skip
PRECISIONS = ("32-true", "bf16-mixed")
COMPILE = (False, True, "reduce-overhead", "max-autotune")  # the last two with CUDA graphs
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true")  # each process runs the command itself


@dataclass
class Outcome:
    """How a row ended: finished, skipped (there was a record), busy (another process trains it) or failed."""

    state: str
    label: str
    key: str
    message: str = ""
    seconds: float = 0.0


def row_key(config: Mapping[str, Any]) -> str:
    """Return the key of a row, the name of its record and of its folder."""
    return config_key(determining(config))


def row_label(config: Mapping[str, Any]) -> str:
    """Say in words which row this is."""
    model = config["model"]
    kernels, share_sets = (value if isinstance(value, list) else [value] for value in map(model.get, LISTS[:2]))
    try:
        shown = branch_label(kernels)
    except ValueError:  # a mistake, which run_row tells of
        shown = ",".join(map(str, kernels))
    parts = [str(model["name"]), "branches " + shown]
    if "share_sets" in model:
        parts.append("S=" + ",".join(map(str, share_sets)))
    if not model.get("global_perceptron", True):
        parts.append("no Global Perceptron")
    if model.get("embed_kernel"):
        parts.append(f"{model['embed_kernel']}x{model['embed_kernel']} embeddings")
    if config["data"].get("n_train"):
        parts.append(f"{config['data']['n_train']} images")
    parts.append(f"{config['recipe']['epochs']} epoch{'s' if config['recipe']['epochs'] != 1 else ''}")
    parts += [f"{name} {config[of][name]}" for of, names in ADDITIONS.items() for name in names if config[of].get(name)]
    return ", ".join([*parts, f"seed {config['seed']}"])


def run_row(config: Mapping[str, Any]) -> Outcome:
    """Run one row; an error is reported in the outcome and never raised, so that the other rows go on.

    config: task, model, data, recipe, trainer, seed, sweep, study, results_dir, output_dir, rerun, reuse.
    """
    started = time.perf_counter()
    label = row_label(config)
    try:
        _check_numbers(config)
        if config["task"] not in TASKS:
            raise ValueError(f"task={config['task']}: use {' or '.join(TASKS)}")
        TASKS[config["task"]].check(config)
        config = with_backbone(config)
    except (ValueError, OSError) as error:
        return Outcome("failed", label, "", one_line(error))
    key = row_key(config)
    folder = Path(config["output_dir"]) / config["study"] / key
    try:
        path = record_path(config["results_dir"], config["study"], key)
        if skipped := _finished(path, config, label, key):
            return skipped
        if not first_process():  # started by a first process that holds the lock
            _train(config, folder, path)
            return Outcome("finished", label, key, "", time.perf_counter() - started)
        with _row_lock(folder) as owner:
            if owner:
                return Outcome("busy", label, key, f"{owner} trains it now")
            # Another process may have finished it between the look above and the lock.
            if skipped := _finished(path, config, label, key) or _taken_over(path, config, label, key):
                return skipped
            _train(config, folder, path)
    except Exception as error:
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "error.log", "a") as file:
                file.write(traceback.format_exc())
        message = one_line(error)
        if isinstance(error, RuntimeError) and config["trainer"]["devices"] > 1 and "onnect" in message:
            message = f"another process of this run failed, see {folder / 'error.log'} and above ({message})"
        return Outcome("failed", label, key, message, time.perf_counter() - started)
    return Outcome("finished", label, key, str(path), time.perf_counter() - started)


def with_backbone(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Let the weights that a run starts from stand in its configuration by what they are, not by where they lie."""
    if not config.get("backbone"):
        return config
    try:
        with open(Path(config["backbone"]).expanduser(), "rb") as file:
            digest = hashlib.sha256(file.read()).hexdigest()
    except FileNotFoundError as error:
        raise FileNotFoundError(f"backbone={config['backbone']}: there is no such file") from error
    return {**config, "model": {**config["model"], "backbone": digest}}


def first_process() -> bool:
    """Say whether this is rank 0, which looks after the run's files; Lightning starts the others."""
    return getattr(rank_zero_only, "rank", 0) in (0, None)


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, with its type where the message alone would be a riddle."""
    text = str(error)
    if "Original Traceback" in text:  # from a worker process that loads data: the last line says what it was
        text = text.strip().splitlines()[-1].removeprefix("ValueError: ")
    text = " ".join(text.split())
    plain = isinstance(
        error, (ValueError, FileNotFoundError, FloatingPointError, ModuleNotFoundError)
    ) and not isinstance(error, (KeyError, UnicodeError))
    return text if plain and text else f"{type(error).__name__}: {text}"


def _finished(path: Path, config: Mapping[str, Any], label: str, key: str) -> Outcome | None:
    """Return the outcome of a row that has a record already, None where it is to be run."""
    if config["rerun"] or not path.exists():
        return None
    try:
        record = read_record(path)
    except BadRecord as error:
        aside = _set_aside(path)
        log.warning("%s; set aside as %s, the row is run again", error, aside.name)
        return None
    commit = git_state()["commit"]
    message = ""
    if record["commit"] != commit:
        message = f"recorded at commit {_short(record['commit'])}, now {_short(commit)}; rerun=true runs it again"
    return Outcome("skipped", label, key, message)


def _taken_over(path: Path, config: Mapping[str, Any], label: str, key: str) -> Outcome | None:
    """With `reuse`, take the record of the same run from another study; None where there is none."""
    if config["rerun"] or not config.get("reuse"):
        return None
    for other in sorted(Path(config["results_dir"]).glob(f"*/records/{path.name}")):
        with contextlib.suppress(BadRecord):
            record = read_record(other)
            first = record.get("same_run_as", record["study"])
            write_record(path, {**record, "study": config["study"], "sweep": config["sweep"], "same_run_as": first})
            return Outcome("skipped", label, key, f"its record is that of the same run in {first}")
    return None


def _short(commit: str | None) -> str:
    return commit[:9] if commit else "unknown"


def _set_aside(path: Path) -> Path:
    """Rename a damaged file so that nothing reads it and nobody loses it."""
    number = 0
    while (aside := path.with_name(f"{path.name}.damaged{number or ''}")).exists():
        number += 1
    path.rename(aside)
    return aside


@contextlib.contextmanager
def _row_lock(folder: Path) -> Iterator[str | None]:
    """Hold the lock of a row; yields None, or who holds it already ("host X, process Y").

    The operating system lets go of the lock when its holder dies, so a killed run leaves no stale lock behind; what
    its holder had written (owner.json) is then taken over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    owner_file = folder / "owner.json"
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = "another process"
        with contextlib.suppress(OSError, ValueError, KeyError):  # its holder is just writing or removing it
            owner = json.loads(owner_file.read_text())
            holder = f"host {owner['host']}, process {owner['pid']}"
        yield holder
        return
    try:
        if owner_file.exists():
            log.info("taking over from a run that did not end: %s", " ".join(owner_file.read_text().split()))
        owner_file.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        yield None
        owner_file.unlink(missing_ok=True)
    except Exception:
        owner_file.unlink(missing_ok=True)
        raise
    finally:
        lock.release()


def _train(config: Mapping[str, Any], folder: Path, path: Path) -> None:
    """Train, merge, evaluate and record one row."""
    _quieten()
    recipe, options, seed = config["recipe"], config["trainer"], config["seed"]
    state = git_state()
    if options["threads"]:
        torch.set_num_threads(options["threads"])
    if recipe["epochs"] < 1 or not 0 <= recipe["warmup_epochs"] < recipe["epochs"]:
        raise ValueError(
            f"recipe.epochs={recipe['epochs']}, recipe.warmup_epochs={recipe['warmup_epochs']}: "
            "the warm-up has to be shorter than the run"
        )
    if options["precision"] not in PRECISIONS:
        raise ValueError(f"trainer.precision={options['precision']}: use {' or '.join(PRECISIONS)}")
    task = TASKS[config["task"]]
    L.seed_everything(seed, verbose=False)
    data = task.build_data(config)
    data.prepare_data()
    net = task.build_net(config, data)

    bar = sys.stderr.isatty() if options["progress_bar"] is None else options["progress_bar"]
    checkpoints = ModelCheckpoint(
        dirpath=folder,
        filename="last",
        monitor=None,
        every_n_epochs=options["checkpoint_every"],
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    callbacks = [checkpoints, KernelImages(options["kernel_image_every"]), TQDMProgressBar() if bar else EpochLine()]
    if recipe.get("ema_decay"):
        callbacks.append(AveragedWeights(decay=recipe["ema_decay"]))
    trainer = L.Trainer(
        max_epochs=recipe["epochs"],
        accelerator=_accelerator(options["accelerator"]),
        devices=options["devices"],
        num_nodes=options["num_nodes"],
        strategy=options["strategy"],
        sync_batchnorm=options["sync_batchnorm"],
        precision=options["precision"],
        check_val_every_n_epoch=options["eval_every"],
        num_sanity_val_steps=0,
        logger=[CSVLogger(folder, name="csv"), TensorBoardLogger(folder, name="tensorboard")],
        callbacks=callbacks,
        enable_progress_bar=bar,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    data.trainer = trainer
    data.setup()
    params, params_paper, macs = count_params(net), count_params_paper(net), count_macs(net, task.image_size(data))
    train_loader, val_loader = data.train_dataloader(), data.val_dataloader()
    trainer.log_every_n_steps = len(train_loader)
    module = task.build_module(config, net, data, steps_per_epoch=len(train_loader))
    if options["compile"]:
        net.compile(mode=None if options["compile"] is True else options["compile"])
    last = folder / "last.ckpt"
    done = _epochs_done(last, module, state["commit"] if config["rerun"] else None)
    module.commit = state["commit"]
    train_loader.sampler.set_epoch(done)  # workers fetch ahead, before Lightning tells them which epoch it is
    _fit(trainer, module, train_loader, val_loader, last if done else None)
    if not first_process():
        return

    net = module.net.to(trainer.strategy.root_device)
    metrics = task.evaluate(config, net, data)
    n_train, n_eval = data.n_images
    record = {
        "task": task.name,
        "study": config["study"],
        "sweep": config["sweep"],
        "model": config["model"]["name"],
        "kernels": branches.values(config["model"]["kernels"]),
        "share_sets": config["model"].get("share_sets"),
        "global_perceptron": config["model"].get("global_perceptron"),
        "data": config["data"].get("label", config["data"]["name"]),
        "n_train": n_train,
        "n_eval": n_eval,
        "num_classes": data.info.num_classes,
        "seed": seed,
        "epochs": recipe["epochs"],
        "batch_size": recipe["batch_size"],
        **metrics,
        "params": params,
        "params_paper_rule": params_paper,
        "macs": macs,
        "locality": network_profiles(net),
        "train_seconds": module.train_seconds,
        "images_per_second": len(module.curve)
        * module.steps_per_epoch
        * recipe["batch_size"]
        / max(module.train_seconds, 1e-9),
        "device": device_name(trainer.strategy.root_device),
        "processor": processor(),
        "processes": trainer.world_size,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        **state,
        "commits": module.commits,
        "config": _published(config),
        "curve": module.curve,
    }
    save_model(folder / "model.safetensors", net.cpu(), config["model"], {"key": path.stem, "study": config["study"]})
    try:
        write_record(path, record)
    except OSError as error:
        raise OSError(
            f"could not write {path} ({error.strerror or error}): free some space and give the same command again; "
            "the trained weights are kept"
        ) from error
    last.unlink(missing_ok=True)


def _accelerator(name: str) -> str:
    """Return the accelerator to train on; Apple's GPUs have no float64, which merging needs.

    Raises ValueError where "mps" is asked for.
    """
    if name == "mps":
        raise ValueError("trainer.accelerator=mps: it has no float64, which merging needs; use cpu")
    if name == "auto" and not torch.cuda.is_available() and torch.backends.mps.is_available():
        log.info("training on the CPU: Apple's GPU has no float64, which merging needs")
        return "cpu"
    return name


def _check_numbers(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting that is no number or list of numbers, before anything fails on it less clearly."""
    whole = {"seed": config["seed"]} | {
        f"recipe.{name}": config["recipe"][name] for name in ("epochs", "warmup_epochs")
    }
    real = {
        f"recipe.{name}": config["recipe"][name]
        for name in ("lr_per_256", "weight_decay", "clip_norm", "label_smoothing")
    } | {f"recipe.{name}": config["recipe"].get(name, 0.0) for name in ("mixup", "cutmix", "ema_decay")}
    for name, value in whole.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name}={value!r}: use a whole number")
    for part, name in (("trainer", "devices"), ("trainer", "num_nodes"), ("recipe", "batch_size")):
        value = config[part][name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{part}.{name}={value!r}: use a whole number, at least 1")
    if (schedule := config["recipe"].get("schedule", "cosine")) not in SCHEDULES:
        raise ValueError(f"recipe.schedule={schedule!r}: use {' or '.join(SCHEDULES)}")
    if config["trainer"]["strategy"] not in STRATEGIES:
        raise ValueError(f"trainer.strategy={config['trainer']['strategy']}: use {' or '.join(STRATEGIES)}")
    compiled = config["trainer"]["compile"]
    if not isinstance(compiled, (bool, str)) or compiled not in COMPILE:  # 1 is none of them, though it equals True
        raise ValueError(f"trainer.compile={compiled!r}: use false, true or {' or '.join(COMPILE[2:])}")
    processes = config["trainer"]["devices"] * config["trainer"]["num_nodes"]
    mixes = config["recipe"].get("mixup") or config["recipe"].get("cutmix")
    if mixes and config["recipe"]["batch_size"] % (2 * processes):
        raise ValueError(
            f"recipe.batch_size={config['recipe']['batch_size']}: mixup pairs the images of a process, so "
            f"{processes} of them need a multiple of {2 * processes}"
        )
    for name in LISTS:
        value = config["model"].get(name) or []
        if name == "kernels" and isinstance(value, list):
            branches.parse_all(value)
        elif not isinstance(value, list) or not all(type(each) is int for each in value):
            raise ValueError(f"model.{name}={value!r}: use a list of whole numbers, e.g. [1,3]")
    for name, value in real.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise ValueError(f"{name}={value!r}: use a number, not negative")
        if name in ("recipe.label_smoothing", "recipe.ema_decay") and value >= 1:
            raise ValueError(f"{name}={value!r}: use a number below 1")


def _quieten() -> None:
    """Keep Lightning's advice on settings that are meant as they are out of a sweep's output."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for pattern in (
        "Checkpoint directory",
        "`isinstance",
        "The '.*_dataloader' does not have many workers",
        "GPU available",
    ):
        warnings.filterwarnings("ignore", f".*{pattern}.*")


def _fit(trainer: L.Trainer, module: RecipeModule, train_loader: Any, val_loader: Any, checkpoint: Path | None) -> None:
    """Run the fit loop; Ctrl-C comes out as KeyboardInterrupt (Lightning turns it into an exit)."""
    on_cpu = trainer.strategy.root_device.type == "cpu"
    try:
        with freed_memory_kept() if on_cpu else contextlib.nullcontext():
            trainer.fit(
                module,
                train_dataloaders=train_loader,
                val_dataloaders=val_loader,
                ckpt_path=checkpoint,
                weights_only=True,
            )
    except SystemExit as error:
        raise KeyboardInterrupt from error


def _epochs_done(path: Path, module: RecipeModule, only_commit: str | None) -> int:
    """Return after how many epochs a run can go on from `path`, 0 for a fresh start. A damaged file is set aside.

    only_commit: set the checkpoint aside too where other code trained it (a row that is to be run again).
    Raises ValueError for the checkpoint of another network.
    """
    if not path.exists():
        return 0
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state = checkpoint["state_dict"]
    except Exception as error:  # torch.load has no error type of its own for a truncated file
        aside = _set_aside(path)
        log.warning("%s is damaged (%s); set aside as %s, the row is run again", path, one_line(error), aside.name)
        return 0
    try:
        check_state_dict(path, state, module.state_dict())
    except ValueError as error:
        raise ValueError(f"{error}: move it away, or use another study") from error
    trained_by = checkpoint.get("commits", [])
    if only_commit and trained_by != [only_commit]:
        log.info("%s was trained by other code; set aside as %s, the row is run again", path, _set_aside(path).name)
        return 0
    log.info("continuing from %s", path)
    return len(checkpoint["curve"])


def _published(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the whole configuration but for folders and for how the command was given: records are published."""
    kept = {k: v for k, v in config.items() if k not in ("results_dir", "output_dir", "rerun", "reuse", "backbone")}
    return json.loads(json.dumps({**kept, "data": {k: v for k, v in kept["data"].items() if k not in PATHS}}))
