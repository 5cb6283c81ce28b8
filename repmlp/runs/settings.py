"""The settings of a run: the one list of them, with what each means, its default, its check, and its part in the key.

`Run` and what it holds are dataclasses; Hydra composes them (launch.py registers them), so that an unknown setting or
one of another type is refused wherever it is given. The settings of a network are those of its constructor, those of a
data set those of its class: `Model` and `Data` list what they have in common and what a key leaves out of them.

Nothing here imports Lightning or Hydra.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, get_args, get_origin

from repmlp.branches import WAYS, parse_all
from repmlp.processor import PRODUCTS
from repmlp.runs import contrasts

PRECISIONS = ("32-true", "bf16-mixed")
COMPILE = (False, True, "reduce-overhead", "max-autotune")  # the last two with CUDA graphs
STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true")  # each process runs the command itself
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
SCHEDULES = ("cosine", "poly")
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a name", list: "a list in [ ]",
         type(None): "null"}  # fmt: skip
FEW = 12  # settings that are listed where no name is near

# What a setting has to do with the key of a run:
ALWAYS = "always"  # stands in it whatever its value: the settings that the first records have
CHANGED = "changed"  # stands in it where it is not at its neutral value: so a setting that comes later changes no key
NEVER = "never"  # says where or how, and changes no result


def setting(
    default: Any, words: str, key: str = CHANGED, neutral: Any = MISSING, later_in: tuple[str, ...] = ()
) -> Any:
    """Make a field of a dataclass of settings.

    neutral: what older records mean that lack it, where not the default. later_in: names of data sets whose first
    records lack a setting that is ALWAYS in the key of others; with them it is there where it is CHANGED.
    """
    metadata = {
        "help": words, "key": key, "neutral": default if neutral is MISSING else neutral, "later_in": later_in
    }  # fmt: skip
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class BadSetting(ValueError):
    """A setting that is unknown, or whose value cannot be; the message names it by its dotted name."""


def whole(name: str, value: Any, least: int = 0) -> None:
    """Raise BadSetting where a value is no whole number, or too small."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise BadSetting(f"{name}={value!r}: use a whole number" + (f", at least {least}" if least else ""))


def real(name: str, value: Any, least: float = 0.0, below: float = math.inf, above: bool = False) -> None:
    """Raise BadSetting where a value is no finite number in [least, below), or in (least, below) with `above`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadSetting(f"{name}={value!r}: use a number")
    if value < least or (above and value == least):
        raise BadSetting(f"{name}={value!r}: use a number {'above' if above else 'not below'} {least:g}")
    if value >= below:
        raise BadSetting(f"{name}={value!r}: use a number below {below:g}")


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raise BadSetting where a value is none of those allowed."""
    allowed = list(allowed)
    if not any(value is each or (type(value) is type(each) and value == each) for each in allowed):
        words = ["null" if each is None else str(each).lower() if isinstance(each, bool) else each for each in allowed]
        raise BadSetting(f"{name}={value!r}: use {', '.join(words[:-1])} or {words[-1]}")


