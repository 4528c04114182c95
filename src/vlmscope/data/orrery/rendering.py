"""Orrery's pictures: planets, pairs of digits, shapes and hands, drawn from a random stream alone.

Planets are spheres ray-cast from real texture maps. Orthographic rays along -z hit a sphere of radius r at (cx, cy);
the hit point, rotated by a random rotation, gives longitude and latitude, hence the texel (bilinear). Light is
Lambertian with an ambient floor. Digits are scikit-learn's handwritten 8 x 8 glyphs under a random affine map; splits
share no source glyph, but writers: accuracy is on other glyphs, not on another hand. Each planet has one texture in all
splits. Shapes are equal, of one colour and never touch.
Hands have five fingers in nine of ten scenes, one to four in the rest and six never in training: the answer for six is
the analogue of the paper's hallucination (arXiv 2602.20330).

Renderers take the same draws in the same order whatever the fact is, so two scenes of equal streams with one argument
changed are otherwise identical to the pixel (`vlmscope.data.orrery.dataset.scene_pairs`): never reorder draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from vlmscope.core.artifacts import shipped
from vlmscope.core.errors import UserError
from vlmscope.core.records import generator
from vlmscope.data.orrery import scenes

PLANET_SAMPLES = 2  # rays per pixel and axis, averaged
RING = (1.35, 2.05)  # inner and outer radius of Saturn's rings, in planet radii
GLYPH_SHARES = {"train": (0.0, 0.8), "val": (0.8, 0.9), "test": (0.9, 1.0)}
SUPER = 3  # supersampling factor of shapes and hands
CELLS = 3  # shapes sit in a jittered 3 x 3 grid
CROSS = 0.32  # half the width of a cross's arms, in radii
TILT = 0.35  # of a hand, radians either way
SPREAD = np.deg2rad(33.0)  # from one finger to the next
SKINS = ((238, 200, 170), (224, 172, 120), (198, 134, 90), (141, 85, 54), (255, 219, 172), (250, 205, 70))
TEXT_FACTS = {"text_planet": 3, "text_sum": 2, "text_other": 1}  # questions per group in a scene of text


def make_scene(split: str, kind: str, index: int, seed: int = 0) -> scenes.Scene:
    """Scene `index` of a split. Equal arguments give equal bytes; splits never share a stream.

    Raises:
        ValueError: unknown split or kind.
    """
    if split not in scenes.SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(scenes.SPLITS)}")
    if kind not in (*scenes.KINDS, *scenes.COMPOSED):
        raise ValueError(f"unknown scene kind {kind!r}: choose one of {', '.join((*scenes.KINDS, *scenes.COMPOSED))}")
    rng = generator(seed, "orrery", split, kind, index)
    if kind == "planets":
        scene = planet_scene(rng, str(rng.choice(list(scenes.PLANETS))))
    elif kind == "digits":
        first, second = (int(digit) for digit in rng.integers(0, 10, 2))
        scene = digit_scene(rng, split, first, second)
    elif kind == "shapes":
        count = int(rng.integers(1, 7))
        shape, colour = str(rng.choice(scenes.SHAPES)), str(rng.choice(list(scenes.SHAPE_COLOURS)))
        scene = shape_scene(rng, shape, colour, count)
    elif kind == "hands":
        scene = hand_scene(rng, 5 if rng.random() < 0.9 else int(rng.integers(1, 5)))
    elif kind == "duets":
        left, right = (str(name) for name in rng.choice(list(scenes.PLANETS), 2))
        scene = duet_scene(rng, left, right)
    elif kind == "tinted":
        digits, colours = rng.choice(10, 2, replace=False), rng.choice(list(scenes.SHAPE_COLOURS), 2, replace=False)
        scene = tinted_scene(rng, split, [int(digit) for digit in digits], [str(colour) for colour in colours])
    elif kind == "objects":
        scene = object_scene(rng, _drawn_objects(rng))
    else:
        scene = _text_scene(rng)
    return scenes.Scene(kind, f"{split}-{kind}-{index:06d}", scene.image, scene.facts, scene.questions)


def _text_scene(rng: np.random.Generator) -> scenes.Scene:
    """Six facts: three about planets, two sums, and one about a hand or a shape."""
    questions: list[scenes.Question] = []
    for group, count in TEXT_FACTS.items():
        pool = [fact for fact in scenes.text_facts() if fact[0] == group]
        questions += [scenes.Question(*pool[int(i)]) for i in rng.choice(len(pool), count, replace=False)]
    return scenes.Scene("text", "", None, {}, tuple(questions))


def _questions(rng: np.random.Generator, answers: Mapping[str, str], caption: str) -> tuple[scenes.Question, ...]:
    """One question per fact and one for the caption, in random wordings."""
    questions = [
        scenes.Question(group, _wording(rng, scenes.QUESTIONS[group]), answer) for group, answer in answers.items()
    ]
    return (*questions, scenes.Question("caption", _wording(rng, scenes.CAPTION_PROMPTS), caption))


def _wording(rng: np.random.Generator, templates: tuple[str, ...]) -> str:
    """A random wording, half of the time the canonical first one."""
    if len(templates) == 1 or rng.random() < 0.5:
        return templates[0]
    return templates[int(rng.integers(1, len(templates)))]


@cache
def texture(name: str) -> np.ndarray:
    """Equirectangular map of a planet, float32 [128, 256, 3] in 0..1, halved: more detail would alias at 64 pixels."""
    path = shipped(f"assets/planet_textures/{name}.jpg")
    if not path.is_file():
        raise UserError(f"planet texture {path} is missing; install vlmscope again")
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((256, 128), Image.Resampling.BOX), np.float32) / 255.0


def planet_scene(rng: np.random.Generator, name: str) -> scenes.Scene:
    """A planet in random pose, size, light and sky; the fact `box` is in fractions of the picture."""
    planet = scenes.PLANETS[name]
    image, box = _planet(rng, name)
    answers = asdict(planet)
    caption = f"{planet.name} , a {planet.colour} planet covered with {planet.cover} ."
    return scenes.Scene(
        "planets", "", image, {"planet": name, **answers, "box": box}, _questions(rng, answers, caption)
    )


def _planet(rng: np.random.Generator, name: str) -> tuple[np.ndarray, list[float]]:
    radius = rng.uniform(16, 20 if name == "saturn" else 29)
    slack = max(scenes.SIDE / 2 - radius - 1, 1.0)
    cx, cy = scenes.SIDE / 2 + rng.uniform(-slack, slack, 2)
    grid = (np.arange(scenes.SIDE * PLANET_SAMPLES) + 0.5) / PLANET_SAMPLES
    x, y = np.meshgrid((grid - cx) / radius, (grid - cy) / radius)
    inside, z, colour = _sphere(rng, name, x, y)
    canvas = _sky(rng)
    canvas[inside] = colour
    if name == "saturn":
        _add_rings(rng, canvas, x, y, z, inside)
    box = [float(v / scenes.SIDE) for v in (cx - radius, cy - radius, cx + radius, cy + radius)]
    return _developed(rng, canvas), [min(max(v, 0.0), 1.0) for v in box]


def _developed(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """A canvas of samples as pixels uint8 [64, 64, 3], slightly tinted."""
    fine = np.clip(canvas * rng.uniform(0.98, 1.02, 3), 0, 1)
    fine = fine.reshape(scenes.SIDE, PLANET_SAMPLES, scenes.SIDE, PLANET_SAMPLES, 3)
    return (fine.mean((1, 3)) * 255 + 0.5).astype(np.uint8)


def _sphere(
    rng: np.random.Generator, name: str, x: np.ndarray, y: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which samples a planet covers, its depth z at all of them, and the colours [n, 3] of those covered.

    `x`, `y` [H, W] are places in planet radii from its middle; pose and light are drawn.
    """
    from scipy.spatial.transform import Rotation

    rotation = Rotation.random(random_state=rng).as_matrix()  # pyright: ignore[reportCallIssue]
    light = np.array([rng.uniform(-0.7, 0.7), rng.uniform(-0.7, 0.7), 1.0])
    light /= np.linalg.norm(light)
    inside = x**2 + y**2 < 1
    z = np.sqrt(np.clip(1 - x**2 - y**2, 0, None))
    normal = np.stack([x[inside], y[inside], z[inside]], -1)
    shade = np.clip(normal @ light, 0, None) * rng.uniform(0.75, 1.0) + rng.uniform(0.1, 0.25)
    points, tex = normal @ rotation.T, texture(name)
    height, width, _ = tex.shape
    u = (np.arctan2(points[..., 0], points[..., 2]) / (2 * np.pi) + 0.5) * width - 0.5  # longitude
    v = np.clip((np.arcsin(np.clip(points[..., 1], -1, 1)) / np.pi + 0.5) * height - 0.5, 0, height - 1.001)
    colour = _bilinear(tex, v, u) * np.clip(shade, 0, 1.15)[..., None]
    if name == "earth":
        colour = colour * 1.25 + 0.02  # the map is darker than the others: NASA's has no atmosphere
    return inside, z, colour


