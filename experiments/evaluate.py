"""Evaluate a trained network before and after merging, and the merged one in bfloat16, int8 or from an ONNX file.

    python experiments/evaluate.py checkpoint=outputs/STUDY/KEY/model.safetensors
    python experiments/evaluate.py checkpoint=RepMLPNet-T224.pth data=imagenet data.root=FOLDER precisions=[bf16,int8]
    python experiments/evaluate.py checkpoint=FILE data=patterns onnx=FOLDER/export/model.onnx out=FILE.json
    python experiments/evaluate.py checkpoint=FILE data=camvid data.root=FOLDER          # labels of pixels: mIoU

Of a folder of images val/ alone will do; int8 may take its scales from train/. Where classes have different numbers of
images, the recall of each and their mean, the balanced accuracy, are told too.
int8: the deployed form where there is one, exported to ONNX, quantised, run in ONNX Runtime; needs `repmlp[export]`.
calibration_images=500 takes the scales of activations from so many training images, not from each batch as it comes.
Relative paths are taken from where you stand. Nothing is written but the JSON file that `out` names.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, ListConfig, OmegaConf

from repmlp.runs.command_line import place
from repmlp.runs.key import PATHS
from repmlp.runs.launch import checkpoint_of, device_of, mistakes_in_one_line, run_command
from repmlp.runs.progress import told
from repmlp.runs.record import write_json
from repmlp.runs.settings import whole
from repmlp.trained_on import TrainedOn

if TYPE_CHECKING:  # torch and what needs it is imported where it is used: --help comes without
    from onnxruntime import InferenceSession
    from torch import Tensor, nn

    from repmlp.export import Quantised

SHOWN = 20  # most classes whose recall is printed
PRECISIONS = ("float32", "bf16", "int8")
GENERATED = ("data_seed", "shift", "answer")  # settings of the embedded patterns that say what their classes are


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(config: DictConfig) -> None:
    with mistakes_in_one_line():
        results = evaluate(config)
        from masks import mask_table

        print(mask_table(results) if "miou_pct" in results else table(results))
        if config.out:
            write_json(place(config.out), results)


def evaluate(config: DictConfig) -> dict[str, Any]:
    """Run every form of the network over the same images.

    Returns what the JSON file holds: `rows`, one a form, with top1_pct, top5_pct (of more than five classes),
    drop_points (top-1 against the merged float32 network) and disagreements (images whose first guess differs from that
    network's); `classes`, images and recall of each in the merged network, and the balanced accuracy; all that
    compare_merged says; what was quantised; data, device, versions. Of a network that labels pixels: evaluate_masks.
    """
    _check(config)
    checkpoint = checkpoint_of(config)
    import torch
    from masks import evaluate_masks

    from repmlp.checkpoints import open_checkpoint
    from repmlp.data import build_data
    from repmlp.export import image_size, onnx_session, run_onnx
    from repmlp.models.build import PIXELS, check_num_classes
    from repmlp.runs.provenance import measured_on
    from repmlp.training.classifier import tops
    from repmlp.training.merge_check import compare_merged
    from repmlp.training.recalls import Recalls

    if config.threads:
        torch.set_num_threads(config.threads)
    device = device_of(config.device)
    net, network, metadata = open_checkpoint(checkpoint)
    trained = TrainedOn.from_metadata(metadata)
    if network["arch"] in PIXELS:
        check_data(config.checkpoint, trained, config.data)
        return evaluate_masks(config, net, trained, device)
    if config.model.img_size is None:
        height, width = image_size(net, network)
        config.model.img_size = height if height == width else None
    settings = OmegaConf.to_container(config.data, resolve=True)
    check_data(config.checkpoint, trained, settings)
    data = build_data(settings, batch_size=1, seed=0, evaluation_only=True)
    data.prepare_data()
    check_classes(config.checkpoint, trained, data.info.class_names)
    check_num_classes(config.checkpoint, net, settings["name"], data.info.num_classes)
    data.setup()
    check_classes(config.checkpoint, trained, data.info.class_names)  # some are known only now
    n, num_classes = data.n_images[1], data.info.num_classes

    wanted = "int8" in config.precisions and config.calibration_images is not None
    calibration = data.calibration(config.calibration_images) if wanted else None
    others: dict[str, Callable[[Tensor], Tensor]] = {}
    if config.onnx:  # looked at before anything takes time
        session = onnx_session(place(config.onnx), config.threads)
        _check_onnx(session, config.onnx, num_classes, data.info.img_size)
        others[f"{Path(config.onnx).name}, ONNX Runtime"] = partial(run_onnx, session)
    recalls = Recalls(num_classes, data.info.class_names)
    merged, metrics = compare_merged(
        net.to(device), told(data.whole_evaluation(), n), num_classes, data.info.parts, watch=recalls.update
    )
    rows = [
        _row(name, {k: metrics[f"top{k}{suffix}_pct"] for k in tops(num_classes)}, disagreements)
        for name, suffix, disagreements in (
            ("as trained, float32", "", metrics["merge_disagreements"]),
            ("merged, float32", "_merged", 0),
        )
    ]
    quantised = None
    if "int8" in config.precisions:
        session, form, quantised = _int8(merged, data.info.img_size, calibration, config.threads)
        others = {f"{form}, int8, ONNX Runtime": partial(run_onnx, session), **others}
    if "bf16" in config.precisions:
        half = copy.deepcopy(merged).to(torch.bfloat16)
        others = {"merged, bf16": lambda images: half(images.to(torch.bfloat16)), **others}
    if others:
        rows += score(merged, others, told(data.whole_evaluation(), n))
    for row in rows:
        row["drop_points"] = round(rows[1]["top1_pct"] - row["top1_pct"], 4) + 0.0  # no -0.0
    packages = ["torch", "timm", *(["onnx", "onnxruntime"] if quantised or config.onnx else [])]
    return {
        "checkpoint": str(config.checkpoint),
        "data": {name: value for name, value in settings.items() if name not in (*PATHS, "n_train", "randaugment")},
        "images": n,
        "rows": rows,
        "classes": recalls.rows(),
        "balanced_accuracy_pct": recalls.balanced(),
        "merging": metrics,
        "quantised": None if quantised is None else quantised._asdict(),
        "calibration_images": None if quantised is None else config.calibration_images,
        **measured_on(device, packages),
    }


def check_data(checkpoint: str, trained: TrainedOn, settings: Mapping[str, Any]) -> None:
    """Raise ValueError where a checkpoint says that it was trained on other data than `settings` name.

    Another data set, or generated images whose classes mean something else.
    """
    for name in ("name", *GENERATED):
        own, given = trained.data.get(name, settings.get(name)), settings.get(name)
        if own != given:
            said = "data" if name == "name" else f"data.{name}"
            raise ValueError(
                f"{checkpoint} was trained on {said}={own}, and would be measured on {given}: say {said}={own}"
            )


def check_classes(checkpoint: str, trained: TrainedOn, names: Sequence[str]) -> None:
    """Raise ValueError where a checkpoint's classes have other names than those of the images."""
    own = trained.class_names
    if own and names and tuple(names) != own:
        first, other = next(((a, b) for a, b in zip(own, names, strict=False) if a != b), (len(own), len(names)))
        raise ValueError(f"{checkpoint} was trained on other classes: {first!r} there, {other!r} in the images")


def score(
    merged: nn.Module, others: Mapping[str, Callable[[Tensor], Tensor]], loader: Iterable[tuple[Tensor, Tensor]]
) -> list[dict[str, Any]]:
    """Run other forms of the merged network beside it, all on each batch in turn; returns a row for each form."""
    import torch

    from repmlp.compare import Comparer
    from repmlp.training.classifier import tops

    device = next(merged.parameters()).device
    hits = {name: dict.fromkeys((1, 5), 0) for name in others}
    comparers = {name: Comparer() for name in others}
    n = 0
    with torch.no_grad():
        for images, labels in loader:
            images, labels = images.to(device), labels.cpu()
            expected = merged(images).cpu()
            n += len(labels)
            for name, run in others.items():
                logits = run(images).float().cpu()
                for k in tops(logits.shape[1]):
                    # (B, K) -> (B, k)
                    hits[name][k] += int((logits.topk(k).indices == labels[:, None]).sum())
                comparers[name].update(expected, logits)
    return [
        _row(name, {k: 100 * hits[name][k] / n for k in tops(logits.shape[1])}, comparers[name].result().changed)
        for name in others
    ]


def table(results: Mapping[str, Any]) -> str:
    """Write the results as a Markdown table, with what has to be known to read it below."""
    import pandas as pd

    from repmlp.export import Quantised

    rows = [
        {
            "network": row["network"],
            **{f"top-{k} %": f"{row[f'top{k}_pct']:.2f}" for k in (1, 5) if f"top{k}_pct" in row},
            "drop": f"{row['drop_points']:.2f}",
            "disagreements": row["disagreements"],
        }
        for row in results["rows"]
    ]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines = [
        pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True),
        "",
        f"{results['images']} images of {results['data'].get('label', results['data']['name'])}; {results['device']}, "
        f"{results['threads']} thread(s), {versions}. drop: points of top-1 below the merged float32 network; "
        f"disagreements: images whose first guess differs from its. "
        f"Merging changed the logits by {results['merging']['merge_error']:.1e} (relative).",
    ]
    lines += recall_lines(results["classes"], results["balanced_accuracy_pct"])
    if results["quantised"]:
        n = results["calibration_images"]
        scales = "from each batch" if n is None else f"from {n} training images"
        lines.append(f"int8: {Quantised(**results['quantised'])}; scales of activations {scales}.")
    return "\n".join(lines)


