"""Names and shapes in older files of `arch: resmlp` -> those of timm's MlpMixer: a table, no networks.

They were written when the network was a class of our own, whose token-mixing layer was a set-sharing FC with one set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

# older pattern -> name now; the first that fits
_NAMES = (
    (r"patch_embed\.", "stem.proj."),
    (r"(blocks\.\d+\.)spatial\.", r"\1linear_tokens."),
    (r"(blocks\.\d+\.)(fc[12])\.", r"\1mlp_channels.\2."),
    (r"(blocks\.\d+\.)scale([12])$", r"\1ls\2"),
)
_SETS = re.compile(r"blocks\.\d+\.linear_tokens\.(weight|bias)")


def convert_resmlp(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring the weights of an older file into today's names and shapes, train-time or merged; others go through.

    Values and dtypes unchanged, views where possible.
    """
    if "patch_embed.weight" not in state_dict:
        return dict(state_dict)
    converted = {}
    for name, tensor in state_dict.items():
        for older, now in _NAMES:
            name, found = re.subn(rf"^{older}", now, name)
            if found:
                break
        # (1, h*w, h*w) -> (h*w, h*w); (1, h*w) -> (h*w,)
        converted[name] = tensor.squeeze(0) if _SETS.fullmatch(name) else tensor
    return converted