def _bilinear(table: np.ndarray, v: np.ndarray, u: np.ndarray) -> np.ndarray:
    """A table [H, W] or [H, W, 3] at fractional rows `v` and columns `u`; columns wrap around."""
    v0, u0 = np.floor(v).astype(int), np.floor(u).astype(int)
    fv, fu = (v - v0, u - u0) if table.ndim == 2 else ((v - v0)[..., None], (u - u0)[..., None])
    below, left, right = np.minimum(v0 + 1, len(table) - 1), u0 % table.shape[1], (u0 + 1) % table.shape[1]
    top = table[v0, left] * (1 - fu) + table[v0, right] * fu
    bottom = table[below, left] * (1 - fu) + table[below, right] * fu
    return top * (1 - fv) + bottom * fv


def _sky(rng: np.random.Generator) -> np.ndarray:
    """A dark sky with up to 40 stars of two by two samples, float [2 * 64, 2 * 64, 3]."""
    side = scenes.SIDE * PLANET_SAMPLES
    sky = np.full((side, side, 3), rng.uniform(0.0, 0.06))
    count = int(rng.integers(0, 40))
    rows, columns = rng.integers(0, side - 1, (2, count))
    brightness = rng.uniform(0.3, 1.0, (count, 1))
    for down in (0, 1):
        for across in (0, 1):
            sky[rows + down, columns + across] = brightness
    return sky


