"""What a run of classification and one of segmentation do differently; everything else about a run is in run.py."""

from __future__ import annotations

import inspect
import logging
import types
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args, get_type_hints

from torch import nn

from repmlp.backbones import start_backbone
from repmlp.data import DATASETS, SEGMENTATION, build_data, build_segmentation_data
from repmlp.finetuning import start_from
from repmlp.models.build import ARCHITECTURES, PIXELS, build_model
from repmlp.models.pspnet import PSPNet
from repmlp.models.repmlp_partitions import check_images, takes_any_size
from repmlp.models.repmlpnet import RepMLPNet
from repmlp.models.upernet import STRIDE
from repmlp.runs.progress import told
from repmlp.runs.settings import BadSetting, Run, unknown, words_for
from repmlp.sizes import height_width
from repmlp.training.base import RecipeModule
from repmlp.training.classifier import Classifier
from repmlp.training.merge_check import compare_merged
from repmlp.training.recalls import Recalls
from repmlp.training.segmenter import Segmenter, compare_merged_masks

log = logging.getLogger(__name__)


class Classification:
    """One label an image."""

    name = "classification"
    datasets: Mapping[str, type] = DATASETS

    def check(self, run: Run) -> None:
        """Raise BadSetting for settings that fit no run of this task."""
        self.check_task(run)
        check_names("model", run.model, ("name", "arch"), ARCHITECTURES.get(run.model["arch"]))
        check_names("data", run.data, ("name", "label"), self.datasets.get(run.data["name"]))

    def check_task(self, run: Run) -> None:
        if isinstance(size := run.model.get("img_size"), list):
            raise BadSetting(f"model.img_size={size}: images are cropped to squares, use one whole number of pixels")
        if run.model["arch"] in PIXELS:
            raise BadSetting(f"model={run.model['name']} labels pixels: train it with experiments/segment.py")
        if run.backbone:
            raise BadSetting("backbone is a setting of experiments/segment.py: a classifier starts from weights=FILE")

    def build_data(self, run: Run) -> Any:
        return build_data(run.data, run.recipe.batch_size, run.seed)

    def build_net(self, run: Run, data: Any) -> nn.Module:
        """Build the network; it starts from the weights of another where `weights` names a file."""
        net = build_model(run.model, data.info.num_classes)
        if run.weights:
            log.info(
                "weights from %s; %s",
                run.weights,
                start_from(net, Path(run.weights).expanduser(), data.info.class_names),
            )
        check_image_size(net, data.info.img_size)
        return net

    def image_size(self, run: Run, data: Any) -> int | tuple[int, int]:
        """Return the size of the images that multiply-accumulates are counted for, once the data are set up."""
        return data.info.img_size

    def build_module(self, run: Run, net: nn.Module, data: Any, steps_per_epoch: int) -> RecipeModule:
        info = data.info
        return Classifier(
            net, asdict(run.recipe), steps_per_epoch, num_classes=info.num_classes, parts=info.parts, seed=run.seed
        )

    def evaluate(self, run: Run, net: nn.Module, data: Any) -> dict[str, Any]:
        """Return what the record says of the trained network, before and after merging."""
        info = data.info
        recalls = Recalls(info.num_classes, info.class_names)
        batches = told(data.whole_evaluation(), data.n_images[1], log.info)
        _, metrics = compare_merged(net, batches, info.num_classes, info.parts, watch=recalls.update)
        return {**metrics, **recalls.of_record()}


