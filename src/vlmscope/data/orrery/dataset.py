"""Orrery's scenes as data: sets of concepts, shards, and counterfactual pairs.

Pictures of one concept (a planet, a digit, a colour), for finding circuits and for testing them on unseen ones.

Orrery's scenes as shards, and the shards as an in-memory pool that training draws from by step number.

Pairs of scenes that differ in one fact, so that an effect can be measured within a pair.

Both scenes of a pair are drawn from equal random streams with one argument changed. Renderers take the same draws in
the same order whatever the fact is, so everything else comes out alike, to the pixel: a planet's pose, light and stars,
the other digit's glyph, the places of the shapes, the other fingers. `tests/unit/data/test_pairs.py` asserts it.
"""

from __future__ import annotations

import io
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmscope.core.errors import UserError
from vlmscope.core.records import Exchange, derive, generator
from vlmscope.data.orrery.digits import digit_scene
from vlmscope.data.orrery.hands import SPREAD, TILT, hand_scene
from vlmscope.data.orrery.planets import planet_scene
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.data.orrery.scenes import (
    DIGIT_QUESTIONS,
    HAND_QUESTIONS,
    KINDS,
    NUMBERS,
    PLANET_QUESTIONS,
    PLANETS,
    SHAPE_COLOURS,
    SHAPE_QUESTIONS,
    SHAPES,
    Question,
    Scene,
)
from vlmscope.data.orrery.shapes import shape_scene
from vlmscope.data.samples import RawSample
from vlmscope.data.shards import ShardPlan, encode_png, plan_shards, read_samples, shard_files, write_shards

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


VERSION = 1  # raise when a renderer or template changes: old shards are then refused
LICENCE = (
    "pictures: Apache-2.0, from texture maps credited in assets/planet_textures/CREDITS.md and scikit-learn digits"
)


@dataclass
class OrreryDataConfig:
    """How many scenes of each kind to render, and where to."""

    folder: str = "outputs/data/orrery"
    seed: int = 0
    shard_size: int = 1000
    train: dict[str, int] = field(
        default_factory=lambda: {"planets": 10000, "digits": 28000, "shapes": 10000, "hands": 5000, "text": 2000}
    )
    val: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 400))
    test: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 1000))


def build(config: OrreryDataConfig, on_shard: Any = lambda _plan: None) -> int:
    """Write the shards that are still missing; return how many were written."""
    counts = _counts(config)
    meta = {"dataset": "orrery", "version": VERSION, "seed": config.seed, "counts": counts, "licence": LICENCE}

    def sample(split: str, kind: str, index: int) -> dict[str, Any]:
        return to_sample(make_scene(split, kind, index, config.seed))

    return write_shards(Path(config.folder), plans_of(config), sample, meta, on_shard)


def plans_of(config: OrreryDataConfig) -> list[ShardPlan]:
    """All shards of the dataset, written or not."""
    return plan_shards(_counts(config), config.shard_size)


def _counts(config: OrreryDataConfig) -> dict[str, dict[str, int]]:
    return {"train": config.train, "val": config.val, "test": config.test}


def to_sample(scene: Scene) -> dict[str, Any]:
    """A WebDataset sample: `<key>.json` with kind, facts and questions, and `<key>.png` unless the scene is text."""
    body = {
        "kind": scene.kind,
        "facts": scene.facts,
        "questions": [[q.group, q.question, q.answer] for q in scene.questions],
    }
    sample: dict[str, Any] = {"__key__": scene.key, "json": json.dumps(body).encode()}
    if scene.image is not None:
        sample["png"] = encode_png(scene.image)
    return sample


def from_sample(sample: dict[str, Any]) -> Scene:
    """The inverse of `to_sample`."""
    body = json.loads(sample["json"])
    image = None
    if "png" in sample:
        with Image.open(io.BytesIO(sample["png"])) as picture:
            image = np.asarray(picture.convert("RGB"))
    questions = tuple(Question(*q) for q in body["questions"])
    return Scene(body["kind"], sample["__key__"], image, body["facts"], questions)


def scene_row(sample: dict[str, Any]) -> RawSample:
    """A scene's sample as its picture, if it has one, with one of its questions, picked by the scene's key."""
    body, key = json.loads(sample["json"]), sample["__key__"]
    _, question, answer = body["questions"][derive(0, "question", key) % len(body["questions"])]
    pictures = (sample["png"],) if "png" in sample else ()
    return RawSample(pictures, (Exchange(question, answer),), "", key, plain_facts(body["kind"], body["facts"]))


def plain_facts(kind: str, facts: Mapping[str, Any]) -> dict[str, str | int]:
    """What a scene shows, in words and whole numbers: its kind and its facts, places left out."""
    return {"scene": kind} | {name: value for name, value in facts.items() if isinstance(value, str | int)}


class ScenePool:
    """All scenes of a split in memory (compressed), drawn by step number: batch `n` is the same after any resume."""

    def __init__(self, folder: Path, split: str, kinds: tuple[str, ...] = KINDS) -> None:
        self.samples = {kind: list(read_samples(shard_files(folder, split, kind))) for kind in kinds}

    def batch(self, seed: int, step: int, counts: dict[str, int]) -> list[Scene]:
        """Draw `counts[kind]` scenes of each kind for one step, without repeats within the batch.

        Raises:
            UserError: a batch asks for more scenes of a kind than there are.
        """
        scenes: list[Scene] = []
        for kind, count in counts.items():
            pool = self.samples[kind]
            if count > len(pool):
                raise UserError(
                    f"a batch asks for {count} scenes of {kind}, the data have {len(pool)}: build more data"
                )
            rng = generator(seed, "batch", step, kind)
            scenes += [from_sample(pool[int(i)]) for i in rng.choice(len(pool), count, replace=False)]
        return scenes

    def scenes(self, kind: str, limit: int | None = None) -> list[Scene]:
        """The first `limit` scenes of a kind, in order."""
        return [from_sample(s) for s in self.samples[kind][:limit]]


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
