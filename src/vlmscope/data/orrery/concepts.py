"""Pictures of one concept (a planet), for finding circuits and for testing them on pictures that were not used."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vlmscope.core.errors import UserError
from vlmscope.core.seeds import generator
from vlmscope.data.orrery.facts import PLANETS
from vlmscope.data.orrery.planets import planet_scene
from vlmscope.data.orrery.scene import KINDS, Scene, make_scene


def concept_scenes(planet: str, split: str, count: int, seed: int = 0) -> list[Scene]:
    """`count` scenes of a planet. Streams of different splits and planets never overlap.

    Raises:
        UserError: no such planet.
    """
    if planet not in PLANETS:
        raise UserError(f"no planet {planet!r} in Orrery: choose one of {', '.join(PLANETS)}")
    return [planet_scene(generator(seed, "concept", split, planet, i), planet) for i in range(count)]


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