class Segmentation(Classification):
    """One label a pixel."""

    name = "segmentation"
    datasets = SEGMENTATION

    def check_task(self, run: Run) -> None:
        if run.model["arch"] not in PIXELS:
            raise BadSetting(
                f"model={run.model['name']} labels no pixels: use one of the upernets or pspnets, model=NAME"
            )
        if run.weights:
            raise BadSetting(
                "weights is a setting of classifiers: a network that labels pixels starts from backbone=FILE"
            )
        if run.recipe.batch_size < 2 * run.trainer.processes and not run.trainer.sync_batchnorm:
            raise BadSetting(
                f"recipe.batch_size={run.recipe.batch_size} on {run.trainer.processes} process(es): a batch norm "
                "behind pooled maps sees one number an image, so each process needs two images; use fewer devices or "
                "trainer.sync_batchnorm=true"
            )

    def build_data(self, run: Run) -> Any:
        return build_segmentation_data(run.data, run.recipe.batch_size, run.seed)

    def build_net(self, run: Run, data: Any) -> nn.Module:
        """Build the network; its backbone starts from the weights of a classifier where `backbone` names a file."""
        net = build_model(run.model, data.info.num_classes)
        if isinstance(net, PSPNet):
            check_sizes(net, run)
        if run.backbone:
            fresh = start_backbone(net, Path(run.backbone).expanduser())
            log.info("backbone from %s; fresh: %s", run.backbone, ", ".join(fresh) or "nothing")
        return net

    def image_size(self, run: Run, data: Any) -> tuple[int, int]:
        """Return what of the first image of evaluation the network sees at once: a window, or it all, padded."""
        height, width = (side + -side % STRIDE for side in data.image_size)
        window = run.recipe.window or (height, width)
        return min(height, window[0]), min(width, window[1])

    def build_module(self, run: Run, net: nn.Module, data: Any, steps_per_epoch: int) -> RecipeModule:
        return Segmenter(net, asdict(run.recipe), steps_per_epoch, data.info.classes, seed=run.seed)

    def evaluate(self, run: Run, net: nn.Module, data: Any) -> dict[str, Any]:
        batches = told(data.whole_evaluation(), data.n_images[1], log.info)
        return compare_merged_masks(net, batches, data.info.classes, run.recipe.window)


def check_sizes(net: PSPNet, run: Run) -> None:
    """Raise BadSetting where a PSPNet does not take the images that it would be trained and evaluated on."""
    if takes_any_size(net.backbone):
        return
    built = str(list(height_width(run.model.get("img_size", 713)))).replace(" ", "")
    for name, size in (("data.crop_size", run.data["crop_size"]), ("recipe.window", run.recipe.window)):
        if size is None:
            raise BadSetting(
                f"{name}=null: model={run.model['name']} takes images of one size, no whole ones; use {name}={built}"
            )
        try:
            check_images(net.backbone, size)
        except ValueError as error:
            raise BadSetting(
                f"{name}={size}: {error}; use {name}={built}, the network's img_size, or build it with another"
            ) from None


TASKS: dict[str, Classification] = {task.name: task for task in (Classification(), Segmentation())}


def check_image_size(net: nn.Module, img_size: int) -> None:
    """Raise BadSetting where a RepMLPNet would pad each image, which is no whole number of its own images high."""
    if isinstance(net, RepMLPNet) and any(img_size % side for side in net.img_size):
        own = net.img_size[0] if net.img_size[0] == net.img_size[1] else list(net.img_size)
        raise BadSetting(f"model.img_size={own}: the images have {img_size}x{img_size} pixels; use {img_size}")


def check_names(part: str, given: Mapping[str, Any], labels: tuple[str, ...], build: Callable[..., Any] | None) -> None:
    """Raise BadSetting where a setting is none of `build`'s arguments, offering the nearest one.

    labels: settings that are looked at elsewhere. build: a class or function; None where the name that chooses it is
    unknown, which its own builder says.
    """
    if build is None:
        return
    names: dict[str, None] = dict.fromkeys(labels)
    hints: dict[str, Any] = {}
    for each in inspect.getmro(build) if inspect.isclass(build) else (build,):
        if each is object or (inspect.isclass(each) and "__init__" not in vars(each)):
            continue
        hints = {**get_type_hints(each.__init__ if inspect.isclass(each) else each), **hints}
        parameters = inspect.signature(each).parameters.values()
        names |= dict.fromkeys(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    else:  # it hands anything else on, so that what it builds says which arguments it has not
        return
    for name in (
        "self",
        "batch_size",
        "seed",
        "num_classes",
        "inference_mode",
    ):  # given by the run, not by its settings
        names.pop(name, None)
    for name, value in given.items():
        if name not in names:
            raise unknown(f"{part}.{name}", value, [f"{part}.{each}" for each in names])
        check_type(f"{part}.{name}", value, hints.get(name))


def check_type(name: str, value: Any, annotation: Any) -> None:
    """Raise BadSetting where an argument that is a truth or a number, perhaps None, is given as something else.

    What other arguments may be is said by what they are handed to.
    """
    allowed = set(get_args(annotation)) if isinstance(annotation, types.UnionType) else {annotation}
    if not allowed <= {bool, int, float, type(None)}:
        return
    given = type(value)
    if given not in allowed and not (given is int and float in allowed):
        raise BadSetting(f"{name}={value!r}: use {words_for(annotation)}")
