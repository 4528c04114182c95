"""Where the objects of a scene are, by the pixel; scenes know it, so maps over patches can be held against it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmscope.core.images import PatchBox
from vlmscope.data.orrery.scene import SIDE, Scene

INK = 70  # grey levels above the darkest pixel
SKIN = 25  # grey levels of any channel from the ground's colour
COVERED = 0.25  # of a cell, from which on it counts as lying on the object


def object_mask(scene: Scene, group: str = "") -> np.ndarray:
    """Pixels `[64, 64]` bool of what a question is about.

    Args:
        scene: one with a picture.
        group: the fact asked for: of digits "first" or "second" means that one, anything else both.
    """
    assert scene.image is not None, "a scene without a picture"
    if scene.kind == "digits":
        bright = scene.image.max(-1) > int(scene.image.max(-1).min()) + INK
        left = np.arange(SIDE) < SIDE // 2
        half = {"first": left, "second": ~left}.get(group, np.ones(SIDE, bool))
        return bright & half[None]
    if scene.kind == "hands":  # on a ground of one colour, which no hand covers up to the corners
        return np.abs(scene.image.astype(int) - scene.image[0, 0].astype(int)).max(-1) > SKIN
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE + 0.5 / SIDE
    mask = np.zeros((SIDE, SIDE), bool)
    boxes = scene.facts["box"] if scene.kind == "planets" else scene.facts["boxes"]
    for left, top, right, bottom in np.reshape(np.asarray(boxes, float), (-1, 4)):
        if scene.kind == "planets":
            radius = (right - left) / 2
            mask |= (x - (left + right) / 2) ** 2 + (y - (top + bottom) / 2) ** 2 < radius**2
        else:
            mask |= (x > left) & (x < right) & (y > top) & (y < bottom)
    return mask


def covered_cells(mask: np.ndarray, side: int) -> np.ndarray:
    """`[side, side]` bool: cells of which at least `COVERED` is the object.

    Args:
        mask: pixels; `side` divides its height and width.
        side: cells down and across.
    """
    rows, columns = mask.shape[0] // side, mask.shape[1] // side
    return mask.reshape(side, rows, side, columns).mean((1, 3)) >= COVERED


def painted_mask(image: np.ndarray, contrast: int = SKIN) -> np.ndarray:
    """Pixels `[H, W]` bool that are not of the ground's colour, which most of `image [H, W, 3]` has.

    For pictures whose ground is of one colour, such as those of shapes; exact where `object_mask` knows boxes.
    """
    ground = np.median(image.reshape(-1, image.shape[-1]), axis=0)
    return np.abs(image - ground).max(-1) > contrast


def share_in_boxes(mask: np.ndarray, boxes: Sequence[PatchBox]) -> np.ndarray:
    """`[n]`, the share of each box's pixels that `mask [H, W]` covers."""
    found = []
    for box in boxes:
        left, top, right, bottom = box.pixels(mask.shape[1], mask.shape[0])
        found.append(float(mask[top:bottom, left:right].mean()))
    return np.array(found)
