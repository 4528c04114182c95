"""Counterfactual pairs: two inputs that differ in one fact, with the answer to each.

They come from Orrery's renderers or from a JSONL file of one's own, an object a line:

    {"prompt": "what is this ?", "image": "cat.png", "answer": "cat",
     "counterfactual": {"image": "dog.png", "answer": "dog"}, "question": "animal", "id": "a"}

What the counterfactual does not give is that of the original. `image` is a path relative to the file's folder, or a
list of them; none for text alone. `question` groups lines that ask the same thing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from vlmscope.core.artifacts import parse_json, text_lines
from vlmscope.core.errors import UserError
from vlmscope.data.config import PairsConfig
from vlmscope.data.images import PictureFiles, check_image
from vlmscope.data.orrery.dataset import scene_pairs
from vlmscope.data.orrery.scenes import Scene

_SIDE_KEYS = ("prompt", "image", "answer")
_KEYS = (*_SIDE_KEYS, "counterfactual", "question", "id")
OWN_QUESTION = "answer"  # the group of lines that name none


@dataclass(frozen=True)
class Side:
    """One input of a pair: what is asked, the pictures, and the answer (one word)."""

    prompt: str
    images: Sequence[Image.Image]
    answer: str


@dataclass(frozen=True)
class Pair:
    """Two inputs that differ in one fact.

    `question` is the group that it is counted with; `id` names the scene, so that the questions about one scene share
    it; `change` says what differs.
    """

    id: str
    question: str
    change: str
    original: Side
    counterfactual: Side

    @property
    def moves(self) -> bool:
        """Whether the two answers differ; where they agree, an effect is a side effect."""
        return self.original.answer != self.counterfactual.answer


def load_pairs(config: PairsConfig, split: str) -> list[Pair]:
    """The pairs of a split, 'train' or 'test'; of one's own, the first `config.train` scenes train and the rest test.

    Raises:
        UserError: the file or a line of it cannot be used, or there are no pairs left.
    """
    wanted = config.train if split == "train" else config.test
    if config.path is None:
        assert config.change is not None, "PairsConfig asks for one of both"
        return orrery_pairs(config.change, split, wanted, config.seed, config.original, config.counterfactual)
    pairs = read_pairs(config.path)
    names = list(dict.fromkeys(pair.id for pair in pairs))
    chosen = names[: config.train] if split == "train" else names[config.train : config.train + config.test]
    if split == "test" and not chosen:
        raise UserError(
            f"{config.path} has {len(names)} pairs and pairs.train={config.train} takes them all; set pairs.train lower"
        )
    return [pair for pair in pairs if pair.id in set(chosen)]


def check_choosing(config: PairsConfig) -> None:
    """Look at all of one's own pairs, or at the first of rendered ones, before a model is loaded.

    Raises:
        UserError: none is left to choose features by, or they cannot be used.
    """
    if config.train < 1:
        raise UserError("pairs.train=0 leaves no pair to choose a circuit by; set how many choose, the others judge")
    load_pairs(config if config.path is not None else replace(config, train=1, test=1), "test")


def orrery_pairs(
    change: str, split: str, count: int, seed: int = 0, original: str | None = None, counterfactual: str | None = None
) -> list[Pair]:
    """Pairs of Orrery's scenes, one a question; arguments as in `scene_pairs`."""
    found = []
    for pair in scene_pairs(change, split, count, seed, original, counterfactual):
        sides = zip(_sides(pair.original), _sides(pair.counterfactual), strict=True)
        found += [Pair(pair.key, group, change, one, other) for (group, one), (_, other) in sides]
    return found


def _sides(scene: Scene) -> list[tuple[str, Side]]:
    assert scene.image is not None, "scenes of a pair have pictures"
    image = Image.fromarray(scene.image)
    return [(q.group, Side(q.question, (image,), q.answer)) for q in scene.questions]


def read_pairs(path: str | Path) -> list[Pair]:
    """One's own pairs, in order. Every line is looked at before a picture is opened.

    Raises:
        UserError: the first line that cannot be used, with its number, or a file without lines.
    """
    path = Path(path)
    rows = [(origin, _checked(record, origin, path.parent)) for origin, record in _records(path)]
    if not rows:
        raise UserError(f"{path} has no pair; write one object a line")
    asked = [(record["id"], record["question"]) for _, record in rows]
    for (origin, record), key in zip(rows, asked, strict=True):
        if asked.count(key) > 1:
            raise UserError(f"{origin}: id {record['id']!r} asks {record['question']!r} twice; give each its own id")
    return [_opened(record) for _, record in rows]


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in text_lines(path):
        origin = f"{path} line {number}"
        try:
            yield origin, parse_json(line)
        except UserError as error:
            raise UserError(f"{origin}: {error}") from error


def _checked(record: Any, origin: str, folder: Path) -> dict[str, Any]:
    """A line with everything filled in."""
    if not isinstance(record, dict) or not isinstance(record.get("counterfactual"), dict):
        raise UserError(f'{origin}: write {{"prompt": ..., "image": ..., "answer": ..., "counterfactual": {{...}}}}')
    for keys, part in ((_KEYS, record), (_SIDE_KEYS, record["counterfactual"])):
        if unknown := set(part) - set(keys):
            raise UserError(f"{origin}: no key {min(unknown)!r}; keys are {', '.join(keys)}")
    own = {key: record[key] for key in _SIDE_KEYS if key in record}
    other = own | record["counterfactual"]
    for name, side in (("the original", own), ("the counterfactual", other)):
        for key in ("prompt", "answer"):
            if not isinstance(side.get(key), str) or not side[key].strip():
                raise UserError(f"{origin}: {name} has no {key}; write one")
        side["image"] = _paths(side.get("image"), origin, folder)
    if own["prompt"] == other["prompt"] and own["image"] == other["image"]:
        raise UserError(f"{origin}: original and counterfactual are the same; give another image or prompt")
    if len(own["image"]) != len(other["image"]):
        raise UserError(
            f"{origin}: the original has {len(own['image'])} pictures, the counterfactual {len(other['image'])}; "
            "make them equal"
        )
    question = str(record.get("question", OWN_QUESTION))
    return {"original": own, "counterfactual": other, "question": question, "id": str(record.get("id", origin))}


def _paths(value: Any, origin: str, folder: Path) -> list[Path]:
    names = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{origin}: image {value!r} is neither a path nor a list of paths")
    for name in names:
        try:
            check_image(folder / name)
        except UserError as error:
            raise UserError(f"{origin}: {error}") from error
    return [folder / name for name in names]


def _opened(record: dict[str, Any]) -> Pair:
    sides = [
        Side(side["prompt"], PictureFiles(side["image"]), side["answer"])
        for side in (record["original"], record["counterfactual"])
    ]
    change = "prompt" if record["original"]["image"] == record["counterfactual"]["image"] else "picture"
    return Pair(record["id"], record["question"], change, *sides)