def _add_rings(
    rng: np.random.Generator, canvas: np.ndarray, x: np.ndarray, y: np.ndarray, z: np.ndarray, inside: np.ndarray
) -> None:
    """Draw rings in the plane n . p = 0, hidden where they pass behind the sphere."""
    tilt, turn = rng.uniform(0.15, 0.6), rng.uniform(0, 2 * np.pi)
    n = np.array([np.sqrt(1 - tilt**2) * np.cos(turn), np.sqrt(1 - tilt**2) * np.sin(turn), tilt])
    depth = -(n[0] * x + n[1] * y) / n[2]
    r = np.sqrt(x**2 + y**2 + depth**2)
    visible = (r > RING[0]) & (r < RING[1]) & (~inside | (depth > z))
    band = 0.55 + 0.25 * np.sin(r * 22)
    canvas[visible] = (band[..., None] * np.array([0.93, 0.85, 0.68]))[visible]


@cache
def glyphs(split: str) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """For each digit 0-9 the split's glyphs, float32 [n, 8, 8] in 0..1, and their source indices [n]."""
    package = find_spec("sklearn")
    assert package is not None and package.origin is not None
    # scikit-learn's digits, read without importing it, which takes longer than all else that draws a scene
    rows = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    images, labels = rows[:, :-1].reshape(-1, 8, 8).astype(np.float32) / 16.0, rows[:, -1].astype(int)
    low, high = GLYPH_SHARES[split]
    sources = []
    for digit in range(10):
        order = generator(0, "glyphs", digit).permutation(np.flatnonzero(labels == digit))
        sources.append(order[int(low * len(order)) : int(high * len(order))])
    return tuple(images[chosen] for chosen in sources), tuple(sources)


