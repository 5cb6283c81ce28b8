"""Count and merge the six ImageNet variants: parameters, MACs, and how far the merged net is from the train-time one.

    python experiments/check_variants.py                            # half a minute on one core, 5 GB of memory
    python experiments/check_variants.py --models repmlpnet_t224

The nets are untrained; their batch norms get random statistics and affine values, so that every merged number counts.
The error is the norm of the difference of the logits over their norm, in float32 and in float64. Results go to
results/variants/variants.json, from which `python analysis/make_tables.py` fills Table 1.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

import repmlp  # noqa: F401  (registers the variants)
from repmlp.compare import compare
from repmlp.cost import count_macs, count_params, count_params_layers
from repmlp.runs.record import write_json

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = tuple(f"repmlpnet_{name}" for name in ("t224", "b224", "t256", "b256", "d256", "l256"))


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Give every batch norm statistics and affine values far from their initial ones."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(module.bias, 0, 0.5, generator=generator)


@torch.no_grad()
def check(name: str, images: int) -> dict[str, Any]:
    """Count one variant and measure what merging changes."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    randomise(model, generator)
    merged = reparameterize_model(model)
    size = model.img_size[0]
    result: dict[str, Any] = {
        "img_size": size,
        "params": count_params(model),
        "params_merged": count_params(merged),
        "params_merged_layers": count_params_layers(merged),
        "macs": count_macs(model, size),
        "macs_merged": count_macs(merged, size),
    }
    x = torch.randn(images, 3, size, size, generator=generator)
    result["merge_error_float32"] = compare(model, merged, [x]).relative
    del merged
    model, x = model.double(), x[:1].double()
    result["merge_error_float64"] = compare(model, reparameterize_model(model), [x]).relative
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=VARIANTS, help="registered names")
    parser.add_argument("--images", type=int, default=2, help="random images to compare on in float32 (one in float64)")
    parser.add_argument("--out", type=Path, default=ROOT / "results/variants/variants.json")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.models if name not in VARIANTS]:
        sys.exit(f"error: unknown model {unknown[0]!r}: use {', '.join(VARIANTS)}")
    # what was measured before stays, for the models that are not measured now
    results = json.loads(options.out.read_text())["models"] if options.out.exists() else {}
    for name in options.models:
        started = time.perf_counter()
        results[name] = check(name, options.images)
        errors = ", ".join(f"{dtype} {results[name][f'merge_error_{dtype}']:.1e}" for dtype in ("float32", "float64"))
        print(f"{name}: merge error {errors} ({time.perf_counter() - started:.0f} s)", flush=True)
        versions = {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()}
        record = {
            "models": results,
            "images": options.images,
            "device": f"{platform.machine()} CPU",
            "versions": versions,
        }
        write_json(options.out, record)


if __name__ == "__main__":
    main()
