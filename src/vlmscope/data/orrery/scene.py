"""The record of one scene, and the one function that makes it from (split, kind, index, seed)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from vlmscope.core.seeds import generator

SIDE = 64
SPLITS = ("train", "val", "test")
KINDS = ("planets", "digits", "shapes", "hands", "text")


@dataclass(frozen=True)
class Question:
    """One question about a scene. `group` names the fact asked for ('name', 'sum', 'text_sum', 'caption', ...)."""

    group: str
    question: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """A picture (uint8 [64, 64, 3], None for text alone), the facts that made it, and its questions."""

    kind: str
    key: str
    image: np.ndarray | None
    facts: dict[str, str | int | float | list[float]]
    questions: tuple[Question, ...] = field(default=())


Renderer = Callable[[np.random.Generator, str], Scene]


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
    scene = _renderer(kind)(rng, split)
    return Scene(kind, f"{split}-{kind}-{index:06d}", scene.image, scene.facts, scene.questions)


def pick(rng: np.random.Generator, templates: tuple[str, ...]) -> str:
    """Choose a wording: the canonical first one half of the time."""
    if len(templates) == 1 or rng.random() < 0.5:
        return templates[0]
    return templates[int(rng.integers(1, len(templates)))]


def _renderer(kind: str) -> Renderer:
    from vlmscope.data.orrery import digits, hands, planets, shapes, text

    return {
        "planets": planets.scene,
        "digits": digits.scene,
        "shapes": shapes.scene,
        "hands": hands.scene,
        "text": text.scene,
    }[kind]