@dataclass
class Recipe:
    """How a network is trained. Paper: RepMLPNet Sections 5.1-5.2; the defaults are its CIFAR-100 recipe."""

    epochs: int = setting(100, "passes over the training images", ALWAYS)
    batch_size: int = setting(128, "images a step, of all processes together", ALWAYS)
    lr_per_256: float = setting(0.002, "learning rate at batch 256, scaled by batch/256: 0.001 at 128", ALWAYS)
    weight_decay: float = setting(0.1, "AdamW's; none on biases and one-dimensional parameters", ALWAYS)
    betas: list[float] = setting([0.9, 0.999], "AdamW's", ALWAYS)
    warmup_epochs: int = setting(10, "epochs in which the learning rate rises linearly from 0", ALWAYS)
    clip_norm: float | None = setting(5.0, "largest norm of the gradient; null for no clipping", ALWAYS)
    label_smoothing: float = setting(0.1, "the released script's default; the paper does not say for CIFAR-100", ALWAYS)
    schedule: str = setting("cosine", "of the learning rate after the warm-up: cosine or poly")
    decay_all: bool = setting(False, "weight decay on biases and one-dimensional parameters too")
    mixup: float = setting(0.0, "alpha; each batch is mixed by mixup or by CutMix; 0 for none")
    cutmix: float = setting(0.0, "alpha; 0 for none")
    ema_decay: float = setting(0.0, "exponential moving average of the weights, e.g. 0.9999; 0 for none")
    layer_decay: float = setting(
        1.0, "learning rate of a layer as a share of the next one's, for fine-tuning; 1 for none"
    )
    merge_after: float | None = setting(
        None, "merge the branches after this share of the epochs and go on with the bare FC; null: after training"
    )
    train_only: str | None = setting(None, "head: train the classifier alone (linear probe); null: everything")

    def __post_init__(self) -> None:
        whole("recipe.epochs", self.epochs, 1)
        whole("recipe.batch_size", self.batch_size, 1)
        whole("recipe.warmup_epochs", self.warmup_epochs)
        if self.warmup_epochs >= self.epochs:
            raise BadSetting(
                f"recipe.epochs={self.epochs}, recipe.warmup_epochs={self.warmup_epochs}: the warm-up has to be "
                "shorter than the run"
            )
        real("recipe.lr_per_256", self.lr_per_256, above=True)
        real("recipe.weight_decay", self.weight_decay)
        if len(self.betas) != 2:
            raise BadSetting(f"recipe.betas={list(self.betas)}: AdamW has two of them, e.g. [0.9,0.999]")
        for beta in self.betas:
            real("recipe.betas", beta, below=1)
        if self.clip_norm is not None:
            if self.clip_norm == 0:
                raise BadSetting("recipe.clip_norm=0: every gradient would be 0; use null for no clipping")
            real("recipe.clip_norm", self.clip_norm, above=True)
        real("recipe.label_smoothing", self.label_smoothing, below=1)
        one_of("recipe.schedule", self.schedule, SCHEDULES)
        real("recipe.mixup", self.mixup)
        real("recipe.cutmix", self.cutmix)
        real("recipe.ema_decay", self.ema_decay, below=1)
        real("recipe.layer_decay", self.layer_decay, above=True)
        if self.layer_decay > 1:
            raise BadSetting(f"recipe.layer_decay={self.layer_decay}: use a share, at most 1")
        if self.merge_after is not None:
            real("recipe.merge_after", self.merge_after, below=1)
            if self.ema_decay:
                raise BadSetting(
                    "recipe.merge_after: averaged weights would have no branches to average; use ema_decay=0"
                )
        one_of("recipe.train_only", self.train_only, (None, "head"))

    def check_processes(self, processes: int) -> None:
        """Raise BadSetting where `processes` cannot share a batch."""
        if self.batch_size % processes:
            raise BadSetting(f"recipe.batch_size={self.batch_size}: {processes} processes cannot share it equally")
        if self.merge_after is not None and processes > 1:
            raise BadSetting(f"recipe.merge_after: {processes} processes cannot merge together; use trainer.devices=1")
        if (self.mixup or self.cutmix) and self.batch_size % (2 * processes):
            raise BadSetting(
                f"recipe.batch_size={self.batch_size}: mixup pairs the images of a process, so {processes} of them "
                f"need a multiple of {2 * processes}"
            )