def recall_lines(classes: Sequence[Mapping[str, Any]], balanced: float) -> list[str]:
    """Write the recall of each class, the lowest of many; nothing where classes are even."""
    import pandas as pd

    from repmlp.training.recalls import uneven

    counts = [each["images"] for each in classes]
    if not uneven(counts):
        return []
    shown = list(classes)
    if len(shown) > SHOWN:
        shown = sorted((each for each in classes if each["images"]), key=lambda each: each["recall_pct"])[:SHOWN]
    rows = [
        {
            "class": each["class"],
            "images": each["images"],
            "recall %": f"{each['recall_pct']:.2f}" if each["images"] else "-",
        }
        for each in shown
    ]
    which = "" if len(shown) == len(classes) else f" ({len(shown)} lowest of {len(classes)} classes; out=FILE has all)"
    return [
        "",
        f"Classes have {min(counts)} to {max(counts)} images. Balanced accuracy of the merged network, the mean of the "
        f"recalls: {balanced:.2f} %{which}.",
        "",
        pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True),
    ]


def _row(name: str, accuracies: Mapping[int, float], disagreements: int) -> dict[str, Any]:
    """Return a row of the results; accuracies: top-k in percent, by k."""
    return {
        "network": name,
        **{f"top{k}_pct": value for k, value in accuracies.items()},
        "disagreements": disagreements,
    }