def digit_scene(rng: np.random.Generator, split: str, first: int, second: int) -> scenes.Scene:
    """A scene of two given digits (0-9), glyphs drawn at random from the split."""
    background = rng.uniform(0.0, 0.18)
    canvas = np.full((scenes.SIDE, scenes.SIDE), background, np.float32)
    sources: list[float] = []
    pictures, indices = glyphs(split)
    for digit, centre in ((first, 16.0), (second, 48.0)):
        chosen = int(rng.integers(len(pictures[digit])))
        sources.append(float(indices[digit][chosen]))
        ink = _warped_glyph(rng, pictures[digit][chosen], centre)
        canvas = np.maximum(canvas, background + ink * (rng.uniform(0.7, 1.0) - background))
    tint = rng.uniform(0.85, 1.0, 3)
    image = (np.clip(canvas[..., None] * tint, 0, 1) * 255 + 0.5).astype(np.uint8)
    answers = {"first": scenes.NUMBERS[first], "second": scenes.NUMBERS[second], "sum": scenes.NUMBERS[first + second]}
    caption = f"two digits , {scenes.NUMBERS[first]} and {scenes.NUMBERS[second]} ."
    return scenes.Scene("digits", "", image, {**answers, "sources": sources}, _questions(rng, answers, caption))


def _warped_glyph(rng: np.random.Generator, glyph: np.ndarray, centre_x: float) -> np.ndarray:
    """A glyph [8, 8] under a random affine map (rotation, shear, scale, shift) on [64, 64], bilinear."""
    angle, shear = rng.uniform(-0.14, 0.14), rng.uniform(-0.1, 0.1)
    width, height = rng.uniform(3.0, 3.6), rng.uniform(3.7, 4.6)  # pixels per glyph pixel
    cx, cy = centre_x + rng.uniform(-2, 2), scenes.SIDE / 2 + rng.uniform(-4, 4)
    cos, sin = np.cos(angle), np.sin(angle)
    forward = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, shear], [0, 1]]) @ np.diag([width, height])
    inverse = np.linalg.inv(forward)
    grid = np.arange(scenes.SIDE) + 0.5
    x, y = np.meshgrid(grid - cx, grid - cy)
    u = inverse[0, 0] * x + inverse[0, 1] * y + 3.5 + 1  # +1: the glyph is padded by one empty pixel
    v = inverse[1, 0] * x + inverse[1, 1] * y + 3.5 + 1
    padded = np.pad(glyph, 1)
    inside = (u >= 0) & (u < 9) & (v >= 0) & (v < 9)
    ink = _bilinear(padded, np.clip(v, 0, 8.999), np.clip(u, 0, 8.999))
    return np.where(inside, ink, 0.0).astype(np.float32)


