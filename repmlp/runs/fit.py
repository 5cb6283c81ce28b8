"""The training of one run: build, fit from the last checkpoint there is, merge, evaluate, write the record."""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from torch import Tensor

from repmlp import branches
from repmlp.checkpoints import check_state_dict, save_model
from repmlp.cost import count_macs, count_params, count_params_paper
from repmlp.kernels import data_words, network_words
from repmlp.local_perceptron import branches_by
from repmlp.locality import network_profiles
from repmlp.products import products_by, usual_product
from repmlp.runs.outcome import first_process, one_line
from repmlp.runs.provenance import device_name, processor, versions
from repmlp.runs.record import published, reached, set_aside, write_record
from repmlp.runs.settings import BadSetting, Run
from repmlp.runs.tasks import TASKS
from repmlp.trained_on import TrainedOn
from repmlp.training.base import RecipeModule
from repmlp.training.callbacks import AveragedWeights, Checkpoints, Deadline, EvaluationUncompiled, KernelImages
from repmlp.training.compiling import compile_for_training
from repmlp.training.history import History, kept_in
from repmlp.training.memory import freed_memory_kept
from repmlp.training.merging import BATCHES, MergeMidway, drop_branches

log = logging.getLogger(__name__)


def train(settings: Run, folder: Path, path: Path, deadline: float | None, state: Mapping[str, Any]) -> float | None:
    """Train, merge, evaluate and record one run; returns what it reached, None in all processes but the first.

    folder: of checkpoints and logs. path: of the record. deadline: see run.execute. state: commit, and whether the tree
    was dirty.
    """
    _quieten()
    options, task = settings.trainer, TASKS[settings.task]
    if options.threads:
        torch.set_num_threads(options.threads)
    L.seed_everything(settings.seed, verbose=False)
    trainer, history = make_trainer(settings, folder, state["commit"], deadline)
    if options.graph:  # before anything is fetched or built
        check_graphs(trainer.strategy.root_device)
    data = task.build_data(settings)
    data.prepare_data()
    net = branches_by(task.build_net(settings, data), options.branches)
    products_by(net, options.products or usual_product())
    if settings.recipe.merge_after is not None:
        first = round(settings.recipe.merge_after * settings.recipe.epochs)
        # before the history, which looks at the kernels
        trainer.callbacks.insert(0, MergeMidway(first, lambda: _images(data)))
    data.trainer = trainer
    data.setup()
    counts = {
        "params": count_params(net),
        "params_paper_rule": count_params_paper(net),
        "macs": count_macs(net, task.image_size(settings, data)),
    }
    train_loader, val_loader = data.train_dataloader(), data.val_dataloader()
    trainer.log_every_n_steps = len(train_loader)
    module = task.build_module(settings, net, data, steps_per_epoch=len(train_loader))
    module.model_config = settings.model
    module.graph = options.graph
    if options.compile is True:
        compile_for_training(net)
    elif options.compile:  # a CUDA graph is of the whole network
        net.compile(mode=options.compile)
    last = folder / "last.ckpt"
    done = _epochs_done(last, module, state["commit"] if settings.rerun else None)
    train_loader.sampler.set_epoch(done)  # workers fetch ahead, before Lightning tells them which epoch it is
    _fit(trainer, module, train_loader, val_loader, last if done else None)
    if not first_process():
        return None

    net = module.net.to(trainer.strategy.root_device)
    with torch.compiler.set_stance("force_eager"):  # the trained and the merged form, once each
        metrics = task.evaluate(settings, net, data)
    config = published(asdict(settings))
    record = {
        **_description(settings, data),
        **metrics,
        **counts,
        "locality": network_profiles(net),
        "train_seconds": history.train_seconds,
        "images_per_second": len(history.curve)
        * module.steps_per_epoch
        * settings.recipe.batch_size
        / max(history.train_seconds, 1e-9),
        "device": device_name(trainer.strategy.root_device),
        "processor": processor(),
        "processes": trainer.world_size,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        **state,
        "commits": history.commits,
        "config": config,
        "curve": history.curve,
    }
    window = config["recipe"].get("window") or ()
    images = TrainedOn(config["data"], getattr(data.info, "class_names", ()), data.info.mean, data.info.std, window)
    extra = {"key": path.stem, "study": settings.study, **images.to_metadata()}
    model = settings.model if settings.recipe.merge_after is None else {**settings.model, "kernels": []}
    save_model(folder / "model.safetensors", net.cpu(), model, extra)
    try:
        write_record(path, record)
    except OSError as error:
        raise OSError(
            f"could not write {path} ({error.strerror or error}): free some space and give the same command again; "
            "the trained weights are kept"
        ) from error
    last.unlink(missing_ok=True)
    # TensorBoard's table of runs: what each was and what it reached
    trainer.logger.log_hyperparams(config, {"reached_pct": reached(record)})
    trainer.logger.experiment.close()
    return reached(record)


