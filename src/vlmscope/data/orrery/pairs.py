"""Pairs of scenes that differ in one fact, so that an effect can be measured within a pair.

Both scenes of a pair are drawn from equal random streams with one argument changed. Renderers take the same draws in
the same order whatever the fact is, so everything else comes out alike, to the pixel: a planet's pose, light and stars,
the other digit's glyph, the places of the shapes, the other fingers. `tests/unit/data/test_pairs.py` asserts it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vlmscope.core.errors import UserError
from vlmscope.core.seeds import generator
from vlmscope.data.orrery.digits import digit_scene
from vlmscope.data.orrery.facts import (
    DIGIT_QUESTIONS,
    HAND_QUESTIONS,
    NUMBERS,
    PLANET_QUESTIONS,
    PLANETS,
    SHAPE_COLOURS,
    SHAPE_QUESTIONS,
    SHAPES,
)
from vlmscope.data.orrery.hands import SPREAD, TILT, hand_scene
from vlmscope.data.orrery.planets import planet_scene
from vlmscope.data.orrery.scene import Question, Scene
from vlmscope.data.orrery.shapes import shape_scene

_WORDINGS = PLANET_QUESTIONS | DIGIT_QUESTIONS | SHAPE_QUESTIONS | HAND_QUESTIONS


@dataclass(frozen=True)
class ScenePair:
    """Two scenes and what differs: `change` is the fact, `values` its words in the original and the counterfactual.

    Both scenes ask the same questions in the same (canonical) words; the answers may differ or agree. `captions` are
    the right ones.
    """

    key: str
    change: str
    values: tuple[str, str]
    original: Scene
    counterfactual: Scene
    captions: tuple[str, str] = ("", "")

    @property
    def differs(self) -> np.ndarray:
        """[64, 64] bool: the pixels that are not equal."""
        first, second = self.original.image, self.counterfactual.image
        assert first is not None and second is not None, "scenes of a pair have pictures"
        return (first != second).any(-1)


@dataclass(frozen=True)
class _Change:
    """A fact that can be changed: its words, whether the counterfactual is always the next word, and the renderer.

    `draw(stream, split, word, rest, later)` makes one scene; `rest` draws what both scenes share and the stream does
    not, `later` tells the counterfactual. `apart` says which two words may make a pair.
    """

    words: Sequence[str]
    draw: Callable[[np.random.Generator, str, str, np.random.Generator, bool], Scene]
    next_only: bool = False
    apart: Callable[[str, str], bool] = operator.ne


def _planet(stream: np.random.Generator, _split: str, word: str, _rest: np.random.Generator, _later: bool) -> Scene:
    return planet_scene(stream, word)


def _first(stream: np.random.Generator, split: str, word: str, rest: np.random.Generator, _later: bool) -> Scene:
    return digit_scene(stream, split, NUMBERS.index(word), int(rest.integers(10)))


def _second(stream: np.random.Generator, split: str, word: str, rest: np.random.Generator, _later: bool) -> Scene:
    return digit_scene(stream, split, int(rest.integers(10)), NUMBERS.index(word))


def _count(stream: np.random.Generator, _split: str, word: str, rest: np.random.Generator, _later: bool) -> Scene:
    shape, colour = str(rest.choice(SHAPES)), str(rest.choice(list(SHAPE_COLOURS)))
    return shape_scene(stream, shape, colour, NUMBERS.index(word))


def _shape(stream: np.random.Generator, _split: str, word: str, rest: np.random.Generator, _later: bool) -> Scene:
    count, colour = int(rest.integers(1, 7)), str(rest.choice(list(SHAPE_COLOURS)))
    return shape_scene(stream, word, colour, count)


def _colour(stream: np.random.Generator, _split: str, word: str, rest: np.random.Generator, _later: bool) -> Scene:
    count, shape = int(rest.integers(1, 7)), str(rest.choice(SHAPES))
    return shape_scene(stream, shape, word, count)


def _object(stream: np.random.Generator, _split: str, word: str, rest: np.random.Generator, _later: bool) -> Scene:
    colour, shape = word.split()
    return shape_scene(stream, shape, colour, int(rest.integers(1, 7)))


def _nothing_alike(first: str, second: str) -> bool:
    """Whether two things of several words, such as `red circle` and `blue star`, share none."""
    return all(a != b for a, b in zip(first.split(), second.split(), strict=True))


def _fingers(stream: np.random.Generator, _split: str, word: str, rest: np.random.Generator, later: bool) -> Scene:
    # One finger more turns the arc's middle by half a step; turned along, the other fingers stay where they were. Both
    # tilts are ones that training has seen.
    tilt = rest.uniform(-TILT, TILT - SPREAD / 2) + (SPREAD / 2 if later else 0.0)
    return hand_scene(stream, NUMBERS.index(word), tilt)


# Saturn is left out: it is smaller than the others and its rings draw from the stream, so no other planet matches it.
CHANGES: dict[str, _Change] = {
    "planet": _Change([name for name in PLANETS if name != "saturn"], _planet),
    "first_digit": _Change(NUMBERS[:10], _first),
    "second_digit": _Change(NUMBERS[:10], _second),
    "count": _Change(NUMBERS[1:7], _count, next_only=True),
    "shape": _Change(SHAPES, _shape),
    "shape_colour": _Change(list(SHAPE_COLOURS), _colour),
    "object": _Change([f"{c} {s}" for c in SHAPE_COLOURS for s in SHAPES], _object, apart=_nothing_alike),
    "fingers": _Change(NUMBERS[1:7], _fingers, next_only=True),
}


def scene_pairs(
    change: str,
    split: str,
    count: int,
    seed: int = 0,
    original: str | None = None,
    counterfactual: str | None = None,
) -> list[ScenePair]:
    """`count` pairs that differ in one fact. Streams of different splits and changes never overlap.

    Args:
        change: one of `CHANGES`; for `count` and `fingers` the counterfactual has one more, for `object` shape and
            colour are both others.
        split: 'train', 'val' or 'test'; digits of different splits are different handwriting.
        count: how many.
        seed: of all draws.
        original: the changed fact's word in every original; drawn uniformly when None.
        counterfactual: the same in every counterfactual.

    Raises:
        UserError: no such change, or no two words that fit.
    """
    if change not in CHANGES:
        raise UserError(f"no pairs that differ in {change!r}: choose one of {', '.join(CHANGES)}")
    kind = CHANGES[change]
    choices = _choices(change, original, counterfactual)
    pairs = []
    for i in range(count):
        path = ("pair", change, split, i)
        first, second = choices[int(generator(seed, *path, "values").integers(len(choices)))]
        scenes = [
            kind.draw(generator(seed, *path, "scene"), split, word, generator(seed, *path, "rest"), later)
            for word, later in ((first, False), (second, True))
        ]
        asked = [plainly_asked(scene) for scene in scenes]
        captions = (_caption(scenes[0]), _caption(scenes[1]))
        name = f"{split}-{change}-{i:06d}"
        pairs.append(ScenePair(name, change, (first, second), asked[0], asked[1], captions))
    return pairs


def _choices(change: str, original: str | None, counterfactual: str | None) -> list[tuple[str, str]]:
    """The pairs of words that a change may have."""
    kind = CHANGES[change]
    words = list(kind.words)
    for word in (original, counterfactual):
        if word is not None and word not in words:
            raise UserError(f"pairs that differ in {change}: no value {word!r}; choose from {', '.join(words)}")
    ordered = zip(words, words[1:], strict=False) if kind.next_only else ((a, b) for a in words for b in words)
    found = [(a, b) for a, b in ordered if kind.apart(a, b) and original in (None, a) and counterfactual in (None, b)]
    if not found:
        more = "the counterfactual has one more" if kind.next_only else "the two must differ, in every word"
        raise UserError(f"pairs that differ in {change}: original {original}, counterfactual {counterfactual}: {more}")
    return found


def _caption(scene: Scene) -> str:
    """What the scene is rightly described as."""
    return next((q.answer for q in scene.questions if q.group == "caption"), "")


def plainly_asked(scene: Scene) -> Scene:
    """The scene with its questions in the canonical words; without its caption, which is more than one word."""
    asked = tuple(Question(q.group, _WORDINGS[q.group][0], q.answer) for q in scene.questions if q.group in _WORDINGS)
    return replace(scene, questions=asked)
