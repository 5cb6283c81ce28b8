"""Write a page in which every row of a network's kernels can be looked at: what each output point sees of the map.

    python analysis/explore_kernels.py --checkpoint outputs/locality_cifar100/KEY/model.safetensors
    python analysis/explore_kernels.py --study demo             # the study's net with the most branches
    python analysis/explore_kernels.py RepMLPNet-D256.pth       # published weights: block 10 of stage 3, the paper's
    python analysis/explore_kernels.py FILE --layer 3           # one layer, by its number from 0 or its name

One HTML file that opens in any browser of today without network, at most 20 MB: all layers where they fit, otherwise
one. In it: the FC alone, the branches alone and both merged, side by side on one scale; the output point by click,
arrow keys or number; what outside the branches' reach exceeds them; the share of |weight| by distance. Its address
keeps the view. Paper: RepMLPNet Figure 3 and Appendix A are one such view.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from explorer.collect import choose_layers, default_layer, describe_layer, net_profile, profiles_by_name
from explorer.page import Page
from plot_kernels import ROOT, find_checkpoint

from repmlp.checkpoints import Checkpoint, open_checkpoint
from repmlp.kernels import spatial_layers


def build(opened: Checkpoint, source: str, wanted: str | None = None) -> Page:
    """Make the page of a network.

    source: where the weights are from, in words. wanted: one layer, by number or name; None for all that fit.
    Raises ValueError where there is no such layer, or none that fits into a page.
    """
    layers = spatial_layers(opened.model)
    chosen = choose_layers(layers, wanted)
    profiles = profiles_by_name(opened.model)
    described = [describe_layer(name, layers[name], profiles[name]) for name in chosen]
    config = opened.config
    return Page(
        title=str(config.get("name") or config.get("variant") or config.get("arch") or type(opened.model).__name__),
        source=source,
        layers=[about for about, _ in described],
        numbers=[texts for _, texts in described],
        opening=default_layer(chosen),
        all_layers=len(layers),
        net=net_profile(list(profiles.values())),
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, nargs="?", help="model.safetensors of a trained run, or published weights")
    parser.add_argument("--checkpoint", type=Path, help="the same")
    parser.add_argument("--study", help="take the run with the most branches of this study instead")
    parser.add_argument("--layer", help="show this layer only: its number from 0, or its name")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs")
    parser.add_argument(
        "--out", "--output", dest="output", type=Path, help="the page (default: OUTPUTS/explorer/RUN.html)"
    )
    options = parser.parse_args(argv)
    given = [each for each in (options.file, options.checkpoint, options.study) if each is not None]
    if len(given) != 1:
        parser.error("name one of: a checkpoint, --study")
    started = time.perf_counter()
    path = options.file or options.checkpoint or find_checkpoint(options.study, options.results, options.outputs)
    run = path.parent.name if path.name == "model.safetensors" else path.stem
    output = options.output or options.outputs / "explorer" / f"{run}.html"
    try:
        text = build(
            open_checkpoint(path), f"run {run}" if path.name == "model.safetensors" else path.name, options.layer
        ).html()
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{output}  ({output.stat().st_size / 1e6:.1f} MB in {time.perf_counter() - started:.0f} s): open in a browser"
    )


if __name__ == "__main__":
    main()
