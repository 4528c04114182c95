"""A histogram of activations as numbers to draw: bars by kind of position, two bins an octave."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlmscope.core.study import KINDS, bin_edges

WIDTH, HEIGHT = 300.0, 96.0


@dataclass(frozen=True)
class Bar:
    """One kind's part of a bin, in the drawing's units."""

    kind: str
    x: float
    y: float
    width: float
    height: float
    words: str


@dataclass(frozen=True)
class Histogram:
    """Bars, ticks (place and number) of the axis of activations, the fullest bin, and all in words."""

    bars: tuple[Bar, ...]
    ticks: tuple[tuple[float, str], ...]
    most: int
    words: str
    width: float = WIDTH
    height: float = HEIGHT


def histogram(counts: np.ndarray) -> Histogram:
    """Draw `[3, BINS]` counts from the first bin that is not empty to the last."""
    total = counts.sum(0)
    used = np.flatnonzero(total)
    if not len(used):
        return Histogram((), (), 0, "it never fires")
    edges, first, last = bin_edges(), int(used[0]), int(used[-1]) + 1
    step, most = WIDTH / (last - first), int(total.max())
    bars = []
    for at in used:
        floor = HEIGHT
        for row in (1, 0, 2):  # the picture's part at the bottom
            count = int(counts[row, at])
            if not count:
                continue
            high = HEIGHT * count / most
            floor -= high
            said = f"{count:,} at {KINDS[row]} positions, activations {edges[at]:.3g} to {edges[at + 1]:.3g}"
            bars.append(Bar(KINDS[row], (at - first) * step, floor, max(step - 1, 0.5), high, said))
    whole = [at for at in range(first, last + 1) if at % 2 == 0]
    every = max(1, -(-len(whole) // 7))
    ticks = tuple(((at - first) * step, f"{edges[at]:.3g}") for at in whole[::every])
    middle = int(np.searchsorted(np.cumsum(total), total.sum() / 2))
    said = f"{int(total.sum()):,} firings; half of them are below {edges[middle + 1]:.3g}, the fullest bin has {most:,}"
    return Histogram(tuple(bars), ticks, most, said)
