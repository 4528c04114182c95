"""How well a map points, and the area under a curve of deletion or insertion. Pure functions of arrays."""

from __future__ import annotations

import numpy as np


def pointing_hit(values: np.ndarray, on_object: np.ndarray) -> float:
    """Whether the largest value lies on the object; where several are largest, the share of them that do.

    Args:
        values: any shape.
        on_object: bool of the same shape. A random cell would hit as often as its mean.
    """
    flat = np.asarray(values, float).ravel()
    scale = np.abs(flat).max(initial=0.0) or 1.0
    largest = flat >= flat.max() - 1e-9 * scale
    return float(np.asarray(on_object, bool).ravel()[largest].mean())


def area_under(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The mean height of curves by the trapezoid rule: `x [n]` ascending, `y [.., n]` -> `[..]`."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    return ((y[..., 1:] + y[..., :-1]) / 2 * np.diff(x)).sum(-1) / (x[-1] - x[0])
