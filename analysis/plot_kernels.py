"""Draw the paper's kernel heatmap: what one output point sees, as trained and after Locality Injection.

    python analysis/plot_kernels.py outputs/locality_cifar100/KEY/model.safetensors
    python analysis/plot_kernels.py --study demo            # the study's net with the most branches
    python analysis/plot_kernels.py FILE --block 3 --share-set 0 --point 6,6
    python analysis/plot_kernels.py RepMLPNet-D256.pth --block 13    # Figure 3 itself: 10th block of stage 3

Paper: RepMLPNet Figure 3 and Appendix A: log of |w| over the matrix's smallest |w|. Marked: the output point (purple),
the cells that its branches see from there (blue), and the strongest points outside them that exceed some point inside
(red, dashed). PNG and PDF; and in numbers, the share of |weight| within distance 0, 1, 2, ... of the output point.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from options import ROOT
from plots.kernels import Layer, draw, spatial_layers

from repmlp.checkpoints import open_checkpoint
from repmlp.locality import locality_profile, uniform_profile
from repmlp.runs.record import load_records


def print_profiles(layers: list[tuple[str, Layer]]) -> None:
    """Print the share of |weight| within distance 0, 1, 2, 3 of the output point, per layer, beside a flat kernel's."""
    print("share of |weight| within distance 0, 1, 2, 3 of the output point (mean over output points and share-sets)")
    for name, layer in layers:
        with torch.no_grad():
            before, after = (locality_profile(layer.merged(branches=b)[0], layer.size) for b in (False, True))
        rows = {"flat": uniform_profile(layer.size), "trained": before, "injected": after}
        text = " | ".join(f"{label} " + " ".join(f"{100 * s:5.1f}" for s in row[:4]) for label, row in rows.items())
        print(f"{name:45s} {text} %")


def find_checkpoint(study: str, results: Path, outputs: Path) -> Path:
    """Return the weights of the study's finished run with the most branches (a RepMLPNet where there is one)."""
    records = load_records(results, study)
    candidates = [
        (
            r["model"].startswith("repmlpnet"),
            len(r["kernels"]),
            -r["seed"],
            outputs / study / r["key"] / "model.safetensors",
        )
        for r in (records.to_dict("records") if len(records) else ())
    ]
    present = [c for c in candidates if c[-1].exists()]
    if not present:
        sys.exit(f"error: no weights of study {study!r} below {outputs}: run its sweep first, or name a file")
    return max(present)[-1]


def parse_point(text: str) -> tuple[int, int]:
    y, x = (int(part) for part in text.split(","))
    return y, x


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint", type=Path, nargs="?", help="model.safetensors of a trained run, or published weights"
    )
    parser.add_argument("--study", help="take the run with the most branches of this study instead")
    parser.add_argument("--block", type=int, help="spatial layer, counted from 0 (default: the middle one)")
    parser.add_argument("--share-set", type=int, default=0, help="share-set, counted from 0")
    parser.add_argument(
        "--point", type=parse_point, help="output point y,x counted from 0 (default: 6,6 on a 16x16 map)"
    )
    parser.add_argument("--all-blocks", action="store_true", help="draw every spatial layer")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs")
    parser.add_argument(
        "--out", type=Path, help="folder for the pictures (default: RESULTS/STUDY, else RESULTS/figures)"
    )
    options = parser.parse_args(argv)
    if (options.checkpoint is None) == (options.study is None):
        parser.error("name a checkpoint or a --study")
    path = options.checkpoint or find_checkpoint(options.study, options.results, options.outputs)
    try:
        model = open_checkpoint(path).model
        layers = spatial_layers(model)
        chosen = (
            range(len(layers)) if options.all_blocks else [len(layers) // 2 if options.block is None else options.block]
        )
        if not all(0 <= block < len(layers) for block in chosen):
            raise ValueError(f"block {options.block} does not exist: there are {len(layers)}, counted from 0")
        if not any(layer.kernels for _, layer in layers):
            print("note: this net has no branches, or was merged already; both panels show the same kernel")
        print_profiles(layers)
        out = options.out or options.results / (options.study or "figures")
        run = path.parent.name if path.name == "model.safetensors" else path.stem
        for block in chosen:
            name, layer = layers[block]
            # the paper's point on its 16x16 map, (7, 7) counted from 1, and the same share of other maps
            point = options.point or (3 * layer.size[0] // 8, 3 * layer.size[1] // 8)
            for written in draw(
                layer, f"{name} of run {run}", options.share_set, point, out / f"kernel_{run}_block{block}"
            ):
                print(written)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
