"""Deletion and insertion (Petsiuk et al. 2018): pictures with the cells that a map ranks first painted over, or alone.

A picture is cut into `side * side` cells whatever the grid of patches, so that maps of all families and kinds can be
compared on the same pictures. Painted cells have the picture's mean colour.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vlmscope.core.patches import PictureMap
from vlmscope.core.seeds import generator
from vlmscope.models.boxes import grid_boxes

_FINE = 8  # pixels of a raster down and across a cell


@dataclass(frozen=True)
class Painted:
    """The pictures of one order, from nothing changed to all: `counts[i]` cells are deleted, or are all that is left.

    Each is painted when it is asked for, since together they take hundreds of times the picture's memory.

    Attributes:
        counts: ascending, from 0 to all cells.
        image: uint8 `[H, W, 3]`.
        order: cells, the one to go, or to come, first.
        side: cells down and across.
    """

    counts: tuple[int, ...]
    image: np.ndarray
    order: np.ndarray
    side: int

    def deleted(self) -> Iterator[np.ndarray]:
        """The picture without the first `counts[i]` cells, uint8 `[H, W, 3]` each."""
        return self._over(self.image, self._empty)

    def inserted(self) -> Iterator[np.ndarray]:
        """The first `counts[i]` cells alone, likewise."""
        return self._over(self._empty, self.image)

    @property
    def _empty(self) -> np.ndarray:
        return np.broadcast_to(self.image.mean((0, 1)).round().astype(np.uint8), self.image.shape)

    def _over(self, base: np.ndarray, source: np.ndarray) -> Iterator[np.ndarray]:
        spots = [box.pixels(self.image.shape[1], self.image.shape[0]) for box in grid_boxes(self.side, self.side)]
        for count in self.counts:
            out = base.copy()
            for cell in self.order[:count]:
                left, top, right, bottom = spots[int(cell)]
                out[top:bottom, left:right] = source[top:bottom, left:right]
            yield out


def cell_values(found: PictureMap, side: int) -> np.ndarray:
    """`[side, side]`: what of a map lies in each cell of the picture."""
    fine = found.raster(side * _FINE, side * _FINE)
    return fine.reshape(side, _FINE, side, _FINE).sum((1, 3))


def ranking(values: np.ndarray, seed: int) -> np.ndarray:
    """Cells by value, largest first; cells of the same value (but for rounding) in random order."""
    flat = np.asarray(values, float).ravel()
    scale = np.abs(flat).max(initial=0.0) or 1.0
    shuffled = generator(seed, "ties").permutation(flat.size)
    return shuffled[np.argsort(-np.round(flat[shuffled] / scale, 9), kind="stable")]


def painted(image: np.ndarray, order: np.ndarray, side: int, counts: Sequence[int]) -> Painted:
    """The pictures of one order.

    Args:
        image: uint8 `[H, W, 3]`.
        order: cells, the one to go, or to come, first.
        side: cells down and across.
        counts: how many cells; 0 and all are added.
    """
    every = tuple(sorted({0, side * side, *(count for count in counts if count < side * side)}))
    return Painted(every, image, order, side)