def _int8(
    merged: nn.Module, img_size: int, calibration: Iterable[tuple[Tensor, Tensor]] | None, threads: int | None
) -> tuple[InferenceSession, str, Quantised]:
    """Export, quantise with training images where there are, and open the result; the files are gone afterwards.

    Returns the session, which form of the network it is of, and what was quantised.
    """
    from repmlp import deploy
    from repmlp.export import onnx_session, quantize_int8, to_exported_program, to_onnx
    from repmlp.int8 import quantize_dynamic

    try:
        form, net = "deployed", deploy(merged)
    except TypeError:  # of a network that has no such form
        form, net = "merged", merged
    with tempfile.TemporaryDirectory() as folder:
        exported, small = Path(folder) / "model.onnx", Path(folder) / "int8.onnx"
        to_onnx(to_exported_program(copy.deepcopy(net).cpu(), img_size, in_chans=3), exported)
        if calibration is None:
            quantised = quantize_dynamic(exported, small)
        else:
            quantised = quantize_int8(exported, small, (images for images, _ in calibration))
        return onnx_session(small, threads), form, quantised


def _check(config: DictConfig) -> None:
    """Raise ValueError for a setting that is none."""
    chosen = config.precisions
    if not isinstance(chosen, ListConfig):
        raise ValueError(f"precisions={chosen}: use a list, precisions=[{chosen}]")
    for precision in chosen:
        if precision not in PRECISIONS:
            raise ValueError(f"precisions={chosen}: {precision!r} is none of {', '.join(PRECISIONS)}")
    for name in ("threads", "calibration_images"):
        value = config[name]
        if value is not None:
            whole(name, value, 1)


def _check_onnx(session: InferenceSession, name: str, num_classes: int, img_size: int) -> None:
    """Raise ValueError where an ONNX file takes other images, or tells other classes, than the data set has."""
    found = (*session.get_inputs()[0].shape[1:], *session.get_outputs()[0].shape[1:])
    expected = (3, img_size, img_size, num_classes)
    # a name stands for any size
    if len(found) != 4 or any(isinstance(f, int) and f != e for f, e in zip(found, expected, strict=True)):
        raise ValueError(
            f"{name} takes (channels, height, width) and tells classes as {found}, the data set has {expected}"
        )


if __name__ == "__main__":
    run_command(main, Path(__file__).resolve().parents[1])
