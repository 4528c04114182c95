"""Learning-rate schedules as pure functions of the step, so that a resumed run cannot be off by one."""

from __future__ import annotations

import math


def warmup_cosine(step: int, total: int, warmup: int, floor: float = 0.02) -> float:
    """Factor of the peak rate: linear from 0 over `warmup` steps, then a cosine down to `floor` at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
