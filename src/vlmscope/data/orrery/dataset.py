"""Sets of Orrery's scenes: of one concept, in pairs that differ in one fact, with object masks, and stored as shards.

Both scenes of a pair are drawn from equal random streams with one argument changed. Renderers take the same draws
whatever the fact is, so everything else is identical to the pixel: a planet's pose, light and stars, the other digit's
glyph, the positions of the shapes, the other fingers.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from vlmscope.core.artifacts import write_json
from vlmscope.core.errors import UserError
from vlmscope.core.records import Exchange, PatchBox, derive, generator
from vlmscope.data.images import encode_png
from vlmscope.data.orrery import rendering
from vlmscope.data.orrery import scenes as world
from vlmscope.data.samples import RawSample
from vlmscope.data.shards import INDEX, damaged_shards, open_index, read_samples, shard_files, write_tar


def concept_scenes(planet: str, split: str, count: int, seed: int = 0) -> list[world.Scene]:
    """`count` scenes of a planet. Streams of different splits and planets never overlap."""
    _check_word("planet", planet, world.PLANETS)
    return [rendering.planet_scene(generator(seed, "concept", split, planet, i), planet) for i in range(count)]


def digit_scenes(digit: str, split: str, count: int, seed: int = 0, second: str | None = None) -> list[world.Scene]:
    """`count` scenes of two digits; `second` is drawn when None. Splits share no glyph, but writers."""
    for word in (digit, second or digit):
        _check_word("digit", word, world.DIGITS)
    scenes = []
    for i in range(count):
        rng = generator(seed, "digit", split, digit, second or "", i)
        right = int(rng.integers(len(world.DIGITS))) if second is None else world.DIGITS.index(second)
        scenes.append(rendering.digit_scene(rng, split, world.DIGITS.index(digit), right))
    return scenes


def colour_scenes(colour: str, split: str, count: int, seed: int = 0) -> list[world.Scene]:
    """`count` scenes of one to six equal shapes of a colour; shape and number are drawn."""
    _check_word("colour of shapes", colour, world.SHAPE_COLOURS)
    scenes = []
    for i in range(count):
        rng = generator(seed, "colour", split, colour, i)
        scenes.append(rendering.shape_scene(rng, str(rng.choice(world.SHAPES)), colour, int(rng.integers(1, 7))))
    return scenes


def _check_word(what: str, word: str, known: Sequence[str] | Mapping[str, Any]) -> None:
    if word not in known:
        raise UserError(f"no {what} {word!r} in Orrery: choose one of {', '.join(known)}")


def unrelated_scenes(
    split: str, count: int, seed: int = 0, kinds: tuple[str, ...] = world.KINDS, without: tuple[str, ...] = ()
) -> list[world.Scene]:
    """`count` scenes of every kind but planets (text alone included), to measure specificity.

    Questions that contain one of `without`, in words or answer, are left out, since text alone asks about planets too.
    """
    scenes: list[world.Scene] = []
    for kind in kinds:
        for i in range(count if kind != "planets" else 0):
            scene = rendering.make_scene(split, kind, i, seed)
            unrelated = tuple(q for q in scene.questions if not {*q.question.split(), *q.answer.split()} & {*without})
            scenes.append(replace(scene, questions=unrelated))
    return [scene for scene in scenes if scene.questions]


def harder_scenes(counts: dict[str, int], levels: tuple[float, float], seed: int = 0) -> list[world.Scene]:
    """Test scenes with their questions in the canonical words; `facts["level"]` says how hard each is.

    The facts stay as they are, so the right answers do. Hands have five or six fingers, each half of the time.

    Args:
        counts: scenes of each kind that has pictures.
        levels: the least and the highest level, between which it is uniform.
        seed: of scenes and levels.
    """
    scenes = []
    for kind, count in counts.items():
        if kind not in world.PICTURED:
            raise UserError(f"no harder scenes of {kind!r}: choose from {', '.join(world.PICTURED)}")
        for i in range(count):
            rng = generator(seed, "harder", kind, i)
            level = float(rng.uniform(*levels))
            if kind == "hands":
                scene = replace(rendering.hand_scene(rng, int(rng.choice([5, 6]))), key=f"test-hands-{i:06d}")
            else:
                scene = rendering.make_scene("test", kind, i, seed)
            assert scene.image is not None, "kinds with pictures have one"
            facts = {**scene.facts, "level": level}
            scenes.append(replace(plainly_asked(scene), image=rendering.degrade(scene.image, level, rng), facts=facts))
    return scenes


def counted_scenes(split: str, size: int, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """`size` pictures that cycle through counts 1 to 6 and through the shapes, in random colours.

    Returns:
        Pixels, and facts [size, 3]: the count, and the indices of shape and colour in their lists.
    """
    i = np.arange(size)
    tints = generator(seed, "number line", split).integers(0, len(world.SHAPE_COLOURS), size)
    facts = np.stack([i % 6 + 1, i // 6 % len(world.SHAPES), tints], 1)
    scenes = [
        rendering.shape_scene(
            generator(seed, "number line", split, number), world.SHAPES[shape], list(world.SHAPE_COLOURS)[colour], count
        )
        for number, (count, shape, colour) in enumerate(facts.tolist())
    ]
    return pictures(scenes), facts


def pictures(scenes: Iterable[world.Scene]) -> list[np.ndarray]:
    """The pictures of scenes that have one."""
    return [scene.image for scene in scenes if scene.image is not None]


def plainly_asked(scene: world.Scene) -> world.Scene:
    """The scene with its questions in canonical words, without the caption, whose answer is more than one word."""
    asked = (q for q in scene.questions if q.group != "caption")
    plain = (replace(q, question=world.QUESTIONS[q.group][0]) if q.group in world.QUESTIONS else q for q in asked)
    return replace(scene, questions=tuple(plain))


@dataclass(frozen=True)
class ScenePair:
    """Two scenes that differ in one fact and ask the same questions in canonical words; answers may differ or agree."""

    key: str
    change: str  # the fact
    values: tuple[str, str]  # its words in the original and the counterfactual
    original: world.Scene
    counterfactual: world.Scene
    captions: tuple[str, str] = ("", "")


# The words of each fact that can be changed. Saturn is left out: it is smaller than the others and its rings take draws
# from the stream, so no other planet matches it.
CHANGES: dict[str, Sequence[str]] = {
    "planet": [name for name in world.PLANETS if name != "saturn"],
    "left_planet": [name for name in world.PLANETS if name != "saturn"],  # of two
    "first_digit": world.DIGITS,
    "second_digit": world.DIGITS,
    "count": world.NUMBERS[1:7],
    "shape": world.SHAPES,
    "shape_colour": list(world.SHAPE_COLOURS),
    "object": [f"{colour} {shape}" for colour in world.SHAPE_COLOURS for shape in world.SHAPES],
    "fingers": world.NUMBERS[1:7],
}
ONE_MORE = ("count", "fingers")  # changes whose counterfactual is always the next word


def scene_pairs(
    change: str,
    split: str,
    count: int,
    seed: int = 0,
    original: str | None = None,
    counterfactual: str | None = None,
) -> list[ScenePair]:
    """`count` pairs that differ in one fact of `CHANGES`. Streams of different splits and changes never overlap.

    For `count` and `fingers` the counterfactual has one more; for `object` both shape and colour differ. `original` and
    `counterfactual` fix the fact's words in all pairs and are drawn uniformly when None.
    """
    if change not in CHANGES:
        raise UserError(f"no pairs that differ in {change!r}: choose one of {', '.join(CHANGES)}")
    choices = _choices(change, original, counterfactual)
    pairs = []
    for i in range(count):
        path = ("pair", change, split, i)
        words = choices[int(generator(seed, *path, "values").integers(len(choices)))]
        scenes = [
            _changed(change, word, split, generator(seed, *path, "scene"), generator(seed, *path, "rest"), later)
            for word, later in zip(words, (False, True), strict=True)
        ]
        first, second = map(plainly_asked, scenes)
        captions = (scenes[0].answer("caption"), scenes[1].answer("caption"))
        pairs.append(ScenePair(f"{split}-{change}-{i:06d}", change, words, first, second, captions))
    return pairs


def _choices(change: str, original: str | None, counterfactual: str | None) -> list[tuple[str, str]]:
    """The pairs of words that a change allows."""
    words = CHANGES[change]
    for word in (original, counterfactual):
        if word is not None and word not in words:
            raise UserError(f"pairs that differ in {change}: no value {word!r}; choose from {', '.join(words)}")
    if change in ONE_MORE:
        pairs = list(zip(words, words[1:], strict=False))
    else:  # objects, of several words, share none
        pairs = [(a, b) for a in words for b in words if not set(a.split()) & set(b.split())]
    pairs = [(a, b) for a, b in pairs if original in (None, a) and counterfactual in (None, b)]
    if not pairs:
        rule = "the counterfactual has one more" if change in ONE_MORE else "the two must differ, in every word"
        raise UserError(f"pairs that differ in {change}: original {original}, counterfactual {counterfactual}: {rule}")
    return pairs


def _changed(
    change: str, word: str, split: str, stream: np.random.Generator, rest: np.random.Generator, later: bool
) -> world.Scene:
    """One scene of a pair: `stream` draws it, `rest` its shared arguments; `later` is True for the counterfactual."""
    if change == "planet":
        return rendering.planet_scene(stream, word)
    if change == "left_planet":
        scene = rendering.duet_scene(stream, word, str(rest.choice(CHANGES["planet"])))
        # Which planet "present" asks for hangs on both.
        return replace(scene, questions=tuple(q for q in scene.questions if q.group != "present"))
    if change == "first_digit":
        return rendering.digit_scene(stream, split, world.NUMBERS.index(word), int(rest.integers(10)))
    if change == "second_digit":
        return rendering.digit_scene(stream, split, int(rest.integers(10)), world.NUMBERS.index(word))
    if change == "fingers":
        # One more finger moves the middle of the arc by half a step; tilting by as much keeps the other fingers in
        # place. Both tilts lie within the range of the training scenes.
        tilt = rest.uniform(-rendering.TILT, rendering.TILT - rendering.SPREAD / 2) + later * rendering.SPREAD / 2
        return rendering.hand_scene(stream, world.NUMBERS.index(word), tilt)
    # Count, shape and colour that the word does not fix are drawn from `rest`, in this order.
    count = world.NUMBERS.index(word) if change == "count" else int(rest.integers(1, 7))
    shape = next((shape for shape in world.SHAPES if shape in word.split()), None) or str(rest.choice(world.SHAPES))
    colours = list(world.SHAPE_COLOURS)
    colour = next((c for c in colours if c in word.split()), None) or str(rest.choice(colours))
    return rendering.shape_scene(stream, shape, colour, count)


INK = 70  # grey levels above the darkest pixel
SKIN = 25  # grey levels of any channel from the ground's colour
COVERED = 0.25  # share of a cell from which on it counts as part of the object


def object_mask(scene: world.Scene, group: str = "") -> np.ndarray:
    """Pixels `[64, 64]` bool of the object asked about; `group` "first" or "second" selects one of two digits."""
    assert scene.image is not None, "a scene without a picture"
    if scene.kind == "digits":
        bright = scene.image.max(-1) > int(scene.image.max(-1).min()) + INK
        left = np.arange(world.SIDE) < world.SIDE // 2
        half = {"first": left, "second": ~left}.get(group, np.ones(world.SIDE, bool))
        return bright & half[None]
    if scene.kind == "hands":  # the ground has one colour and no hand reaches the corner
        return np.abs(scene.image.astype(int) - scene.image[0, 0].astype(int)).max(-1) > SKIN
    y, x = np.mgrid[: world.SIDE, : world.SIDE] / world.SIDE + 0.5 / world.SIDE
    mask = np.zeros((world.SIDE, world.SIDE), bool)
    boxes = scene.facts["box"] if scene.kind == "planets" else scene.facts["boxes"]
    for left, top, right, bottom in np.reshape(np.asarray(boxes, float), (-1, 4)):
        if scene.kind == "planets":
            radius = (right - left) / 2
            mask |= (x - (left + right) / 2) ** 2 + (y - (top + bottom) / 2) ** 2 < radius**2
        else:
            mask |= (x > left) & (x < right) & (y > top) & (y < bottom)
    return mask


def covered(mask: np.ndarray, boxes: Sequence[PatchBox]) -> np.ndarray:
    """`[n]` bool, boxes whose pixels `mask [H, W]` covers to at least `COVERED`."""
    corners = [box.pixels(mask.shape[1], mask.shape[0]) for box in boxes]
    return np.array([mask[top:bottom, left:right].mean() for left, top, right, bottom in corners]) >= COVERED


def painted_mask(image: np.ndarray, contrast: int = SKIN) -> np.ndarray:
    """Pixels `[H, W]` bool that differ from the ground, the median colour of `image [H, W, 3]`.

    For pictures with a ground of one colour, such as those of shapes; exact where `object_mask` has only boxes.
    """
    ground = np.median(image.reshape(-1, image.shape[-1]), axis=0)
    return np.abs(image - ground).max(-1) > contrast


VERSION = 1  # raise when a renderer or template changes, so that old shards are refused
LICENCE = (
    "pictures: Apache-2.0, from texture maps credited in assets/planet_textures/CREDITS.md and scikit-learn digits"
)


def build(folder: Path, counts: dict[str, dict[str, int]], seed: int = 0, shard_size: int = 1000) -> dict[str, float]:
    """Write the shards of `counts[split][kind]` scenes that `folder` lacks, and rewrite damaged ones.

    The scenes of a shard depend only on its number, so an interrupted build resumes. Returns `data/shards`,
    `data/shards_written` by this call, `data/scenes` and `data/bytes`.
    """
    meta = {"dataset": "orrery", "version": VERSION, "seed": seed, "counts": counts, "licence": LICENCE}
    index = open_index(folder, meta)
    damaged = damaged_shards(folder, index["shards"])
    plans = [
        (f"{split}-{kind}-{number:04d}.tar", split, kind, range(start, min(start + shard_size, count)))
        for split, kinds in counts.items()
        for kind, count in kinds.items()
        for number, start in enumerate(range(0, count, shard_size))
    ]
    scenes, written = sum(len(rows) for *_, rows in plans), 0
    with tqdm(total=scenes, unit="scene", desc="scenes") as bar:
        for name, split, kind, rows in plans:
            if name not in index["shards"] or name in damaged:
                samples = (to_sample(rendering.make_scene(split, kind, row, seed)) for row in rows)
                index["shards"][name] = {"split": split, "kind": kind} | write_tar(folder / name, samples)
                write_json(folder / INDEX, index)
                written += 1
            bar.update(len(rows))
    size = sum(file.stat().st_size for file in folder.glob("*.tar"))
    figures = {"shards": len(plans), "shards_written": written, "scenes": scenes, "bytes": size}
    return {f"data/{name}": float(value) for name, value in figures.items()}


def to_sample(scene: world.Scene) -> dict[str, Any]:
    """A WebDataset sample: `<key>.json` with kind, facts and questions, and `<key>.png` unless the scene is text."""
    questions = [[q.group, q.question, q.answer] for q in scene.questions]
    body = {"kind": scene.kind, "facts": scene.facts, "questions": questions}
    sample: dict[str, Any] = {"__key__": scene.key, "json": json.dumps(body).encode()}
    if scene.image is not None:
        sample["png"] = encode_png(scene.image)
    return sample


def from_sample(sample: dict[str, Any]) -> world.Scene:
    """The inverse of `to_sample`."""
    body = json.loads(sample["json"])
    image = None
    if "png" in sample:
        with Image.open(io.BytesIO(sample["png"])) as picture:
            image = np.asarray(picture.convert("RGB"))
    questions = tuple(world.Question(*q) for q in body["questions"])
    return world.Scene(body["kind"], sample["__key__"], image, body["facts"], questions)


def row_of_shard(sample: dict[str, Any]) -> RawSample:
    """A stored scene as its picture, if any, with one of its questions, chosen by the scene's key."""
    body, key = json.loads(sample["json"]), sample["__key__"]
    _, question, answer = body["questions"][derive(0, "question", key) % len(body["questions"])]
    images = (sample["png"],) if "png" in sample else ()
    return RawSample(images, (Exchange(question, answer),), "", key, _plain_facts(body["kind"], body["facts"]))


