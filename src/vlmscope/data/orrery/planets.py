"""Planets: spheres ray-cast from real texture maps, with random pose, size, light and stars.

Orthographic rays along -z hit a sphere of radius r at centre (cx, cy). The hit point, rotated by a random rotation,
gives longitude and latitude, hence the texel (bilinear). Light is Lambertian with an ambient floor. Saturn wears its
rings.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

from vlmscope.core.errors import UserError
from vlmscope.data.orrery.scenes import CAPTION_PROMPTS, PLANET_QUESTIONS, PLANETS, SIDE, Question, Scene, pick

SUPER = 2  # samples a pixel and axis, averaged
RING = (1.35, 2.05)  # inner and outer radius of Saturn's rings, in planet radii


def texture_folder() -> Path:
    """Folder of the equirectangular maps: `assets/planet_textures` of the checkout."""
    return Path(__file__).resolve().parents[4] / "assets" / "planet_textures"


@cache
def texture(name: str) -> np.ndarray:
    """Return the map of a planet as float32 [128, 256, 3] in 0..1 (halved, which is antialiasing enough at 64
    pixels).
    """
    path = texture_folder() / f"{name}.jpg"
    if not path.is_file():
        raise UserError(f"planet texture {path} is missing: restore assets/planet_textures from the repository")
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB").resize((256, 128), Image.Resampling.BOX), np.float32) / 255.0


def scene(rng: np.random.Generator, split: str) -> Scene:
    """One planet, uniformly chosen, with its name, colour and cover asked for."""
    del split  # planets have no sources to hold out: a new seed is a new pose
    name = str(rng.choice(list(PLANETS)))
    return planet_scene(rng, name)


def planet_scene(rng: np.random.Generator, name: str) -> Scene:
    """A scene of the named planet."""
    planet = PLANETS[name]
    image, facts = render(rng, name)
    answers = {"name": planet.name, "colour": planet.colour, "cover": planet.cover}
    questions = [Question(g, pick(rng, PLANET_QUESTIONS[g]), a) for g, a in answers.items()]
    caption = f"{planet.name} , a {planet.colour} planet covered with {planet.cover} ."
    questions.append(Question("caption", pick(rng, CAPTION_PROMPTS), caption))
    return Scene("planets", "", image, {"planet": name, **answers, **facts}, tuple(questions))


def render(rng: np.random.Generator, name: str) -> tuple[np.ndarray, dict[str, list[float]]]:
    """Ray-cast one planet. Returns uint8 [64, 64, 3] and its bounding box as picture fractions."""
    radius = rng.uniform(16, 20 if name == "saturn" else 29)
    slack = max(SIDE / 2 - radius - 1, 1.0)
    cx, cy = SIDE / 2 + rng.uniform(-slack, slack, 2)
    rotation = Rotation.random(random_state=rng).as_matrix()  # pyright: ignore[reportCallIssue]
    light = np.array([rng.uniform(-0.7, 0.7), rng.uniform(-0.7, 0.7), 1.0])
    light /= np.linalg.norm(light)
    grid = (np.arange(SIDE * SUPER) + 0.5) / SUPER
    x, y = np.meshgrid((grid - cx) / radius, (grid - cy) / radius)
    inside = x**2 + y**2 < 1
    z = np.sqrt(np.clip(1 - x**2 - y**2, 0, None))
    normal = np.stack([x[inside], y[inside], z[inside]], -1)
    shade = np.clip(normal @ light, 0, None) * rng.uniform(0.75, 1.0) + rng.uniform(0.1, 0.25)
    colour = _sample(texture(name), normal @ rotation.T) * np.clip(shade, 0, 1.15)[..., None]
    if name == "earth":
        colour = colour * 1.25 + 0.02  # the map is darker than the others: NASA's has no atmosphere
    canvas = _sky(rng)
    canvas[inside] = colour
    if name == "saturn":
        _rings(rng, canvas, x, y, z, inside)
    tint = rng.uniform(0.98, 1.02, 3)
    picture = np.clip(canvas * tint, 0, 1).reshape(SIDE, SUPER, SIDE, SUPER, 3).mean((1, 3))
    box = [float(v / SIDE) for v in (cx - radius, cy - radius, cx + radius, cy + radius)]
    return (picture * 255 + 0.5).astype(np.uint8), {"box": [min(max(v, 0.0), 1.0) for v in box]}


def _sample(tex: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Bilinear lookup of unit vectors [.., 3] in an equirectangular map; longitude wraps."""
    height, width, _ = tex.shape
    u = (np.arctan2(points[..., 0], points[..., 2]) / (2 * np.pi) + 0.5) * width - 0.5
    v = np.clip((np.arcsin(np.clip(points[..., 1], -1, 1)) / np.pi + 0.5) * height - 0.5, 0, height - 1.001)
    u0, v0 = np.floor(u).astype(int), np.floor(v).astype(int)
    fu, fv = (u - u0)[..., None], (v - v0)[..., None]
    left, right = u0 % width, (u0 + 1) % width
    below = np.minimum(v0 + 1, height - 1)
    top = tex[v0, left] * (1 - fu) + tex[v0, right] * fu
    bottom = tex[below, left] * (1 - fu) + tex[below, right] * fu
    return top * (1 - fv) + bottom * fv


def _sky(rng: np.random.Generator) -> np.ndarray:
    """A dark sky with up to 40 stars, float [2 * 64, 2 * 64, 3]."""
    side = SIDE * SUPER
    sky = np.full((side, side, 3), rng.uniform(0.0, 0.06))
    count = int(rng.integers(0, 40))
    rows, columns = rng.integers(0, side - 1, (2, count))
    brightness = rng.uniform(0.3, 1.0, (count, 1))
    for dr in (0, 1):
        for dc in (0, 1):
            sky[rows + dr, columns + dc] = brightness
    return sky


def _rings(
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
