"""Export a trained network: merged, then as weights, with torch.export and as ONNX, each checked against the original.

    python experiments/export.py checkpoint=outputs/STUDY/KEY/model.safetensors
    python experiments/export.py checkpoint=RepMLPNet-T224.pth form=deployed out=FOLDER threads=1

Writes model.safetensors (for repmlp.load_model), model.pt2 (torch.export.load) and model.onnx, the batch size free,
none before all agree with the network as trained. Relative paths are taken from where you stand.
Needs `pip install 'repmlp[train,analysis,export]'`.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, OmegaConf

from repmlp.runs.command_line import place
from repmlp.runs.launch import checkpoint_of, mistakes_in_one_line, run_command

if TYPE_CHECKING:  # torch and what needs it is imported where it is used: --help comes without
    from torch import Tensor, nn

WEIGHTS, PROGRAM, ONNX = "model.safetensors", "model.pt2", "model.onnx"
TOLERANCE = 1e-4  # relative difference of float32 outputs; about 1e-6 is usual


@hydra.main(version_base="1.3", config_path="conf", config_name="export")
def main(config: DictConfig) -> None:
    with mistakes_in_one_line():
        print(export(OmegaConf.to_container(config, resolve=True)))


def export(config: Mapping[str, Any]) -> str:
    """Write the files and return the table of what they are and how far they are from the network as trained."""
    _check(config)
    source = checkpoint_of(config)
    import pandas as pd
    import torch
    from timm.utils import reparameterize_model

    from repmlp.checkpoints import open_checkpoint, save_model
    from repmlp.compare import compare, random_batches
    from repmlp.export import image_size, onnx_session, run_onnx, to_exported_program, to_onnx

    if config["threads"]:
        torch.set_num_threads(config["threads"])
    model, network, _ = open_checkpoint(source)
    size = image_size(model, network) if config["img_size"] is None else config["img_size"]
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(model, "in_chans", 3)
    merged = reparameterize_model(model)
    out = place(config["out"]) if config["out"] else source.parent / "export"
    if (out / WEIGHTS).resolve() == source.resolve():
        raise ValueError(f"out={out} holds the checkpoint itself as {WEIGHTS}: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".partial-") as folder:
        files = {name: Path(folder) / name for name in (WEIGHTS, PROGRAM, ONNX)}
        save_model(files[WEIGHTS], merged, network)
        traced = _deployed(model) if config["form"] == "deployed" else model
        program = to_exported_program(traced, (height, width), channels)
        torch.export.save(program, files[PROGRAM])
        to_onnx(program, files[ONNX], config["opset"])
        del program
        reloaded, note = _reload(files)
        # what was written, not what it was written from
        networks: dict[str, tuple[Callable[[Tensor], Tensor], Path]] = {
            "as trained, PyTorch": (model, source),
            **reloaded,
            f"{config['form']}, torch.export": (torch.export.load(files[PROGRAM]).module(), files[PROGRAM]),
            f"{config['form']}, ONNX Runtime": (
                partial(run_onnx, onnx_session(files[ONNX], config["threads"])),
                files[ONNX],
            ),
        }
        shape = (channels, height, width)
        milliseconds = latency([run for run, _ in networks.values()], shape, config["rounds"])
        rows = []
        for (label, (run, path)), ms in zip(networks.items(), milliseconds, strict=True):
            apart = compare(model, run, random_batches(shape, config["batch_sizes"]))
            if not apart.relative <= TOLERANCE:  # NaN too
                raise ValueError(
                    f"{path.name} differs from the network by {apart.relative:.1e} (relative): not written"
                )
            rows.append(
                {
                    "network": label,
                    "file": path.name,
                    "MB": f"{path.stat().st_size / 1e6:.2f}",
                    "max. difference": f"{apart.maximum:.1e}",
                    "relative difference": f"{apart.relative:.1e}",
                    "ms": f"{ms:.2f}",
                }
            )
        for path in files.values():
            path.replace(out / path.name)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnx", "onnxruntime"))
    batches = ", ".join(map(str, config["batch_sizes"]))
    return (
        f"{pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)}\n\n"
        f"Differences of the logits from the network as trained, random images of {height}x{width} pixels, batches of "
        f"{batches}. ms: batch 1, median of {config['rounds']} interleaved rounds, CPU, {torch.get_num_threads()} "
        f"thread(s), {versions}.\n{note}Written to {out}: {', '.join(files)}."
    )


def _deployed(model: nn.Module) -> nn.Module:
    """Return the form without batch norms; ValueError where a network has none."""
    from repmlp import deploy

    try:
        return deploy(model)
    except TypeError as error:
        raise ValueError(f"form=deployed: {type(model).__name__} has no such form; use merged") from error


def _reload(files: dict[str, Path]) -> tuple[dict[str, tuple[nn.Module, Path]], str]:
    """Read the merged weights back; where load_model cannot build their network, leave the file out and say so."""
    from repmlp.checkpoints import load_model

    try:
        return {"merged, PyTorch": (load_model(files[WEIGHTS])[0], files[WEIGHTS])}, ""
    except ValueError:  # timm's own re-parameterized models (RepVGG, MobileOne) are built in their train-time form
        files.pop(WEIGHTS).unlink()
        return {}, f"No {WEIGHTS}: load_model cannot build this network in its merged form.\n"


def latency(networks: list[Callable[[Tensor], Tensor]], shape: tuple[int, int, int], rounds: int) -> list[float]:
    """Return the median time in ms of each network on one image, taken in turns so that a busy moment hits all."""
    import torch

    image = torch.randn(1, *shape)
    times: list[list[float]] = [[] for _ in networks]
    with torch.no_grad():
        for i in range(rounds + 3):
            for run, taken in zip(networks, times, strict=True):
                start = time.perf_counter()
                run(image)
                if i >= 3:  # the first calls allocate
                    taken.append(1000 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]


def _check(config: Mapping[str, Any]) -> None:
    """Raise ValueError for a setting that is none."""
    size = config["img_size"]
    sides = [] if size is None else size if isinstance(size, list) and len(size) == 2 else [size]
    numbers = {"img_size": sides, "batch_sizes": config["batch_sizes"], "rounds": [config["rounds"]]}
    numbers |= {name: [] if config[name] is None else [config[name]] for name in ("threads", "opset")}
    for name, values in numbers.items():
        values = values if isinstance(values, list) else [values]
        if any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
            raise ValueError(f"{name}={config[name]!r}: use whole numbers, 1 or more")
    if config["form"] not in ("merged", "deployed"):
        raise ValueError(f"form={config['form']}: use merged or deployed")
    if config["batch_sizes"] == []:
        raise ValueError("batch_sizes=[]: give at least one")


if __name__ == "__main__":
    run_command(main, Path(__file__).resolve().parents[1])
