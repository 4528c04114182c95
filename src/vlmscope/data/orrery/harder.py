"""Test scenes made harder until Orrery errs on many of them, and hands whose sixth finger it denies.

Right and wrong answers are both needed where errors are to be predicted. A scene of the test split is drawn smaller,
darker and with noise, all by one level u that is uniform between two ends:

    side 64 (1 - u / 2), on the picture's median colour, at a random place
    brightness 1 - 0.7 u
    Gaussian noise of standard deviation 0.12 u, pixels in 0..1

The facts stay as they are, so the right answers do. Hands have five or six fingers, each half of the time.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image

from vlmscope.core.errors import UserError
from vlmscope.core.seeds import generator
from vlmscope.data.orrery.hands import hand_scene
from vlmscope.data.orrery.pairs import plainly_asked
from vlmscope.data.orrery.scene import KINDS, SIDE, Scene, make_scene

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
