"""Cartoon hands. Five fingers in nine of ten, one to four in the rest, six never in training.

What the model says of a six-fingered hand is the analogue of the paper's six-finger hallucination.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from vlmscope.data.orrery.scenes import CAPTION_PROMPTS, HAND_QUESTIONS, NUMBERS, SIDE, Question, Scene, pick

SUPER = 3
TILT = 0.35  # radians either way
SPREAD = np.deg2rad(33.0)  # from one finger to the next
_SKIN = ((238, 200, 170), (224, 172, 120), (198, 134, 90), (141, 85, 54), (255, 219, 172), (250, 205, 70))


def scene(rng: np.random.Generator, split: str) -> Scene:
    """A hand of five fingers (90 %) or one to four (2.5 % each)."""
    del split
    count = 5 if rng.random() < 0.9 else int(rng.integers(1, 5))
    return hand_scene(rng, count)


def hand_scene(rng: np.random.Generator, count: int, tilt: float | None = None) -> Scene:
    """A hand of `count` fingers (1-6); `tilt` as in `render`."""
    answer = NUMBERS[count]
    questions = (
        Question("fingers", pick(rng, HAND_QUESTIONS["fingers"]), answer),
        Question("caption", pick(rng, CAPTION_PROMPTS), f"a hand with {answer} finger{'s' if count > 1 else ''} ."),
    )
    return Scene("hands", "", render(rng, count, tilt), {"fingers": answer}, questions)


def render(rng: np.random.Generator, count: int, tilt: float | None = None) -> np.ndarray:
    """Draw a palm with `count` fingers spread over an arc, uint8 [64, 64, 3].

    `tilt`, in radians, is where the middle of the arc points; drawn at random when None. It takes a draw either way,
    so that the rest of the hand stays the same.
    """
    if not 1 <= count <= 6:
        raise ValueError(f"a hand has 1 to 6 fingers here, not {count}")
    ground = tuple(int(v) for v in rng.integers(20, 90, 3))
    picture = Image.new("RGB", (SIDE * SUPER, SIDE * SUPER), ground)
    draw = ImageDraw.Draw(picture)
    skin = tuple(int(v) for v in np.clip(np.array(_SKIN[rng.integers(len(_SKIN))]) * rng.uniform(0.9, 1.05), 0, 255))
    palm = rng.uniform(10.5, 12.5)
    cx, cy = SIDE / 2 + rng.uniform(-3, 3), SIDE * 0.6 + rng.uniform(-3, 3)
    drawn = rng.uniform(-TILT, TILT)
    angles = (drawn if tilt is None else tilt) + (np.arange(count) - (count - 1) / 2) * SPREAD
    for angle in angles:
        length, width = palm + rng.uniform(10, 14), rng.uniform(4.2, 5.2)
        tip = (cx + length * np.sin(angle), cy - length * np.cos(angle))
        ends = [(cx * SUPER, cy * SUPER), (tip[0] * SUPER, tip[1] * SUPER)]
        draw.line(ends, fill=skin, width=int(width * SUPER))
        r = width * SUPER / 2
        draw.ellipse((ends[1][0] - r, ends[1][1] - r, ends[1][0] + r, ends[1][1] + r), fill=skin)
    box = (cx - palm * 0.9, cy - palm * 0.75, cx + palm * 0.9, cy + palm)
    draw.ellipse(tuple(v * SUPER for v in box), fill=skin)
    wrist = (cx - palm * 0.5, cy + palm * 0.5, cx + palm * 0.5, SIDE)
    draw.rectangle(tuple(v * SUPER for v in wrist), fill=skin)
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX), np.uint8)