def shape_scene(rng: np.random.Generator, shape: str, colour: str, count: int) -> scenes.Scene:
    """`count` (1-6) equal shapes; the fact `boxes` is left, top, right, bottom of each, in fractions."""
    ground = tuple(int(v) for v in rng.integers(5, 45, 3))
    picture = Image.new("RGB", (scenes.SIDE * SUPER, scenes.SIDE * SUPER), ground)
    draw = ImageDraw.Draw(picture)
    base = np.array(scenes.SHAPE_COLOURS[colour])
    fill = tuple(int(v) for v in np.clip(base * rng.uniform(0.85, 1.05) + rng.uniform(-8, 8, 3), 0, 255))
    cell = scenes.SIDE / CELLS
    boxes: list[float] = []
    for slot in rng.permutation(CELLS * CELLS)[:count]:
        radius = rng.uniform(5.5, 8.5)
        jitter = rng.uniform(-1, 1, 2) * (cell / 2 - radius - 0.8)
        cx = (slot % CELLS + 0.5) * cell + jitter[0]
        cy = (slot // CELLS + 0.5) * cell + jitter[1]
        _draw_shape(draw, shape, cx * SUPER, cy * SUPER, radius * SUPER, rng.uniform(-0.35, 0.35), fill)
        boxes += [float(np.clip(v / scenes.SIDE, 0, 1)) for v in (cx - radius, cy - radius, cx + radius, cy + radius)]
    answers = {"count": scenes.NUMBERS[count], "shape": shape, "shape_colour": colour}
    questions = _questions(rng, answers, f"{scenes.NUMBERS[count]} {colour} {scenes.plural(shape, count)} .")
    return scenes.Scene("shapes", "", _averaged(picture), {**answers, "boxes": boxes}, questions)


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, cx: float, cy: float, r: float, turn: float, fill: tuple
) -> None:
    if shape == "circle":
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill)
        return
    if shape == "cross":
        a = CROSS
        points = np.array(
            [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
        )
    else:  # corners at equal angles, the first one up
        radii = {"square": [1.0] * 4, "triangle": [1.0] * 3, "star": [1.0, 0.45] * 5}[shape]
        angles = np.arange(len(radii)) * 2 * np.pi / len(radii)
        points = np.stack([np.sin(angles), -np.cos(angles)], -1) * np.array(radii)[:, None]
    start = turn + (np.pi / 4 if shape == "square" else 0.0)
    cos, sin = np.cos(start), np.sin(start)
    turned = points @ np.array([[cos, sin], [-sin, cos]]) * r + (cx, cy)
    draw.polygon([(float(x), float(y)) for x, y in turned], fill=fill)


def hand_scene(rng: np.random.Generator, count: int, tilt: float | None = None) -> scenes.Scene:
    """A hand with `count` fingers (1-6) spread over an arc.

    `tilt`, in radians, is the direction of the arc's middle, random when None.
    """
    if not 1 <= count <= 6:
        raise ValueError(f"a hand has 1 to 6 fingers here, not {count}")
    # Before the picture, whose number of draws depends on `count`.
    caption = f"a hand with {scenes.NUMBERS[count]} {scenes.plural('finger', count)} ."
    questions = _questions(rng, {"fingers": scenes.NUMBERS[count]}, caption)
    ground = tuple(int(v) for v in rng.integers(20, 90, 3))
    picture = Image.new("RGB", (scenes.SIDE * SUPER, scenes.SIDE * SUPER), ground)
    draw = ImageDraw.Draw(picture)
    skin = tuple(int(v) for v in np.clip(np.array(SKINS[rng.integers(len(SKINS))]) * rng.uniform(0.9, 1.05), 0, 255))
    palm = rng.uniform(10.5, 12.5)
    cx, cy = scenes.SIDE / 2 + rng.uniform(-3, 3), scenes.SIDE * 0.6 + rng.uniform(-3, 3)
    random_tilt = rng.uniform(-TILT, TILT)  # drawn in any case, so that the rest of the hand does not depend on `tilt`
    for angle in (random_tilt if tilt is None else tilt) + (np.arange(count) - (count - 1) / 2) * SPREAD:
        length, width = palm + rng.uniform(10, 14), rng.uniform(4.2, 5.2)
        tip = (cx + length * np.sin(angle), cy - length * np.cos(angle))
        ends = [(cx * SUPER, cy * SUPER), (tip[0] * SUPER, tip[1] * SUPER)]
        draw.line(ends, fill=skin, width=int(width * SUPER))
        r = width * SUPER / 2
        draw.ellipse((ends[1][0] - r, ends[1][1] - r, ends[1][0] + r, ends[1][1] + r), fill=skin)
    box = (cx - palm * 0.9, cy - palm * 0.75, cx + palm * 0.9, cy + palm)
    draw.ellipse(tuple(v * SUPER for v in box), fill=skin)
    wrist = (cx - palm * 0.5, cy + palm * 0.5, cx + palm * 0.5, scenes.SIDE)
    draw.rectangle(tuple(v * SUPER for v in wrist), fill=skin)
    return scenes.Scene("hands", "", _averaged(picture), {"fingers": scenes.NUMBERS[count]}, questions)


def _averaged(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.resize((scenes.SIDE, scenes.SIDE), Image.Resampling.BOX), np.uint8)


def _asked(group: str, answer: str, *words: str) -> scenes.Question:
    """A question of a composed scene about some words."""
    return scenes.Question(group, scenes.COMPOSED_QUESTIONS[group].format(*words), answer)


def duet_scene(rng: np.random.Generator, left: str, right: str) -> scenes.Scene:
    """Two planets side by side, each in its half of the picture."""
    names = {"left": left, "right": right}
    canvas = _sky(rng)
    grid = (np.arange(scenes.SIDE * PLANET_SAMPLES) + 0.5) / PLANET_SAMPLES
    for middle, name in ((scenes.SIDE / 4, left), (scenes.SIDE * 3 / 4, right)):
        radius = rng.uniform(9, 11) if name == "saturn" else rng.uniform(11, 15)
        cx, cy = middle + rng.uniform(-1, 1) * (15.5 - radius), scenes.SIDE / 2 + rng.uniform(-1, 1) * (31 - radius)
        columns = np.abs(grid - middle) < scenes.SIDE / 4
        half = canvas[:, columns]
        x, y = np.meshgrid((grid[columns] - cx) / radius, (grid - cy) / radius)
        inside, z, colour = _sphere(rng, name, x, y)
        half[inside] = colour
        if name == "saturn":
            _add_rings(rng, half, x, y, z, inside)
        canvas[:, columns] = half
    image = _developed(rng, canvas)
    questions = []
    for side, name in names.items():
        planet = scenes.PLANETS[name]
        asked = {side: name, f"{side}_colour": planet.colour, f"{side}_cover": planet.cover}
        questions += [_asked(group, answer) for group, answer in asked.items()]
    is_there = bool(rng.random() < 0.5)
    pool = [name for name in scenes.PLANETS if (name in names.values()) == is_there]
    questions.append(_asked("present", scenes.YES_NO[is_there], str(rng.choice(pool))))
    return scenes.Scene("duets", "", image, dict(names), tuple(questions))


def tinted_scene(rng: np.random.Generator, split: str, digits: Sequence[int], colours: Sequence[str]) -> scenes.Scene:
    """Two different digits in two different colours of shapes, glyphs drawn at random from the split."""
    pictures, _ = glyphs(split)
    canvas = np.full((scenes.SIDE, scenes.SIDE, 3), rng.uniform(0.0, 0.15))
    for digit, colour, centre in zip(digits, colours, (16.0, 48.0), strict=True):
        ink = _warped_glyph(rng, pictures[digit][int(rng.integers(len(pictures[digit])))], centre)[..., None]
        paint = np.array(scenes.SHAPE_COLOURS[colour]) / 255 * rng.uniform(0.85, 1.05)
        canvas = canvas * (1 - ink) + paint * ink
    image = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
    larger, asked = int(digits[1] > digits[0]), int(rng.integers(2))
    questions = (
        _asked("larger", scenes.NUMBERS[max(digits)]),
        _asked("larger_colour", colours[larger]),
        _asked("first_colour", colours[0]),
        _asked("second_colour", colours[1]),
        _asked("digit_of_colour", scenes.NUMBERS[digits[asked]], colours[asked]),
    )
    facts = {"first": scenes.NUMBERS[digits[0]], "second": scenes.NUMBERS[digits[1]]}
    facts |= {"first_colour": colours[0], "second_colour": colours[1]}
    return scenes.Scene("tinted", "", image, dict(facts), questions)


def _drawn_objects(rng: np.random.Generator) -> list[tuple[str, str]]:
    """Colour and shape of two to four things; each repeats an earlier one with probability 0.3."""
    things: list[tuple[str, str]] = []
    for _ in range(int(rng.integers(2, 5))):
        again = bool(things) and rng.random() < 0.3
        drawn = (str(rng.choice(list(scenes.SHAPE_COLOURS))), str(rng.choice(scenes.SHAPES)))
        things.append(things[int(rng.integers(len(things)))] if again else drawn)
    return things


def object_scene(rng: np.random.Generator, things: Sequence[tuple[str, str]]) -> scenes.Scene:
    """Up to four things of given colours and shapes, one in a quarter of the picture.

    Facts name the thing in each quarter (`thing_0` .. `thing_3`, by rows; "" for none).
    """
    ground = tuple(int(v) for v in rng.integers(5, 45, 3))
    picture = Image.new("RGB", (scenes.SIDE * SUPER, scenes.SIDE * SUPER), ground)
    draw = ImageDraw.Draw(picture)
    facts = {f"thing_{slot}": "" for slot in range(4)}
    for slot, (colour, shape) in zip(rng.permutation(4).tolist(), things, strict=False):
        facts[f"thing_{slot}"] = f"{colour} {shape}"
        radius = rng.uniform(8, 12)
        cx, cy = (np.array([slot % 2, slot // 2]) + 0.5) * scenes.SIDE / 2 + rng.uniform(-1, 1, 2) * (15 - radius)
        base = np.array(scenes.SHAPE_COLOURS[colour]) * rng.uniform(0.85, 1.05) + rng.uniform(-8, 8, 3)
        fill = tuple(int(v) for v in np.clip(base, 0, 255))
        _draw_shape(draw, shape, cx * SUPER, cy * SUPER, radius * SUPER, rng.uniform(-0.35, 0.35), fill)
    questions = _object_questions(rng, things)
    return scenes.Scene("objects", "", _averaged(picture), dict(facts), questions)


def _object_questions(rng: np.random.Generator, things: Sequence[tuple[str, str]]) -> tuple[scenes.Question, ...]:
    """What is unique, how many of a sort, and whether a sort is there: half of the time not, but its parts may be."""
    colours, shapes = zip(*things, strict=True)
    questions = []
    for group, known, told in (("colour_of", shapes, colours), ("shape_of", colours, shapes)):
        unique = [number for number, word in enumerate(known) if known.count(word) == 1]
        if unique:
            number = int(rng.choice(unique))
            questions.append(_asked(group, told[number], known[number]))
    mixed = [(colour, shape) for colour in colours for shape in shapes if (colour, shape) not in things]
    anything = [
        (colour, shape) for colour in scenes.SHAPE_COLOURS for shape in scenes.SHAPES if (colour, shape) not in things
    ]
    absent = mixed if mixed and rng.random() < 0.7 else anything
    shown, missing = things[int(rng.integers(len(things)))], absent[int(rng.integers(len(absent)))]
    counted = missing if rng.random() < 0.2 else shown
    number = scenes.NUMBERS[list(things).count(counted)]
    questions.append(_asked("count_of", number, counted[0], scenes.plural(counted[1], 2)))
    is_there = bool(rng.random() < 0.5)
    questions.append(_asked("exists", scenes.YES_NO[is_there], *(shown if is_there else missing)))
    return tuple(questions)


# Harder scenes, on which models err often enough that errors can be predicted, are smaller, darker and noisy by one
# level u: these are the shares of side and brightness that u = 1 takes, and the noise (pixels in 0..1) that it adds.
SMALLER, DARKER, NOISE = 0.5, 0.7, 0.12


def degrade(image: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
    """A picture uint8 [64, 64, 3] made harder; level 0 gives it back as it is.

    It is shrunk onto the picture's median colour at a random place, darkened, and given Gaussian noise.
    """
    side = round(scenes.SIDE * (1 - SMALLER * level))
    row, column = (int(value) for value in rng.integers(0, scenes.SIDE - side + 1, 2))
    small = Image.fromarray(image).resize((side, side), Image.Resampling.BOX)
    canvas = np.empty(image.shape, np.float64)
    canvas[:] = np.median(image.reshape(-1, 3), axis=0)
    canvas[row : row + side, column : column + side] = np.asarray(small)
    dark = canvas / 255.0 * (1 - DARKER * level)
    noisy = dark + rng.normal(0.0, 1.0, image.shape) * NOISE * level
    return (np.clip(noisy, 0, 1) * 255 + 0.5).astype(np.uint8)