def row_of_scene(scene: world.Scene, stream: str) -> RawSample:
    """A scene as plain text, or as its picture with the caption, with one question, or with all of them.

    "questions" chooses one by the scene's key, since Orrery was trained on single turns; "dialogues" asks all except
    the caption.
    """
    facts = _plain_facts(scene.kind, scene.facts)
    if scene.image is None:
        text = " ".join(f"{q.question} {q.answer}" for q in scene.questions)
        return RawSample(text=text, origin=scene.key, facts=facts)
    questions = [q for q in scene.questions if (q.group == "caption") == (stream == "captions")]
    if stream == "questions":
        questions = [questions[derive(0, "question", scene.key) % len(questions)]]
    exchanges = tuple(Exchange(q.question, q.answer) for q in questions)
    return RawSample((encode_png(scene.image),), exchanges, origin=scene.key, facts=facts)


def _plain_facts(kind: str, facts: Mapping[str, Any]) -> dict[str, str | int]:
    """Kind and facts of a scene that are words or whole numbers, coordinates left out; colour and shape of each thing.

    Labels name a thing by these two, so that what they say of one shape in one place holds of others too.
    """
    plain: dict[str, str | int] = {"scene": kind}
    for name, value in facts.items():
        if name in THINGS:
            plain |= dict(zip((f"{THINGS[name]}_colour", f"{THINGS[name]}_shape"), str(value).split(), strict=False))
        elif isinstance(value, str | int):
            plain[name] = value
    return plain


