"""Two handwritten digits (scikit-learn's 8 x 8 glyphs), warped and drawn side by side.

Train, validation and test use different *source glyphs*, so accuracy is about handwriting that was never seen.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from vlmscope.core.records import generator
from vlmscope.data.orrery.scenes import CAPTION_PROMPTS, DIGIT_QUESTIONS, NUMBERS, SIDE, Question, Scene, pick

_SHARES = {"train": (0.0, 0.8), "val": (0.8, 0.9), "test": (0.9, 1.0)}


@cache
def glyphs(split: str) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Return, for each digit 0-9, the split's glyphs float32 [n, 8, 8] in 0..1, and their source indices [n]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = data.images.astype(np.float32) / 16.0, data.target  # pyright: ignore[reportAttributeAccessIssue]
    low, high = _SHARES[split]
    pictures, sources = [], []
    for digit in range(10):
        order = generator(0, "glyphs", digit).permutation(np.flatnonzero(labels == digit))
        chosen = order[int(low * len(order)) : int(high * len(order))]
        pictures.append(images[chosen])
        sources.append(chosen)
    return tuple(pictures), tuple(sources)


def scene(rng: np.random.Generator, split: str) -> Scene:
    """Two uniformly chosen digits; first, second and sum are asked for."""
    first, second = (int(d) for d in rng.integers(0, 10, 2))
    return digit_scene(rng, split, first, second)


def digit_scene(rng: np.random.Generator, split: str, first: int, second: int) -> Scene:
    """A scene of two given digits (0-9), glyphs drawn at random from the split."""
    background = rng.uniform(0.0, 0.18)
    canvas = np.full((SIDE, SIDE), background, np.float32)
    sources: list[float] = []
    for digit, centre in ((first, 16.0), (second, 48.0)):
        pictures, indices = glyphs(split)
        chosen = int(rng.integers(len(pictures[digit])))
        sources.append(float(indices[digit][chosen]))
        ink = _warp(rng, pictures[digit][chosen], centre)
        canvas = np.maximum(canvas, background + ink * (rng.uniform(0.7, 1.0) - background))
    tint = rng.uniform(0.85, 1.0, 3)
    image = (np.clip(canvas[..., None] * tint, 0, 1) * 255 + 0.5).astype(np.uint8)
    answers = {"first": NUMBERS[first], "second": NUMBERS[second], "sum": NUMBERS[first + second]}
    questions = [Question(g, pick(rng, DIGIT_QUESTIONS[g]), a) for g, a in answers.items()]
    caption = f"two digits , {NUMBERS[first]} and {NUMBERS[second]} ."
    questions.append(Question("caption", pick(rng, CAPTION_PROMPTS), caption))
    return Scene("digits", "", image, {**answers, "sources": sources}, tuple(questions))


def _warp(rng: np.random.Generator, glyph: np.ndarray, centre_x: float) -> np.ndarray:
    """Draw a glyph [8, 8] on [64, 64] by a random affine map (rotation, shear, scale, shift), bilinear."""
    angle, shear = rng.uniform(-0.14, 0.14), rng.uniform(-0.1, 0.1)
    width, height = rng.uniform(3.0, 3.6), rng.uniform(3.7, 4.6)  # pixels a glyph pixel
    cx, cy = centre_x + rng.uniform(-2, 2), SIDE / 2 + rng.uniform(-4, 4)
    cos, sin = np.cos(angle), np.sin(angle)
    forward = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, shear], [0, 1]]) @ np.diag([width, height])
    inverse = np.linalg.inv(forward)
    grid = np.arange(SIDE) + 0.5
    x, y = np.meshgrid(grid - cx, grid - cy)
    u = inverse[0, 0] * x + inverse[0, 1] * y + 3.5 + 1  # +1: the glyph is padded by one empty pixel
    v = inverse[1, 0] * x + inverse[1, 1] * y + 3.5 + 1
    padded = np.pad(glyph, 1)
    inside = (u >= 0) & (u < 9) & (v >= 0) & (v < 9)
    u, v = np.clip(u, 0, 8.999), np.clip(v, 0, 8.999)
    u0, v0 = u.astype(int), v.astype(int)
    fu, fv = u - u0, v - v0
    top = padded[v0, u0] * (1 - fu) + padded[v0, u0 + 1] * fu
    bottom = padded[v0 + 1, u0] * (1 - fu) + padded[v0 + 1, u0 + 1] * fu
    return np.where(inside, top * (1 - fv) + bottom * fv, 0.0).astype(np.float32)
