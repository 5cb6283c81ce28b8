"""How a run is called and how it ended: what the commands and the sweeps say of it. Light: no torch, no Lightning."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repmlp.branches import label as branch_label

ADDITIONS = {  # settings that are said of a run where they are on
    "model": ("drop_path_rate",), "data": ("randaugment", "shift"),
    "recipe": ("mixup", "cutmix", "ema_decay", "decay_all"),
}  # fmt: skip
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # as Lightning reads them, the first that is set


@dataclass
class Outcome:
    """How a run ended.

    state: finished, skipped (there was a record), busy (another process does it), postponed (no time left) or failed.
    value: what it reached in percent, of the last epoch: top-1, or mIoU; None where there is no record.
    """

    state: str
    label: str
    key: str
    message: str = ""
    seconds: float = 0.0
    value: float | None = None


def run_label(config: Mapping[str, Any]) -> str:
    """Say in words which run this is."""
    model = config["model"]
    kernels, share_sets = (v if isinstance(v, list) else [v] for v in (model.get("kernels"), model.get("share_sets")))
    try:
        shown = branch_label(kernels)
    except ValueError:  # a mistake, which the run itself tells of
        shown = ",".join(map(str, kernels))
    parts = [str(model.get("name", "run")), "branches " + shown]
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
    if config["data"].get("answer", "both") != "both":
        parts.append(f"asked for the {config['data']['answer']}")
    if (share := config["recipe"].get("merge_after")) is not None:
        parts.append(f"merged after {share:.0%}")
    parts += [f"from {Path(config[name]).name}" for name in ("weights", "backbone") if config.get(name)]
    return ", ".join([*parts, f"seed {config['seed']}"])


def first_process() -> bool:
    """Say whether this is rank 0, which looks after the run's files; Lightning starts the others.

    Lightning knows best, but is not imported for this: before it is, the variables tell that it will read itself.
    """
    lightning = sys.modules.get("lightning.pytorch.utilities.rank_zero")
    if lightning is not None:
        return getattr(lightning.rank_zero_only, "rank", 0) in (0, None)
    return next((int(os.environ[name]) for name in RANKS if name in os.environ), 0) == 0


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
