"""Make a folder that repmlp and timm load out of a finished run: its weights, timm's config.json and a model card.

    python experiments/publish.py results/STUDY/records/KEY.json FOLDER

The run's weights are looked for where its sweep left them, outputs/STUDY/KEY/model.safetensors. Afterwards
`repmlp.load("FOLDER/model.safetensors")` and `timm.create_model("local-dir:FOLDER", pretrained=True)` build the net.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from repmlp.branches import label as branch_label
from repmlp.checkpoints import Checkpoint, open_checkpoint, save
from repmlp.data.cifar100 import CIFAR100Data

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
# our architecture -> the function that timm calls for it; model_args says everything else
ENTRY_POINTS = {"repmlpnet": "repmlpnet_t224", "resmlp": "resmlp_12_patch2_32"}
LABELS = ("name", "arch", "weights", "backbone")  # of a configuration, not arguments of the network
SWEEPS = ROOT / "experiments/conf/sweep"


def publish(record: Mapping[str, Any], key: str, weights: Path, folder: Path) -> None:
    """Write FOLDER/model.safetensors, config.json and README.md.

    record: what the run wrote when it was finished. key: its file's name. weights: the run's own file.
    Raises FileNotFoundError, or ValueError where the weights are those of another run, or of a network that timm has
    no function for.
    """
    opened = open_checkpoint(weights)
    if opened.metadata.get("key", key) != key:
        raise ValueError(f"{weights} is of run {opened.metadata['key']}, the record of {key}")
    about = {name: value for name, value in opened.metadata.items() if name not in ("repmlp_model", "num_classes")}
    if "normalisation" not in about:  # older runs
        if record["data"] != "cifar100":
            raise ValueError(f"{weights} does not say how images of {record['data']} are normalised")
        info = CIFAR100Data.info
        about["normalisation"] = json.dumps({"mean": info.mean, "std": info.std})
    config = timm_config(opened, json.loads(about["normalisation"]))
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / WEIGHTS, opened.model, opened.config, about)
    (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    (folder / CARD).write_text(card(record, key, folder), encoding="utf-8")


def timm_config(opened: Checkpoint, normalisation: Mapping[str, Any]) -> dict[str, Any]:
    """Return what timm's config.json holds: the function to call, its arguments, and how images are prepared."""
    arch = opened.config["arch"]
    if arch not in ENTRY_POINTS:
        raise ValueError(f"arch={arch}: timm has no function for it; there is one for {', '.join(ENTRY_POINTS)}")
    arguments = {name: value for name, value in opened.config.items() if name not in LABELS}
    size = arguments["img_size"]
    return {
        "architecture": ENTRY_POINTS[arch],
        "num_classes": opened.model.num_classes,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [getattr(opened.model, "in_chans", 3), *([size, size] if isinstance(size, int) else size)],
            "fixed_input_size": True,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            **normalisation,
            "first_conv": "stem.conv" if arch == "repmlpnet" else "stem.proj",
            "classifier": "head",
            "license": "mit",
        },
    }


def card(record: Mapping[str, Any], key: str, folder: Path) -> str:
    """Return the model card; every number in it is the record's."""
    config = record["config"]
    recipe, data, trainer = config["recipe"], config["data"], config["trainer"]
    size = config["model"]["img_size"]
    shape = {name: value for name, value in config["model"].items() if name not in (*LABELS, "kernels")}
    place = folder.resolve().relative_to(ROOT).as_posix() if folder.resolve().is_relative_to(ROOT) else folder.name
    sweep = next(
        path.relative_to(SWEEPS).with_suffix("").as_posix()
        for path in sorted(SWEEPS.rglob("*.yaml"))
        if f"sweep: {record['sweep']}" in path.read_text(encoding="utf-8").splitlines()
    )
    rows = {
        "top-1, top-5": f"{record['top1_pct']:.2f}, {record['top5_pct']:.2f} % of the {record['n_eval']:,} test images "
        "after the last epoch; one run (n = 1)",
        "merged": f"{record['top1_merged_pct']:.2f} %; {record['merge_disagreements']} first guesses change, the "
        f"logits by {record['merge_error']:.1e} (relative)",
        "parameters, MACs while training": f"{record['params']:,}, {record['macs']:,}",
        "network": ", ".join(f"{name} {value}" for name, value in shape.items()),
        "data": f"{record['data']}: {record['n_train']:,} training images, the first of each of the "
        f"{record['num_classes']} classes; {size}x{size} pixels, pad {data['pad']}, crop, flip",
        "recipe": f"AdamW, {record['epochs']} epochs, batch {record['batch_size']}, learning rate "
        f"{recipe['lr_per_256']} per 256 images, cosine with {recipe['warmup_epochs']} epoch(s) of warm-up, weight "
        f"decay {recipe['weight_decay']}, label smoothing {recipe['label_smoothing']}, {trainer['precision']}, seed "
        f"{record['seed']}",
        "record": f"`results/{record['study']}/records/{key}.json`",
        "command": f"`python experiments/ablate.py +sweep={sweep}`, one run of it",
        "licence": "MIT, as the project's",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    form = "in the form that was trained: the branches beside the FCs" if record["kernels"] else "without branches"
    return f"""# {folder.name}

{record["model"]}, branches: {branch_label(record["kernels"])}; {form}.
To try things out with; **not** a network of the paper.

| | |
|---|---|
{table}

```python
import timm
import torch

import repmlp

net = repmlp.load("{place}/{WEIGHTS}")
# timm 1.0.16 or later
same = timm.create_model("local-dir:{place}", pretrained=True).eval()
images = torch.randn(2, 3, {size}, {size})
assert torch.equal(net(images), same(images))
```
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, help="results/STUDY/records/KEY.json")
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs", help="where the weights of runs lie")
    options = parser.parse_args(argv)
    try:
        record = json.loads(options.record.read_text(encoding="utf-8"))
        key = options.record.stem
        publish(record, key, options.outputs / record["study"] / key / WEIGHTS, options.folder)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    print(f"{options.folder}: {WEIGHTS}, {CONFIG}, {CARD}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