# Facts of `object_scene`, by rows
THINGS = {"thing_0": "upper_left", "thing_1": "upper_right", "thing_2": "lower_left", "thing_3": "lower_right"}
DEFAULT_SHARDS = ("outputs/data/orrery", "outputs/data/orrery2")  # as in conf/data/


def scene_shards(path: str | None) -> Path | None:
    """The folder of Orrery's shards; None, said in a line, where it is the default one and does not exist.

    The scenes of `task=build_data` are then rendered when they are drawn: the same scenes, without a wait.
    """
    if path is not None and (path not in DEFAULT_SHARDS or Path(path).exists()):
        return Path(path)
    _say_rendered()
    return None


@cache
def _say_rendered() -> None:  # once a process: a sweep has many jobs
    print("Orrery's scenes are rendered when they are drawn (task=build_data stores them for later runs)", flush=True)


@lru_cache(maxsize=100_000)  # compressed, about 3 kB each
def rendered_sample(split: str, kind: str, index: int) -> dict[str, Any]:
    """The sample that `task=build_data` writes of a scene by default."""
    return to_sample(rendering.make_scene(split, kind, index))


class _Rendered(Sequence[dict[str, Any]]):
    """The samples of a split and kind that `task=build_data` writes by default, rendered when they are read."""

    def __init__(self, split: str, kind: str) -> None:
        self.split, self.kind = split, kind

    def __len__(self) -> int:
        return world.COUNTS[self.split][self.kind]

    def __getitem__(self, index):  # pyright: ignore[reportIncompatibleMethodOverride]  # int or slice
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        return rendered_sample(self.split, self.kind, range(len(self))[index])


