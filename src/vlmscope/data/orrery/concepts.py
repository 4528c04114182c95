"""Pictures of one concept (a planet, a digit, a colour), for finding circuits and for testing them on unseen ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vlmscope.core.errors import UserError
from vlmscope.core.seeds import generator
from vlmscope.data.orrery.digits import digit_scene
from vlmscope.data.orrery.facts import NUMBERS, PLANETS, SHAPE_COLOURS, SHAPES
from vlmscope.data.orrery.planets import planet_scene
from vlmscope.data.orrery.scene import KINDS, Scene, make_scene
from vlmscope.data.orrery.shapes import shape_scene

DIGITS = NUMBERS[:10]


def concept_scenes(planet: str, split: str, count: int, seed: int = 0) -> list[Scene]:
    """`count` scenes of a planet. Streams of different splits and planets never overlap.

    Raises:
        UserError: no such planet.
    """
    if planet not in PLANETS:
        raise UserError(f"no planet {planet!r} in Orrery: choose one of {', '.join(PLANETS)}")
    return [planet_scene(generator(seed, "concept", split, planet, i), planet) for i in range(count)]


def digit_scenes(digit: str, split: str, count: int, seed: int = 0, second: str | None = None) -> list[Scene]:
    """`count` scenes of two digits, the first one given; the second is drawn when None. Splits share no handwriting.

    Raises:
        UserError: no such digit.
    """
    for word in (digit, second):
        if word is not None and word not in DIGITS:
            raise UserError(f"no digit {word!r} in Orrery: choose one of {', '.join(DIGITS)}")
    found = []
    for i in range(count):
        rng = generator(seed, "digit", split, digit, second or "", i)
        other = int(rng.integers(len(DIGITS))) if second is None else DIGITS.index(second)
        found.append(digit_scene(rng, split, DIGITS.index(digit), other))
    return found


def colour_scenes(colour: str, split: str, count: int, seed: int = 0) -> list[Scene]:
    """`count` scenes of one to six equal shapes of a colour; shape and number are drawn.

    Raises:
        UserError: shapes do not come in that colour.
    """
    if colour not in SHAPE_COLOURS:
        raise UserError(f"no shapes are {colour} in Orrery: choose one of {', '.join(SHAPE_COLOURS)}")
    found = []
    for i in range(count):
        rng = generator(seed, "colour", split, colour, i)
        found.append(shape_scene(rng, str(rng.choice(SHAPES)), colour, int(rng.integers(1, 7))))
    return found


def unrelated_scenes(
    split: str, count: int, seed: int = 0, kinds: tuple[str, ...] = KINDS, without: tuple[str, ...] = ()
) -> list[Scene]:
    """`count` scenes of every kind but planets (text alone included), for specificity.

    Questions that name one of `without`, in their words or their answer, are left out: text alone asks about planets
    too.
    """
    found: list[Scene] = []
    for kind in kinds:
        for i in range(count if kind != "planets" else 0):
            scene = make_scene(split, kind, i, seed)
            asked = tuple(q for q in scene.questions if not {*q.question.split(), *q.answer.split()} & {*without})
            found.append(replace(scene, questions=asked))
    return [scene for scene in found if scene.questions]


def pictures(scenes: list[Scene]) -> list[np.ndarray]:
    """The pictures of scenes that have one."""
    return [scene.image for scene in scenes if scene.image is not None]
