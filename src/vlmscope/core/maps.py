"""Maps of patch contributions to a target or a soft token, and their compact form in files. Plain numpy, no torch.

In files a map is a small uint8 grid, made coarser if necessary, with two numbers to restore the values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlmscope.core.records import PatchBox

LEVELS = 255


@dataclass(frozen=True)
class Grids:
    """n maps on one grid, with values `low + step * code`.

    The error is at most `step / 2`, (largest - least) / 510 of the map, plus the float32 rounding of `low` and `step`.
    """

    codes: np.ndarray  # [n, rows, columns] uint8
    low: np.ndarray  # [n] float32, the least value of each map
    step: np.ndarray  # [n] float32; 0 where all values are equal


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
    """Values `[n, rows, columns]` in float64."""
    low, step = (part.astype(np.float64)[:, None, None] for part in (grids.low, grids.step))
    return low + step * grids.codes


def coarse_shape(rows: int, columns: int, most: int) -> tuple[int, int]:
    """The largest grid of about the same aspect ratio with at most `most` cells; unchanged if it fits."""
    if rows * columns <= most:
        return rows, columns
    factor = (most / (rows * columns)) ** 0.5
    down = min(max(1, int(rows * factor)), most)
    return down, max(1, min(int(columns * factor), most // down))


def resample(values: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Spread `[.., h, w]` over another grid of the same area, by overlap: `[.., rows, columns]` with equal sum."""
    down, across = _overlaps(values.shape[-2], rows), _overlaps(values.shape[-1], columns)
    return down @ values @ across.T


def _overlaps(old: int, new: int) -> np.ndarray:
    """`[new, old]`: the share of each old cell that lies in each new one; columns sum to 1."""
    edges_old, edges_new = np.arange(old + 1) / old, np.arange(new + 1) / new
    low = np.maximum(edges_old[None, :-1], edges_new[:-1, None])
    high = np.minimum(edges_old[None, 1:], edges_new[1:, None])
    return np.maximum(high - low, 0.0) * old


@dataclass(frozen=True)
class TileMap:
    """Contributions on one grid of patches."""

    boxes: list[PatchBox]  # rows * columns parts of the picture, row by row
    values: np.ndarray  # [rows, columns] float64, signed, in units of the target (logits, say)


@dataclass(frozen=True)
class PictureMap:
    """Contributions of one picture to one target, by patch: `edge = sum of tiles + sum of remainder`.

    The remainder comes from no patch of the picture, by name: "position" embeddings, "class_token", "baseline" (the
    patches of the baseline), "padding" (patches outside the picture), "bias" (all other constants), and for a feature's
    own activation "no_patch" (soft tokens without patches, such as the end of a row).
    """

    target: str
    picture: int  # its number in the prompt
    tiles: list[TileMap]  # in the order of the tower; several for models that divide a picture into tiles
    edge: float  # the sum of the edges from the picture's soft tokens, computed without the patches
    remainder: dict[str, float]

    @property
    def from_patches(self) -> float:
        """Sum over the patches."""
        return float(sum(tile.values.sum() for tile in self.tiles))

    @property
    def residual(self) -> float:
        """|edge - patches - remainder| relative to the sum of the absolute parts."""
        parts = [self.from_patches, *self.remainder.values()]
        scale = sum(np.abs(tile.values).sum() for tile in self.tiles) + sum(map(abs, self.remainder.values()))
        return abs(self.edge - sum(parts)) / scale if scale else abs(self.edge)

    def raster(self, height: int, width: int) -> np.ndarray:
        """`[height, width]` float64: contributions spread evenly over their boxes, summed over tiles.

        The sum is `from_patches`, except for patches of padding alone, whose boxes have no area.
        """
        out = np.zeros((height, width))
        for tile in self.tiles:
            for box, value in zip(tile.boxes, tile.values.ravel(), strict=True):
                if box.right > box.left and box.bottom > box.top:
                    left, top, right, bottom = box.pixels(width, height)
                    out[top:bottom, left:right] += value / ((right - left) * (bottom - top))
        return out


@dataclass(frozen=True)
class TokenTile:
    """Contributions of one grid of patches to soft tokens."""

    boxes: list[PatchBox]  # rows * columns parts of the picture, row by row
    tokens: np.ndarray  # [n] int64, numbers within the picture of the soft tokens that this tile contributes to
    values: np.ndarray  # [n, rows, columns] float64


@dataclass(frozen=True)
class TokenMaps:
    """One map over patches for every soft token of a picture."""

    kind: str  # "rollout" or "similarity"
    picture: int  # its number in the prompt
    tiles: list[TokenTile]  # in the order of the tower
    class_token: np.ndarray  # [S] float64, contributions of class tokens, which have no place in the picture

    def weighted(self, weights: np.ndarray, target: str) -> PictureMap:
        """Sum of the soft tokens' maps weighted by `weights [S]`, such as a feature's activations."""
        tiles = [
            TileMap(tile.boxes, np.tensordot(weights[tile.tokens].astype(np.float64), tile.values, 1))
            for tile in self.tiles
        ]
        rest = float(weights @ self.class_token)
        total = rest + float(sum(tile.values.sum() for tile in tiles))
        return PictureMap(target, self.picture, tiles, total, {"class_token": rest} if self.class_token.any() else {})
