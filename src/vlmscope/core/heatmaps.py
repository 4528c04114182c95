"""Maps as small uint8 grids: coarser where they must be, with two numbers each that bring the values back."""

from dataclasses import dataclass

import numpy as np

LEVELS = 255


@dataclass(frozen=True)
class Grids:
    """n maps on one grid. A value is `low + step * code`.

    It differs from what was encoded by at most `step / 2`, that is (largest - least) / 510 of its map, and by what
    float32 loses of `low` and `step`.

    Attributes:
        codes: `[n, rows, columns]` uint8.
        low: `[n]` float32, the least value of each map.
        step: `[n]` float32; 0 where all values are equal.
    """

    codes: np.ndarray
    low: np.ndarray
    step: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.codes.nbytes + self.low.nbytes + self.step.nbytes


def encode(values: np.ndarray) -> Grids:
    """Round `[n, rows, columns]` finite values to 256 levels between each map's least and largest value."""
    wide = np.asarray(values, np.float64)
    assert np.isfinite(wide).all(), "a map has values that are no numbers"
    axes = (1, 2)
    low = wide.min(axes).astype(np.float32)
    step = ((wide.max(axes) - low.astype(np.float64)) / LEVELS).astype(np.float32)
    safe = np.where(step > 0, step, 1).astype(np.float64)
    codes = (wide - low.astype(np.float64)[:, None, None]) / safe[:, None, None]
    return Grids(np.clip(np.rint(codes), 0, LEVELS).astype(np.uint8), low, step)


def decode(grids: Grids) -> np.ndarray:
    """The values `[n, rows, columns]` in float64."""
    low, step = (part.astype(np.float64)[:, None, None] for part in (grids.low, grids.step))
    return low + step * grids.codes


def coarse_shape(rows: int, columns: int, most: int) -> tuple[int, int]:
    """The largest grid of about the same shape with at most `most` cells; the same one where it fits."""
    if rows * columns <= most:
        return rows, columns
    factor = (most / (rows * columns)) ** 0.5
    down = min(max(1, int(rows * factor)), most)
    return down, max(1, min(int(columns * factor), most // down))


def resample(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """`[.., h, w]` spread over another grid of the same area: `[.., rows, columns]`, with the same sum.

    Each cell gives to the cells that it overlaps, in proportion to the area.
    """
    down, across = _overlaps(values.shape[-2], rows), _overlaps(values.shape[-1], columns)
    return down @ values @ across.T


def _overlaps(old: int, new: int) -> np.ndarray:
    """`[new, old]`: the share of each old cell that lies in each new one; columns sum to 1."""
    edges_old, edges_new = np.arange(old + 1) / old, np.arange(new + 1) / new
    low = np.maximum(edges_old[None, :-1], edges_new[:-1, None])
    high = np.minimum(edges_old[None, 1:], edges_new[1:, None])
    return np.maximum(high - low, 0.0) * old
