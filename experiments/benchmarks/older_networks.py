"""The networks whose speed the older paper compares, for `benchmark.py what=[older]`.

Paper: RepMLP (arXiv 2105.01883), Sections 4.2 and 4.3. Names are those of analysis/paper_tables/older.py, which sets
the measured ratios beside the printed ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import timm
from torch import nn

import repmlp  # noqa: F401  (registers our networks with timm)

# name -> (constructor, side of the images in pixels); every network is timed with its batch norms folded
OLDER: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{
        name: (partial(timm.create_model, name), size)
        for name, size in (
            ("resnet50", 224),
            ("resnet101", 224),
            ("repmlp_res50_224", 224),
            ("repmlp_res50_light_224", 224),
            ("repmlp_res50_g8_16_320", 320),
            ("repmlp_res50_g4_8_320", 320),
            ("faceresnet_96", 96),
            ("repmlp_faceres_96", 96),
            ("mobilefacenet_96", 96),
        )
    },
    "repmlp_res50_c4_r8": (partial(timm.create_model, "repmlp_res50_224", stages="c4", reductions=8, groups=8), 224),
}