def _images(data: Any) -> Iterator[Tensor]:
    """Give the images of the first batches of training, as they are augmented in the first epoch."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(0)
    return (batch[0] for batch in itertools.islice(loader, BATCHES))


def _description(settings: Run, data: Any) -> dict[str, Any]:
    """Return the fields of a record that say which run it is of."""
    model, (n_train, n_eval) = settings.model, data.n_images
    return {
        "task": settings.task,
        "study": settings.study,
        "sweep": settings.sweep,
        "model": model["name"],
        "kernels": branches.values(model["kernels"]),
        "share_sets": model.get("share_sets"),
        "global_perceptron": model.get("global_perceptron"),
        "data": _data_name(settings),
        "n_train": n_train,
        "n_eval": n_eval,
        "num_classes": data.info.num_classes,
        "seed": settings.seed,
        "epochs": settings.recipe.epochs,
        "batch_size": settings.recipe.batch_size,
    }


def _data_name(settings: Run) -> str:
    return settings.data.get("label") or settings.data["name"]


def make_trainer(settings: Run, folder: Path, commit: str | None, deadline: float | None) -> tuple[L.Trainer, History]:
    """Return Lightning's trainer of a run, and the history that it keeps."""
    recipe, options = settings.recipe, settings.trainer
    bar = sys.stderr.isatty() if options.progress_bar is None else options.progress_bar
    history = History(folder, commit, show=not bar)
    callbacks: list[L.Callback] = [Checkpoints(folder, options.checkpoint_every, deadline)]
    if 0 < options.kernel_image_every <= recipe.epochs:
        network = f"{network_words(settings.model)}, {data_words(_data_name(settings))}"
        callbacks.append(KernelImages(options.kernel_image_every, network))
    if options.compile:
        callbacks.append(EvaluationUncompiled())
    if bar:
        callbacks.append(TQDMProgressBar())
    if recipe.ema_decay:
        callbacks.append(AveragedWeights(decay=recipe.ema_decay))
    if deadline is not None:
        callbacks.append(Deadline(deadline))
    # one folder, also where the run is resumed
    logger = TensorBoardLogger(folder, name="tensorboard", version="", default_hp_metric=False)
    logger.log_hyperparams(published(asdict(settings)))
    trainer = L.Trainer(
        max_epochs=recipe.epochs,
        accelerator=_accelerator(options.accelerator),
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy=options.strategy,
        sync_batchnorm=options.sync_batchnorm,
        precision=options.precision,
        check_val_every_n_epoch=options.eval_every,
        num_sanity_val_steps=0,
        logger=logger,
        callbacks=[*callbacks, history],
        # Lightning's own way to be requeued by Slurm would write into the folder that one stands in, where each later
        # run would go on from it. A run goes on from its own checkpoint, whoever gives the command again.
        default_root_dir=folder,
        plugins=[SLURMEnvironment(auto_requeue=False)] if _by_slurm() else [],
        enable_progress_bar=bar,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    return trainer, history


def check_graphs(device: torch.device) -> None:
    """Raise BadSetting where a step cannot be captured as a CUDA graph."""
    if device.type != "cuda":
        raise BadSetting(f"trainer.graph=true: this run is on the {device.type}, which has no CUDA graphs; use false")


def _by_slurm() -> bool:
    """Say whether Slurm started this process, and Lightning would ask it for ranks (torchrun comes first there)."""
    return SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()


def _accelerator(name: str) -> str:
    """Return the accelerator to train on; Apple's GPUs have no float64, which merging needs.

    Raises BadSetting where "mps" is asked for.
    """
    if name == "mps":
        raise BadSetting("trainer.accelerator=mps: it has no float64, which merging needs; use cpu")
    if name == "auto" and not torch.cuda.is_available() and torch.backends.mps.is_available():
        log.info("training on the CPU: Apple's GPU has no float64, which merging needs")
        return "cpu"
    return name


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
    """Run the fit loop; Ctrl-C comes out as KeyboardInterrupt (Lightning turns it into an exit).

    An exit that someone else asks for, such as the handler of a signal by which a cluster takes a job away, stays one.
    """
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
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise


def _epochs_done(path: Path, module: RecipeModule, only_commit: str | None) -> int:
    """Return after how many epochs a run can go on from `path`, 0 for a fresh start. A damaged file is set aside.

    only_commit: set the checkpoint aside too where other code trained it (a run that is to be done again).
    Raises ValueError for the checkpoint of another network.
    """
    if not path.exists():
        return 0
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        state = checkpoint["state_dict"]
    except Exception as error:  # torch.load has no error type of its own for a truncated file
        aside = set_aside(path)
        log.warning("%s is damaged (%s); set aside as %s, the run is done again", path, one_line(error), aside.name)
        return 0
    merged = checkpoint.get("callbacks", {}).get(MergeMidway.__name__, {}).get("merged")
    expected = module.state_dict()
    if merged:
        expected = {name: tensor for name, tensor in expected.items() if ".local_perceptron." not in name}
    try:
        check_state_dict(path, state, expected)
    except ValueError as error:
        raise ValueError(f"{error}: move it away, or use another study") from error
    history = kept_in(checkpoint)
    if history is None or (only_commit and history["commits"] != [only_commit]):
        log.info("%s was trained by other code; set aside as %s, the run is done again", path, set_aside(path).name)
        return 0
    if merged:
        drop_branches(module.net)
    log.info("continuing from %s", path)
    return len(history["curve"])
