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

import matplotlib.pyplot as plt
import torch
from figures import save
from matplotlib.collections import LineCollection
from matplotlib.patches import Rectangle
from torch import Tensor

from repmlp import InjectedLinear, SetSharingFC
from repmlp.branches import parse_all
from repmlp.checkpoints import open_checkpoint
from repmlp.locality import kernel_map, locality_profile, uniform_profile
from repmlp.models.build import SPATIAL_LAYERS
from repmlp.runs.record import load_records

Layer = SetSharingFC | InjectedLinear
ROOT = Path(__file__).resolve().parents[1]
MOST_MARKED = 8  # red squares a panel; more would cover the picture


def spatial_layers(model: torch.nn.Module) -> list[tuple[str, Layer]]:
    """List the spatial layers of a network in order, with their names; ValueError where there are none."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, SPATIAL_LAYERS)]
    if not layers:
        raise ValueError("the network has no layers that convolutions can be injected into, or they were merged")
    return layers


def seen_from(layer: Layer, point: tuple[int, int]) -> Tensor:
    """Say which cells the branches see from a point: bool (h, w), none without branches."""
    if layer.local_perceptron is None:
        return torch.zeros(layer.size, dtype=torch.bool)
    return layer.local_perceptron.taps(point)


def reach_of(layer: Layer) -> int:
    """Return how far from the point the branches on the map itself reach, in cells and within the map; at least 1."""
    reach = max((max(spec.padding) for spec in parse_all(layer.kernels) if not spec.shuffled), default=1)
    return min(max(reach, 1), max(layer.size) - 1)


def outline(cells: Tensor) -> list[list[tuple[float, float]]]:
    """Return the borders between cells and others, as lines from (x, y) to (x, y); cells: bool (h, w)."""
    h, w = cells.shape
    lines = []
    for y, x in torch.nonzero(cells).tolist():
        for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1)):
            if not (0 <= y + dy < h and 0 <= x + dx < w and cells[y + dy, x + dx]):
                middle, along = (x + dx / 2, y + dy / 2), (abs(dy) / 2, abs(dx) / 2)
                ends = ((middle[0] + sign * along[0], middle[1] + sign * along[1]) for sign in (-1, 1))
                lines.append(list(ends))
    return lines


def outside_stronger(values: Tensor, inside: Tensor) -> list[tuple[int, int]]:
    """List the points outside some cells that exceed some point inside them, strongest first.

    values, inside: (h, w). No cells (no branches) give none.
    """
    if not inside.any():
        return []
    stronger = torch.nonzero(~inside & (values > values[inside].min()))
    return sorted(map(tuple, stronger.tolist()), key=lambda p: -float(values[p]))


def draw(layer: Layer, title: str, share_set: int, point: tuple[int, int], stem: Path) -> list[Path]:
    """Draw the two panels of one layer to STEM.png and STEM.pdf."""
    seen, reach = seen_from(layer, point), reach_of(layer)
    with torch.no_grad():
        weights = [layer.merged(branches=injected)[0] for injected in (False, True)]
    panels = [kernel_map(weight, layer.size, share_set, point) for weight in weights]
    low, top = min(float(panel.min()) for panel in panels), max(float(panel.max()) for panel in panels)
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 5.8), layout="constrained")
    for axis, panel, weight, name in zip(
        axes, panels, weights, ("trained FC kernel", "after Locality Injection"), strict=True
    ):
        image = axis.imshow(panel, cmap="viridis", vmin=low, vmax=top)
        stronger = outside_stronger(panel, seen)
        for y, x in stronger[:MOST_MARKED]:
            axis.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, ec="red", ls="--", lw=1.5))
        axis.add_collection(LineCollection(outline(seen), colors="deepskyblue", linewidths=2.5), autolim=False)
        axis.add_patch(Rectangle((point[1] - 0.5, point[0] - 0.5), 1, 1, fill=False, ec="magenta", lw=2.5))
        near = locality_profile(weight, layer.size)[reach]
        outside = f"\n{len(stronger)} points outside the blue cells exceed some inside" if seen.any() else ""
        axis.set_title(f"{name}\n{100 * near:.1f} % of |weight| within distance {reach}{outside}", fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(image, ax=axes, shrink=0.8, label="log(|w| / min |W|)")
    figure.suptitle(f"{title}, share-set {share_set}, output point {point} (from 0)", fontsize=11)
    return save(figure, stem, pdf=True)


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
