"""How tables and figures name settings and their values: a paper's words, not those of the command line."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from repmlp.runs.contrasts import Contrast, shown

# what a setting is called where its own name, without its part and its underscores, is not a reader's word
NAMES = {
    "model.name": "network",
    "model.kernels": "branches",
    "model.share_sets": "share-sets",
    "model.global_perceptron": "Global Perceptron",
    "model.weights": "start",
    "data.n_train": "training images",
    "data.holdout": "held-out share",
    "data.shift": "largest shift in pixels",
    "recipe.lr_per_256": "learning rate per 256 images",
    "recipe.merge_after": "epochs before branches are merged",
    "recipe.warmup_epochs": "warm-up epochs",
}
# how a value stands in a sentence; elsewhere behind the setting's name
PHRASES = {
    "model.name": "{}",
    "model.kernels": "{}",
    "model.weights": "{}",
    "data.n_train": "{} training images",
    "data.holdout": "{} of the training images held out",
    "recipe.epochs": "{} epochs",
    "recipe.lr_per_256": "learning rate {} per 256 images",
}
SHUFFLED = "3x3s: a 3x3 branch on a shuffled grid, the control for locality."


def name(setting: str) -> str:
    """Return what a reader calls a setting, given by its dotted name."""
    return NAMES.get(setting, setting.rpartition(".")[2].replace("_", " "))


def value(setting: str, given: Any) -> str:
    """Write one value of a setting: "1x1+3x3", "4, 16", "yes"; a dash for a setting that a run does not have."""
    absent = given is None or given != given
    if setting == "recipe.merge_after":
        return "100 %" if absent else f"{100 * given:g} %"  # without it, at the end
    if setting == "data.n_train":
        return "all" if given is None else str(given)
    if absent:
        return "-"
    if setting != "model.kernels" and isinstance(given, (list, tuple)):
        return ", ".join(map(str, given))
    return shown(setting, given)


def values(setting: str, given: Iterable[Any]) -> list[str]:
    """Write the values of a setting in some runs; weights by their hash only where there are several."""
    given = list(given)
    if setting != "model.weights":
        return [value(setting, each) for each in given]
    several = len({each for each in given if isinstance(each, str)}) > 1
    return [
        f"from trained weights{f' {each[:8]}' if several else ''}" if isinstance(each, str) else "from scratch"
        for each in given
    ]


def phrase(setting: str, written: str) -> str:
    """Write a value, as `value` or `values` writes it, so that it says of what it is: "without Global Perceptron"."""
    if written in ("yes", "no"):
        return f"{'with' if written == 'yes' else 'without'} {name(setting)}"
    return PHRASES.get(setting, f"{name(setting)} {{}}").format(written)


def contrast(named: Contrast) -> str:
    """Write what a contrast compares: "3x3 - none", "with - without Global Perceptron"."""
    if isinstance(named.to, bool):
        return ("with - without " if named.to else "without - with ") + name(named.vary)
    before, to = (value(named.vary, end) for end in (named.before, named.to))
    if isinstance(named.to, list) and named.vary != "model.kernels":
        before, to = f"({before})", f"({to})"
    return f"{to} - {before}" if named.vary in ("model", "model.kernels") else f"{name(named.vary)}: {to} - {before}"


def of_branches(labels: Iterable[str]) -> str:
    """Say what the sign of a shuffled grid means, where one of these sets of branches has it; else ""."""
    return SHUFFLED if any(re.search(r"\dx\d+(d\d+)?s\b", label) for label in labels) else ""