@dataclass
class SegmentationRecipe(Recipe):
    """How UperNet is trained. Paper: RepMLPNet Section 5.3."""

    auxiliary_weight: float = setting(0.4, "of the auxiliary head's loss", ALWAYS)
    window: list[int] | None = setting(
        None, "[height, width] of sliding windows in evaluation; null: whole images", ALWAYS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        real("recipe.auxiliary_weight", self.auxiliary_weight)
        if self.window is not None and (
            len(self.window) != 2 or any(type(side) is not int or side < 32 or side % 32 for side in self.window)
        ):
            raise BadSetting(
                f"recipe.window={list(self.window)}: use [height,width] in multiples of 32, or null for whole images"
            )
        for name in ("mixup", "cutmix"):
            if getattr(self, name):
                raise BadSetting(f"recipe.{name}={getattr(self, name)}: labels of pixels are not mixed; use 0")


@dataclass
class Trainer:
    """Where and how a run is done. Only `precision`, and processes that share a batch, change a result."""

    accelerator: str = setting("auto", "cpu, gpu or auto", NEVER)
    devices: int = setting(1, "processes on this machine that share a batch; a sweep gives each run one", NEVER)
    num_nodes: int = setting(1, "machines", NEVER)
    strategy: str = setting("auto", "ddp for several devices", NEVER)
    sync_batchnorm: bool = setting(False, "false: batch norm sees the share of its own device, as in the paper", NEVER)
    precision: str = setting("32-true", "bf16-mixed for bfloat16 autocast (part of a run's key)", NEVER)
    compile: Any = setting(False, "true: torch.compile; reduce-overhead, max-autotune: with CUDA graphs", NEVER)
    graph: bool = setting(False, "true: the step of training as one CUDA graph (NVIDIA GPUs)", NEVER)
    branches: str = setting("channels", "how depth-wise branches are computed: channels, sets or matrix", NEVER)
    products: str | None = setting(
        None, "how RepMLPNet multiplies on a CPU: linear or convolution; null: what suits the processor", NEVER
    )
    threads: int | None = setting(None, "CPU threads, null for torch's choice", NEVER)
    eval_every: int = setting(1, "epochs between two evaluations; the last epoch is what is reported", NEVER)
    checkpoint_every: int | None = setting(
        None, "epochs between two checkpoints; null: as often as takes two percent of the time", NEVER
    )
    kernel_image_every: int = setting(10, "epochs between two kernel pictures in TensorBoard, 0 for none", NEVER)
    progress_bar: bool | None = setting(None, "null: a bar on a terminal, a line an epoch elsewhere", NEVER)
    minutes: float | None = setting(
        None, "of a sweep: start no run that cannot end within them; null for no limit", NEVER
    )

    def __post_init__(self) -> None:
        one_of("trainer.accelerator", self.accelerator, ACCELERATORS)
        for name in ("devices", "num_nodes", "eval_every"):
            whole(f"trainer.{name}", getattr(self, name), 1)
        whole("trainer.kernel_image_every", self.kernel_image_every)
        for name in ("threads", "checkpoint_every"):
            if getattr(self, name) is not None:
                whole(f"trainer.{name}", getattr(self, name), 1)
        if self.minutes is not None:
            real("trainer.minutes", self.minutes, above=True)
        one_of("trainer.strategy", self.strategy, STRATEGIES)
        one_of("trainer.precision", self.precision, PRECISIONS)
        one_of("trainer.compile", self.compile, COMPILE)
        if self.graph and isinstance(self.compile, str):
            raise BadSetting(
                f"trainer.graph=true, trainer.compile={self.compile}: both would capture graphs; use "
                "trainer.compile=true or false"
            )
        if self.graph and self.processes > 1:
            raise BadSetting(
                f"trainer.graph=true: {self.processes} processes do not share a captured step; use trainer.devices=1"
            )
        one_of("trainer.branches", self.branches, WAYS)
        if self.products is not None:
            one_of("trainer.products", self.products, PRODUCTS)

    @property
    def processes(self) -> int:
        return self.devices * self.num_nodes


@dataclass
class Data:
    """What the settings of all data sets have in common; the others are those of the data set's class."""

    name: str = setting("", "which data set", ALWAYS)
    label: str | None = setting(None, "what records and tables call it; null: its folder's name", neutral="imagenet")
    root: str | None = setting(None, "folder that holds it", NEVER)
    download: bool = setting(True, "fetch it where it is absent", NEVER)
    workers: int = setting(0, "processes that decode images", NEVER)
    eval_batch_size: int = setting(500, "images of evaluation at once", NEVER)
    n_train: int | None = setting(None, "that many training images, spread over the classes; null for all", ALWAYS)
    n_eval: int | None = setting(None, "the same of the images to evaluate on")
    holdout: float = setting(
        0.0, "evaluate on this share of the training images instead", ALWAYS, later_in=("patterns",)
    )
    randaugment: int | None = setting(None, "magnitude of RandAugment out of 30; null for none")
    interpolation: str | None = setting(None, "of resizing in evaluation: bilinear or bicubic", neutral="bicubic")
    shift: int = setting(0, "patterns: pixels by which each image's arrangement is moved at most")
    answer: str = setting("both", "patterns: the half of a label that is asked for, texture or arrangement")
    fingerprint: str | None = setting(None, "digest of a folder of images; made by the run itself")

    def __post_init__(self) -> None:
        for name in ("n_train", "n_eval"):
            if getattr(self, name) is not None:
                whole(f"data.{name}", getattr(self, name), 1)
        real("data.holdout", self.holdout, below=1)
        whole("data.workers", self.workers)
        whole("data.eval_batch_size", self.eval_batch_size, 1)


@dataclass
class Model:
    """What a key leaves out of the settings of networks; the others are those of the network's constructor."""

    name: str = setting("", "what records and tables call it", NEVER)
    arch: str = setting("", "which constructor: repmlpnet, timm, upernet, ...", ALWAYS)
    kernels: list[int | str] = setting([], "the branches (branches.py), [] for none", ALWAYS)
    share_sets: list[int] | None = setting(None, "one number a stage", ALWAYS)
    channels: list[int] | None = setting(None, "one number a stage", ALWAYS)
    blocks: list[int] | None = setting(None, "one number a stage", ALWAYS)
    drop_path_rate: float = setting(0.0, "largest rate of stochastic depth, of the last block")
    arguments: dict[str, Any] | None = setting(None, "more arguments of the constructor")
    weights: str | None = setting(None, "digest of the weights that the network started from; made by the run itself")
    backbone: str | None = setting(None, "digest of the weights that a backbone started from; made by the run itself")

    def __post_init__(self) -> None:
        if not isinstance(self.arch, str) or not self.arch:
            raise BadSetting(f"model.arch={self.arch!r}: say which network it is")
        try:
            parse_all(self.kernels)
        except ValueError as error:
            raise BadSetting(f"model.{error}") from None
        for name in ("share_sets", "channels", "blocks"):
            value = getattr(self, name)
            if value is not None and not (
                isinstance(value, list) and value and all(type(each) is int and each > 0 for each in value)
            ):
                raise BadSetting(f"model.{name}={value!r}: use a list of whole numbers above 0, e.g. [1,3]")
        real("model.drop_path_rate", self.drop_path_rate, below=1)


@dataclass
class Run:
    """One run: what is trained on what and how, and where its record goes."""

    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Recipe)
    trainer: Trainer = field(default_factory=Trainer)
    task: str = setting("classification", "or segmentation (segment.py)", NEVER)
    sweep: str = setting("single", "name of the sweep; sweep files set it", NEVER)
    study: str = setting("${sweep}_${data.name}", "folder under results/ and outputs/", NEVER)
    seed: int = setting(0, "of initial weights, order and augmentation; seed=0,1,2 with -m runs three", ALWAYS)
    weights: str | None = setting(
        None, "classification: file of weights to start from (fine-tuning); its content is in the key", NEVER
    )
    backbone: str | None = setting(
        None, "segmentation: file of a classifier to start from; its content is in the key", NEVER
    )
    contrasts: list[Any] = setting([], "what the study compares, named before its runs; see runs/contrasts.py", NEVER)
    rerun: bool = setting(False, "run again what has a record", NEVER)
    reuse: bool = setting(False, "where another study has the record of the same run, take it (no weights)", NEVER)
    results_dir: str = setting("results", "records, small and committed", NEVER)
    output_dir: str = setting("outputs", "checkpoints and logs, never committed", NEVER)

    def __post_init__(self) -> None:
        for part, needed in (("model", ("name", "kernels")), ("data", ("name",))):
            for name in needed:
                if name not in getattr(self, part):
                    raise BadSetting(f"{part}.{name} is missing: a {part} has to say it")
        known(Model, self.model, "model", open_ended=True)
        known(Data, self.data, "data", open_ended=True)
        whole("seed", self.seed)
        if self.seed >= 2**32:
            raise BadSetting(f"seed={self.seed}: use a whole number below 2**32")
        for name in ("study", "results_dir", "output_dir"):
            if not str(getattr(self, name)).strip():
                raise BadSetting(f"{name}={getattr(self, name)!r}: it is the name of a folder and cannot be empty")
        if any(part in (".", "..") or part.startswith("/") for part in [self.study, *self.study.split("/")]):
            raise BadSetting(f"study={self.study!r}: it is the name of a folder under {self.results_dir}")
        try:
            contrasts.parse(self.contrasts)
        except ValueError as error:
            raise BadSetting(f"contrasts: {error}") from None
        self.recipe.check_processes(self.trainer.processes)
        if self.trainer.graph and self.recipe.merge_after is not None:
            raise BadSetting(
                "trainer.graph=true: a captured step cannot lose its branches (recipe.merge_after); use false"
            )


