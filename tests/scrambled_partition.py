"""A warning example: partitions as the published code reads them back, which mixes tiles with channels.

    python tests/scrambled_partition.py CHECKPOINT DATA_ROOT OUT.png     # what it does to a segmentation of CamVid

The FC runs over rows laid out as (N, tiles, C/S). Read back as (N C/S, tiles), an output goes to another tile and to
another group of channels as soon as there are several of both; with one tile, as in classification, nothing is seen.
Nothing of the library uses this; see "Partitions" among the README's known deviations.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from repmlp import RepMLPBlock, load_model
from repmlp.maps import cut_into_tiles, join_tiles

ROOT = Path(__file__).resolve().parents[1]


class ScrambledBlock(RepMLPBlock):
    """RepMLPBlock with rows read back in the wrong order."""

    def _tiled(self, x: Tensor) -> Tensor:
        fc = self.channel_perceptron
        n, c = x.shape[:2]
        out = fc(cut_into_tiles(x, fc.size))
        # (N*tiles, C, h, w) -> (N*tiles*C/S, S, h, w), taken for (N*C/S*tiles, S, h, w) -> (N*C/S, S, H, W)
        out = join_tiles(out.reshape(-1, fc.share_sets, *fc.size), tuple(x.shape[2:]))
        # (N*C/S, S, H, W) -> (N, C, H, W)
        return out.reshape(n, c, *x.shape[2:])


def scrambled(model: nn.Module) -> nn.Module:
    """Return a copy of a model, train-time or merged, whose RepMLPBlocks read their rows back in the wrong order."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) is RepMLPBlock:
            module.__class__ = ScrambledBlock
    return model


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    sys.path[:0] = [str(ROOT / "experiments"), str(ROOT / "analysis")]
    from borders import as_picture, tile_of
    from plots.panels import colour, save_panels

    from repmlp.data import build_segmentation_data
    from repmlp.data.scaled_crop import IGNORED
    from repmlp.models.upernet import predict

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("checkpoint", "data_root", "out"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args(argv)
    with initialize_config_dir(str(ROOT / "experiments/conf"), version_base="1.3"):
        config = compose("borders", [f"data.root={options.data_root}", "n_images=2"])
    data = build_segmentation_data(OmegaConf.to_container(config.data, resolve=True), batch_size=1, seed=0)
    data.setup()
    net, _ = load_model(options.checkpoint)
    nets = (net, scrambled(net))
    rows, correct, labelled = {}, np.zeros(2, dtype=int), 0
    for name, (image, mask) in zip(data.eval_names, data.whole_evaluation(), strict=True):
        guesses = [predict(each, image).argmax(dim=1) for each in nets]
        correct += [int((guess == mask).sum()) for guess in guesses]
        labelled += int((mask != IGNORED).sum())
        masks = [each[0].numpy() for each in (mask, *guesses)]
        rows[name] = [as_picture(image[0], data.info), *colour(masks, data.info.colours)]
    right, wrong = (f"{100 * share:.1f} % of the pixels" for share in correct / labelled)
    titles = ("image", "truth", f"prediction, {right}", f"scrambled partitions, {wrong}")
    classes = dict(zip(data.info.classes, data.info.colours, strict=True))
    save_panels(options.out, rows, titles, tile_of(net, None), classes, width=2.4)
    print(f"{options.out}: {titles[2]}; {titles[3]}")


if __name__ == "__main__":
    from repmlp.runs.launch import mistakes_in_one_line

    with mistakes_in_one_line():
        main()
