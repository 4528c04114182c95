"""Pictures of one concept (a planet), for finding circuits and for testing them on pictures that were not used."""

from __future__ import annotations

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


def unrelated_scenes(split: str, count: int, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> list[Scene]:
    """`count` scenes of every kind but planets (text alone included), for specificity."""
    return [make_scene(split, kind, i, seed) for kind in kinds if kind != "planets" for i in range(count)]


def pictures(scenes: list[Scene]) -> list[np.ndarray]:
    """The pictures of scenes that have one."""
    return [scene.image for scene in scenes if scene.image is not None]