PARTS: dict[str, type] = {"model": Model, "data": Data, "recipe": SegmentationRecipe, "trainer": Trainer}


def known(kind: type, values: Mapping[str, Any], part: str, open_ended: bool = False) -> Any:
    """Make a dataclass of settings from plain values, whose checks then run.

    open_ended: ignore the settings that it does not list, which another place checks.
    Raises BadSetting for an unknown setting, offering the nearest name.
    """
    names = {each.name for each in dataclasses.fields(kind)}
    if not open_ended:
        for name in values:
            if name not in names:
                raise unknown(f"{part}.{name}", values[name], [f"{part}.{each}" for each in names])
    return kind(**{name: value for name, value in values.items() if name in names})


def unknown(name: str, value: Any, names: Iterable[str]) -> BadSetting:
    """Return the error for a setting that there is not, with the nearest names there are, or all where they are few."""
    leaf = name.rsplit(".", 1)[-1]
    by_leaf = {each.rsplit(".", 1)[-1]: each for each in names}
    words = set(leaf.split("_"))
    within = [each for each in by_leaf if leaf in each.split("_") or each in words]
    shared = [each for each in by_leaf if any(len(word) > 3 for word in words & set(each.split("_")))]  # grad_clip
    near = [by_leaf[each] for each in [*difflib.get_close_matches(leaf, by_leaf, n=2, cutoff=0.75), *within, *shared]]
    near = list(dict.fromkeys(near))[:2]
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif len(by_leaf) <= FEW:
        hint = f"there are {', '.join(sorted(by_leaf.values()))}"
    else:
        hint = "--help shows those that there are"
    return BadSetting(f"{name}={value}: there is no setting {name}; {hint}")


