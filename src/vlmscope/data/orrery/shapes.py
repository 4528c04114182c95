"""One to six equal shapes of one colour on a dark ground, never touching."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from vlmscope.core.records import generator
from vlmscope.data.orrery.scenes import (
    CAPTION_PROMPTS,
    NUMBERS,
    SHAPE_COLOURS,
    SHAPE_QUESTIONS,
    SHAPES,
    SIDE,
    Question,
    Scene,
    pick,
    plural,
)

SUPER = 3
_CELLS = 3  # shapes sit in a jittered 3 x 3 grid


def scene(rng: np.random.Generator, split: str) -> Scene:
    """Count 1-6, shape and colour chosen uniformly; each is asked for."""
    del split
    count = int(rng.integers(1, 7))
    shape, colour = str(rng.choice(SHAPES)), str(rng.choice(list(SHAPE_COLOURS)))
    return shape_scene(rng, shape, colour, count)


def shape_scene(rng: np.random.Generator, shape: str, colour: str, count: int) -> Scene:
    """A scene of `count` (1-6) equal shapes."""
    image, boxes = render(rng, shape, colour, count)
    answers = {"count": NUMBERS[count], "shape": shape, "shape_colour": colour}
    questions = [Question(g, pick(rng, SHAPE_QUESTIONS[g]), a) for g, a in answers.items()]
    caption = f"{NUMBERS[count]} {colour} {plural(shape, count)} ."
    questions.append(Question("caption", pick(rng, CAPTION_PROMPTS), caption))
    return Scene("shapes", "", image, {**answers, "boxes": boxes}, tuple(questions))


def render(rng: np.random.Generator, shape: str, colour: str, count: int) -> tuple[np.ndarray, list[float]]:
    """Draw shapes. Returns uint8 [64, 64, 3] and flat boxes (left, top, right, bottom per shape, fractions)."""
    ground = tuple(int(v) for v in rng.integers(5, 45, 3))
    picture = Image.new("RGB", (SIDE * SUPER, SIDE * SUPER), ground)
    draw = ImageDraw.Draw(picture)
    base = np.array(SHAPE_COLOURS[colour])
    fill = tuple(int(v) for v in np.clip(base * rng.uniform(0.85, 1.05) + rng.uniform(-8, 8, 3), 0, 255))
    cell = SIDE / _CELLS
    boxes: list[float] = []
    for slot in rng.permutation(_CELLS * _CELLS)[:count]:
        radius = rng.uniform(5.5, 8.5)
        jitter = rng.uniform(-1, 1, 2) * (cell / 2 - radius - 0.8)
        cx = (slot % _CELLS + 0.5) * cell + jitter[0]
        cy = (slot // _CELLS + 0.5) * cell + jitter[1]
        _draw(draw, shape, cx * SUPER, cy * SUPER, radius * SUPER, rng.uniform(-0.35, 0.35), fill)
        boxes += [float(np.clip(v / SIDE, 0, 1)) for v in (cx - radius, cy - radius, cx + radius, cy + radius)]
    small = picture.resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, np.uint8), boxes


def _draw(draw: ImageDraw.ImageDraw, shape: str, cx: float, cy: float, r: float, turn: float, fill: tuple) -> None:
    if shape == "circle":
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill)
        return
    corners = {"square": _polar([1.0] * 4), "triangle": _polar([1.0] * 3), "star": _polar([1.0, 0.45] * 5)}
    if shape == "cross":
        a = 0.32
        points = np.array(
            [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
        )
    else:
        points = corners[shape]
    start = turn + (np.pi / 4 if shape == "square" else 0.0)
    cos, sin = np.cos(start), np.sin(start)
    turned = points @ np.array([[cos, sin], [-sin, cos]]) * r + (cx, cy)
    draw.polygon([(float(x), float(y)) for x, y in turned], fill=fill)


def _polar(radii: list[float]) -> np.ndarray:
    """Corners at equal angles, the first one up: [n, 2]."""
    angles = np.arange(len(radii)) * 2 * np.pi / len(radii)
    return np.stack([np.sin(angles), -np.cos(angles)], -1) * np.array(radii)[:, None]


def counted_scenes(split: str, size: int, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """`size` pictures of 1 to 6 shapes in turn, and the shapes in turn, in any colour.

    Returns:
        Pixels, and [size, 3] what they show: how many, the shape's and the colour's place in the lists of `scenes`.
    """
    colours, i = list(SHAPE_COLOURS), np.arange(size)
    tints = generator(seed, "number line", split).integers(0, len(colours), size)
    facts, pixels = np.stack([i % 6 + 1, i // 6 % len(SHAPES), tints], 1), []
    for number, (count, shape, colour) in enumerate(facts.tolist()):
        rng = generator(seed, "number line", split, number)
        image = shape_scene(rng, SHAPES[shape], colours[colour], count).image
        assert image is not None, "scenes of shapes have pictures"
        pixels.append(image)
    return pixels, facts