class ScenePool:
    """All scenes of a split, drawn by step number, so batches do not change after a resume.

    Those of the shards in `folder` are in memory (compressed); without a folder they are rendered when they are drawn.
    """

    def __init__(self, folder: Path | None, split: str, kinds: tuple[str, ...] = world.KINDS) -> None:
        self.samples: dict[str, Sequence[dict[str, Any]]] = {
            kind: _Rendered(split, kind) if folder is None else list(read_samples(shard_files(folder, split, kind)))
            for kind in kinds
        }

    def batch(self, seed: int, step: int, counts: dict[str, int]) -> list[world.Scene]:
        """Draw `counts[kind]` scenes of each kind for one step, without repeats within the batch."""
        scenes: list[world.Scene] = []
        for kind, count in counts.items():
            pool = self.samples[kind]
            if count > len(pool):
                raise UserError(
                    f"a batch asks for {count} scenes of {kind}, the data have {len(pool)}: build more data"
                )
            rng = generator(seed, "batch", step, kind)
            scenes += [from_sample(pool[int(i)]) for i in rng.choice(len(pool), count, replace=False)]
        return scenes

    def scenes(self, kind: str, limit: int | None = None) -> list[world.Scene]:
        """The first `limit` scenes of a kind, in order."""
        return [from_sample(sample) for sample in self.samples[kind][:limit]]