def words_for(annotation: Any) -> str | None:
    """Say what a setting of a type can be, "a whole number or null"; None where the type says nothing."""
    kinds = get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    words = [KINDS.get(get_origin(each) or each) for each in kinds]
    return None if None in words else " or ".join(words)


def run_of(config: Mapping[str, Any]) -> Run:
    """Make a Run from a composed configuration in plain values; BadSetting for whatever cannot be.

    A setting that is absent is at its default.
    """
    config = dict(config)
    for part in ("model", "data", "recipe", "trainer"):
        if not isinstance(config.get(part), Mapping):
            raise BadSetting(f"{part}={config.get(part)!r}: it is a group of settings; choose one, e.g. {part}=NAME")
    one_of("task", config.get("task", "classification"), ("classification", "segmentation"))
    recipe = SegmentationRecipe if config.get("task") == "segmentation" else Recipe
    if recipe is SegmentationRecipe and (missing := {"auxiliary_weight", "window"} - config["recipe"].keys()):
        raise BadSetting(f"the recipe lacks {' and '.join(sorted(missing))}: use recipe=segmentation or another one")
    config["recipe"] = known(recipe, config["recipe"], "recipe")
    config["trainer"] = known(Trainer, config["trainer"], "trainer")
    names = {each.name for each in dataclasses.fields(Run)}
    for name in config:
        if name not in names:
            raise unknown(name, config[name], names)
    return Run(**config)
