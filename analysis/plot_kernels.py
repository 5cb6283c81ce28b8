"""Draw the paper's kernel heatmap: what one output point sees, of the FC alone and after Locality Injection.

    python analysis/plot_kernels.py outputs/locality_cifar100/KEY/model.safetensors
    python analysis/plot_kernels.py --study demo            # the study's net with the most branches
    python analysis/plot_kernels.py FILE --block 3 --share-set 0 --point 6,6
    python analysis/plot_kernels.py FILE --channels 0,0     # of the older block: output channel, input channel
    python analysis/plot_kernels.py RepMLPNet-D256.pth --block 13    # Figure 3 itself: 10th block of stage 3

Papers: RepMLPNet Figure 3 and Appendix A; RepMLP Figure 5. ln of |w| over the smallest |w|, darker is larger. Marked:
the output point, the cells that its branches see from there, and the strongest points outside them that exceed some
point inside. And in numbers, the share of |weight| within distance 0, 1, 2, ... of the output point.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from figures import save
from options import ROOT, Parser

from repmlp.branches import parse_all
from repmlp.checkpoints import Checkpoint, open_checkpoint
from repmlp.heatmap import heatmap
from repmlp.kernels import data_words, layer_title, network_words, papers_point, spatial_layers, view
from repmlp.locality import network_profiles, uniform_profile
from repmlp.runs.record import load_records, record_path


def print_profiles(model: torch.nn.Module) -> None:
    """Print the share of |weight| within distance 0, 1, 2, 3 of the output point, per layer, beside a flat kernel's."""
    print("share of |weight| within distance 0, 1, 2, 3 of the output point (mean over output points and share-sets)")
    for layer in network_profiles(model):
        shares = {
            "flat": uniform_profile(tuple(layer["size"])),
            "trained": layer["trained"],
            "injected": layer["injected"],
        }
        text = " | ".join(f"{label} " + " ".join(f"{100 * s:5.1f}" for s in row[:4]) for label, row in shares.items())
        print(f"{layer['layer']:45s} {text} %")


def trained_on(metadata: Mapping[str, str], results: Path) -> str:
    """Say what a network was trained on: of a run of ours, as its record says; else "" or its number of classes."""
    if {"study", "key"} <= metadata.keys():
        record = record_path(results, metadata["study"], metadata["key"])
        if record.is_file():
            return data_words(str(json.loads(record.read_text()).get("data", "")))
    return f"{metadata['num_classes']} classes" if "num_classes" in metadata else ""


def find_checkpoint(study: str, results: Path, outputs: Path) -> Path:
    """Return the weights of the study's finished run with the most branches, no control where there is another.

    Of a RepMLPNet where there is one.
    """
    records = load_records(results, study)
    candidates = [
        (
            r["model"].startswith("repmlpnet"),
            len(r["kernels"]),
            not any(branch.shuffled for branch in parse_all(r["kernels"])),
            -r["seed"],
            outputs / study / r["key"] / "model.safetensors",
        )
        for r in (records.to_dict("records") if len(records) else ())
    ]
    present = [c for c in candidates if c[-1].exists()]
    if not present:
        sys.exit(f"error: no weights of study {study!r} below {outputs}: run its sweep first, or name a file")
    return max(present)[-1]


def parse_pair(text: str) -> tuple[int, int]:
    first, second = (int(part) for part in text.split(","))
    return first, second


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, None, ("figures",))
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", help="model.safetensors of a trained run, or published weights"
    )
    parser.add_argument("--study", help="take the run with the most branches of this study instead")
    parser.add_argument("--block", type=int, help="spatial layer, counted from 0 (default: the middle one)")
    parser.add_argument("--share-set", type=int, default=0, help="share-set, counted from 0")
    parser.add_argument(
        "--channels", type=parse_pair, default=(0, 0), metavar="OUT,IN",
        help="of a group-wise FC: output channel and input channel within its group, counted from 0",
    )  # fmt: skip
    parser.add_argument(
        "--point", type=parse_pair, metavar="Y,X", help="output point counted from 0 (default: 6,6 on a 16x16 map)"
    )
    parser.add_argument("--all-blocks", action="store_true", help="draw every spatial layer")
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs", help="folder of the runs' weights")
    parser.add_argument(
        "--out", type=Path, help="folder for the pictures (default: RESULTS/STUDY, else RESULTS/figures)"
    )
    options = parser.parse_args(argv)
    if (options.checkpoint is None) == (options.study is None):
        parser.error("name a checkpoint or a --study")
    path = options.checkpoint or find_checkpoint(options.study, options.results, options.outputs)
    try:
        opened: Checkpoint = open_checkpoint(path)
        layers = list(spatial_layers(opened.model).items())
        chosen = (
            range(len(layers)) if options.all_blocks else [len(layers) // 2 if options.block is None else options.block]
        )
        if not all(0 <= block < len(layers) for block in chosen):
            raise ValueError(f"block {options.block} does not exist: there are {len(layers)}, counted from 0")
        if not any(layer.kernels for _, layer in layers):
            print("note: this net has no branches, or was merged already; both panels show the same kernel")
        print_profiles(opened.model)
        out = options.out or options.results / (options.study or "figures")
        run = path.parent.name if path.name == "model.safetensors" else path.stem
        network = ", ".join(filter(None, (network_words(opened.config), trained_on(opened.metadata, options.results))))
        for block in chosen:
            name, layer = layers[block]
            point = options.point or papers_point(layer.size)
            shown = view(layer, options.share_set, options.channels, point)
            stem = out / f"kernel_{run}_block{block}"
            for written in save(heatmap(layer, shown, point, network, layer_title(name)), stem, options.pdf):
                print(f"wrote {written}")
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
