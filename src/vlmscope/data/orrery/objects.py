"""Where a scene's objects are, and harder versions of a scene.

Where the objects of a scene are, by the pixel; scenes know it, so maps over patches can be held against it.

Test scenes made harder until Orrery errs on many of them, and hands whose sixth finger it denies.

Right and wrong answers are both needed where errors are to be predicted. A scene of the test split is drawn smaller,
darker and with noise, all by one level u that is uniform between two ends:

    side 64 (1 - u / 2), on the picture's median colour, at a random place
    brightness 1 - 0.7 u
    Gaussian noise of standard deviation 0.12 u, pixels in 0..1

The facts stay as they are, so the right answers do. Hands have five or six fingers, each half of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from vlmscope.core.errors import UserError
from vlmscope.core.records import PatchBox, generator
from vlmscope.data.orrery.dataset import plainly_asked
from vlmscope.data.orrery.hands import hand_scene
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.data.orrery.scenes import KINDS, SIDE, Scene

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


SMALLER, DARKER, NOISE = 0.5, 0.7, 0.12  # at level 1
PICTURED = tuple(kind for kind in KINDS if kind != "text")


def degrade(image: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    """A picture uint8 [64, 64, 3] made harder; level 0 gives it back as it is."""
    side = round(SIDE * (1 - SMALLER * level))
    row, column = (int(value) for value in rng.integers(0, SIDE - side + 1, 2))
    small = Image.fromarray(image).resize((side, side), Image.Resampling.BOX)
    canvas = np.empty(image.shape, np.float64)
    canvas[:] = np.median(image.reshape(-1, 3), axis=0)
    canvas[row : row + side, column : column + side] = np.asarray(small)
    dark = canvas / 255.0 * (1 - DARKER * level)
    noisy = dark + rng.normal(0.0, 1.0, image.shape) * NOISE * level
    return (np.clip(noisy, 0, 1) * 255 + 0.5).astype(np.uint8)


def harder_scenes(counts: dict[str, int], levels: tuple[float, float], seed: int = 0) -> list[Scene]:
    """Test scenes with their questions in the canonical words; `facts["level"]` says how hard each is.

    Args:
        counts: scenes of each kind that has pictures.
        levels: the least and the highest level.
        seed: of scenes and levels.

    Raises:
        UserError: a kind that is not there or has no pictures.
    """
    unknown = [kind for kind in counts if kind not in PICTURED]
    if unknown:
        raise UserError(f"no harder scenes of {unknown[0]!r}: choose from {', '.join(PICTURED)}")
    found = []
    for kind, count in counts.items():
        for i in range(count):
            rng = generator(seed, "harder", kind, i)
            level = float(rng.uniform(*levels))
            scene = _hand(rng, i) if kind == "hands" else make_scene("test", kind, i, seed)
            assert scene.image is not None, "kinds with pictures have one"
            plain = plainly_asked(scene)
            facts = {**plain.facts, "level": level}
            found.append(replace(plain, image=degrade(scene.image, level, rng), facts=facts))
    return found


def _hand(rng: np.random.Generator, number: int) -> Scene:
    return replace(hand_scene(rng, int(rng.choice([5, 6]))), key=f"test-hands-{number:06d}")
