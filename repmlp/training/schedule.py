"""The learning rate of the recipes, as a pure function of the step."""

from __future__ import annotations

import math


def cosine_with_warmup(step: int, total_steps: int, warmup_steps: int) -> float:
    """Return the learning rate at `step` (from 0) as a share of the base.

    Paper: RepMLPNet Section 5.1; as the released script does it: linear warm-up from 0, then a cosine to 0 that is
    counted from step 0, so that it stands at 0.9755 when a warm-up of a tenth of the run ends.
    """
    if step < warmup_steps:
        return step / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * min(step, total_steps) / total_steps))


def poly_with_warmup(step: int, total_steps: int, warmup_steps: int) -> float:
    """Return the learning rate at `step` (from 0) as a share of the base: linear warm-up from 0, then linear to 0.

    mmsegmentation's habit for UperNet with AdamW ("poly" with power 1), counted from step 0 as the cosine is.
    """
    if step < warmup_steps:
        return step / warmup_steps
    return 1 - min(step, total_steps) / total_steps


SCHEDULES = {"cosine": cosine_with_warmup, "poly": poly_with_warmup}
