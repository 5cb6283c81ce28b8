"""Tables of the older paper, RepMLP (arXiv 2105.01883): what it prints, beside what we count and measure.

The printed figures lie in paper_older.csv. Where a cell of the paper's is not known, or there is no measurement of
ours, it shows a dash. Parameters and MACs are counted here, on networks that hold no numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

from repmlp import fold_batch_norms
from repmlp.cost import count_macs, count_params
from repmlp.models.pspnet import build_pspnet
from repmlp.models.repmlp_pure import PureMLP

DASH = "-"
QUANTITIES = {"top1": "top-1", "miou": "mIoU", "macs": "MACs", "megaface": "MegaFace"}  # as a reader knows them
# form of a network whose speed the paper tells: blocks merged, every batch norm folded
FORM = "fused"
SETTING = ["device", "threads", "dtype", "engine", "batch_size"]


class Network(NamedTuple):
    """A network of the paper: its section, the side of its images, and how it is built."""

    section: str
    img_size: int
    build: Callable[[], nn.Module]


def _timm(section: str, name: str, img_size: int, **arguments: object) -> Network:
    return Network(section, img_size, lambda: timm.create_model(name, **arguments))


def _c4(reduction: int, groups: int) -> Network:
    return _timm("4.2", "repmlp_res50_224", 224, stages="c4", reductions=reduction, groups=groups)


def _pure(**arguments: object) -> Network:
    return Network("4.1", 32, lambda: PureMLP(**arguments))


NETWORKS: dict[str, Network] = {
    "repmlp_pure": _pure(),
    "repmlp_pure_no_local": _pure(kernels=()),
    "repmlp_pure_no_global": _pure(global_perceptron=False),
    "repmlp_pure_fc3_conv": _pure(spatial="fc3_conv"),
    "repmlp_pure_conv": _pure(spatial="conv"),
    "repmlp_pure_convnet": _pure(channels=(32, 64, 128), groups=1, spatial="conv", conv_kernel=3),
    "resnet50": _timm("4.2", "resnet50", 224),
    "resnet101": _timm("4.2", "resnet101", 224),
    "repmlp_res50_224": _timm("4.2", "repmlp_res50_224", 224),
    "repmlp_res50_c4": _c4(4, 8),
    "repmlp_res50_c4_r8": _c4(8, 8),
    "repmlp_res50_c4_g4": _c4(4, 4),
    "repmlp_res50_c4_r2": _c4(2, 8),
    "repmlp_res50_c4_r2_g4": _c4(2, 4),
    "repmlp_res50_c2_c3_c4": _timm("4.2", "repmlp_res50_224", 224, stages=("c2", "c3", "c4")),
    "repmlp_res50_all_stages": _timm("4.2", "repmlp_res50_224", 224, stages=("c2", "c3", "c4", "c5")),
    "repmlp_res50_g8_8_320": _timm("4.2", "repmlp_res50_g8_8_320", 320),
    "repmlp_res50_g8_16_320": _timm("4.2", "repmlp_res50_g8_16_320", 320),
    "repmlp_res50_g4_8_320": _timm("4.2", "repmlp_res50_g4_8_320", 320),
    "repmlp_res50_light_224": _timm("4.2", "repmlp_res50_light_224", 224),
    "repmlp_res50_light_g4_224": _timm("4.2", "repmlp_res50_light_g4_224", 224),
    "faceresnet_96": _timm("4.3", "faceresnet_96", 96),
    "repmlp_faceres_96": _timm("4.3", "repmlp_faceres_96", 96),
    "mobilefacenet_96": _timm("4.3", "mobilefacenet_96", 96),
    "pspnet_resnet50": Network("4.4", 713, build_pspnet),
    "pspnet_repmlp": Network(
        "4.4",
        713,
        lambda: build_pspnet("repmlp_res50_g4_8_320", kernels=(1, 3, 5, 7), arguments={"global_reductions": (4, 8)}),
    ),
}


class Counts(NamedTuple):
    """Parameters and MACs of one image: while training, after reparameterize(), with every batch norm folded.

    Folding changes no MACs, so that those after reparameterize() are `folded_macs` too.
    """

    params: int
    macs: int
    merged_params: int
    folded_params: int
    folded_macs: int


@cache
def counts(name: str) -> Counts:
    """Count a network of NETWORKS."""
    network = NETWORKS[name]
    with torch.device("meta"):
        model = network.build().eval()
    merged = reparameterize_model(nn.ModuleList([model]))[0]
    folded = fold_batch_norms(merged)
    return Counts(
        params=count_params(model),
        macs=count_macs(model, network.img_size),
        merged_params=count_params(merged),
        folded_params=count_params(folded),
        folded_macs=count_macs(folded, network.img_size),
    )


def read_paper_older() -> pd.DataFrame:
    """Read the printed figures: section, network, against ("" for figures of one network), quantity, printed (text)."""
    return pd.read_csv(Path(__file__).with_name("paper_older.csv"), dtype=str, keep_default_na=False)


def networks_table() -> pd.DataFrame:
    """Make the table of all networks: our counts in three forms beside the printed parameters, FLOPs and accuracy.

    The paper counts and times its networks merged, with convolutions and batch norms fused: the last two columns of
    counts.
    """
    paper = read_paper_older()
    printed = {(row.network, row.quantity): row.printed for row in paper.itertuples() if not row.against}
    table = []
    for name, network in NETWORKS.items():
        found = counts(name)
        accuracy = next((q for q in ("top1_pct", "miou_pct") if (name, q) in printed), "")
        table.append(
            {
                "section": network.section,
                "network": name,
                "image": str(network.img_size),
                "params while training": f"{found.params:,}",
                "MACs G while training": f"{found.macs / 1e9:.3f}",
                "params after reparameterize()": f"{found.merged_params:,}",
                "params, batch norms folded": f"{found.folded_params:,}",
                "MACs G, batch norms folded": f"{found.folded_macs / 1e9:.3f}",
                "paper params": printed.get((name, "params"), DASH),
                "paper FLOPs": printed.get((name, "macs"), DASH),
                "paper accuracy": f"{printed[name, accuracy]} {QUANTITIES[accuracy.split('_')[0]]}"
                if accuracy
                else DASH,
            }
        )
    return pd.DataFrame(table)


def claims_table(benchmark: pd.DataFrame | None = None, accuracy: Mapping[str, float] | None = None) -> pd.DataFrame:
    """Set what the paper says of one network against another beside our counts and measurements.

    benchmark: records of inference, one a row, with model, form, images_per_second, run and the columns of SETTING; a
    ratio is taken within one run alone, of networks in the form FORM. None for no measurement.
    accuracy: top-1, mIoU or another accuracy of ours in per cent, by network, from the paper's full recipe alone.
    """
    table = []
    for row in read_paper_older().itertuples():
        if not row.against:
            continue
        kind, unit = row.quantity.split("_")
        if kind in ("params", "macs"):
            ours = _counted(row.network, row.against, kind, unit)
        elif kind == "speed":
            ours = _measured(row.network, row.against, benchmark)
        elif accuracy and row.network in accuracy and row.against in accuracy:
            ours = f"{accuracy[row.network] - accuracy[row.against]:+.2f}"
        else:
            ours = DASH
        table.append(
            {
                "section": row.section,
                "network": row.network,
                "against": row.against,
                "what": f"{QUANTITIES.get(kind, kind)}, {'%' if unit == 'pct' else unit}",
                "paper": row.printed,
                "ours": ours,
            }
        )
    return pd.DataFrame(table)


def _counted(name: str, other: str, kind: str, unit: str) -> str:
    """Compare the counts of two networks with their batch norms folded."""
    a, b = (getattr(counts(each), f"folded_{kind}") for each in (name, other))
    if unit == "more":
        return f"{(a - b) / 1e6:+.2f}M"
    return f"{100 * (a / b - 1):+.1f}" if unit == "pct" else f"{a / b:.2f}"


def _measured(name: str, other: str, benchmark: pd.DataFrame | None) -> str:
    """Compare the speed of two networks in each run that measured both; several settings are told apart."""
    if benchmark is None or not len(benchmark):
        return DASH
    rows = benchmark[benchmark["form"] == FORM]
    found: dict[str, str] = {}
    for (_, *setting), run in rows.groupby(["run", *SETTING], sort=False, dropna=False):
        speed = dict(zip(run["model"], run["images_per_second"], strict=True))
        if name in speed and other in speed:
            label = ", ".join(str(value) for value in setting)
            found[label] = f"{100 * (speed[name] / speed[other] - 1):+.1f}"
    if len(found) == 1:
        return next(iter(found.values()))
    return "; ".join(f"{value} ({label})" for label, value in found.items()) or DASH


def read_benchmark(results: Path) -> pd.DataFrame:
    """Read what benchmark.py what=[older] measured, one record a row; no rows where nothing was."""
    records = [json.loads(path.read_text()) for path in sorted(results.glob("benchmark/measured/*.json"))]
    return pd.DataFrame([record for record in records if record["kind"] == "older"])


def tables(results: Path) -> dict[str, tuple[str, str, pd.DataFrame]]:
    """Return what there is to write: name of the file -> (title, note, table). results: the folder of records."""
    return {
        "older_networks": (
            "RepMLP (arXiv 2105.01883): networks",
            "FLOPs are multiply-accumulates. reparameterize() merges the blocks and leaves the batch norms of the "
            "convolutions; the paper's counts have these folded too (the two columns after it). A dash: the paper does "
            "not print it, or we do not know the cell.",
            networks_table(),
        ),
        "older_claims": (
            "RepMLP (arXiv 2105.01883): one network against another",
            "Counts with batch norms folded. The printed FLOPs against MobileFaceNet do not come out for the network "
            "as it is described. A dash: no measurement of ours.",
            claims_table(read_benchmark(results)),
        ),
    }
