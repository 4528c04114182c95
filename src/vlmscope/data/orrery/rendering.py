"""The scene of a split, kind, index and seed: rendered pictures, or text alone, which asks the same facts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from vlmscope.core.records import generator
from vlmscope.data.orrery import digits, hands, planets, shapes
from vlmscope.data.orrery.scenes import KINDS, SPLITS, Question, Scene, text_facts

QUESTIONS_A_SCENE = 6


@cache
def _by_group() -> dict[str, list[tuple[str, str, str]]]:
    groups: dict[str, list[tuple[str, str, str]]] = {}
    for fact in text_facts():
        groups.setdefault(fact[0], []).append(fact)
    return groups


def text_scene(rng: np.random.Generator, split: str) -> Scene:
    """Six facts: half of them about planets, the rest sums, now and then a hand or a shape."""
    del split  # facts are knowledge, not pictures: the same in every split
    questions: list[Question] = []
    for group, count in (("text_planet", 3), ("text_sum", 2), ("text_other", 1)):
        pool = _by_group()[group]
        for i in rng.choice(len(pool), count, replace=False):
            questions.append(Question(*pool[int(i)]))
    assert len(questions) == QUESTIONS_A_SCENE
    return Scene("text", "", None, {}, tuple(questions))


_RENDERERS: dict[str, Callable[[np.random.Generator, str], Scene]] = {
    "planets": planets.scene,
    "digits": digits.scene,
    "shapes": shapes.scene,
    "hands": hands.scene,
    "text": text_scene,
}


def make_scene(split: str, kind: str, index: int, seed: int = 0) -> Scene:
    """Render scene `index` of a split. Equal arguments give equal bytes; splits never share a stream.

    Raises:
        ValueError: unknown split or kind.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if kind not in KINDS:
        raise ValueError(f"unknown scene kind {kind!r}: choose one of {', '.join(KINDS)}")
    rng = generator(seed, "orrery", split, kind, index)
    scene = _RENDERERS[kind](rng, split)
    return Scene(kind, f"{split}-{kind}-{index:06d}", scene.image, scene.facts, scene.questions)
