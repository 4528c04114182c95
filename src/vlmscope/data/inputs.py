"""Inputs of experiments: prompts with their pictures, questions with answers, and counterfactual pairs.

Prompts are the rows of `task.rows=FILE`. A CSV file has a header with the columns `prompt`, `image` (one path, or
several separated by `;`; empty for text alone) and optionally `id`, `answer` and `question`, the group of rows that are
counted together; a JSONL file has one object per line with these keys, where `image` may also be a list. Only
task=anatomy reads answers and groups.

Pairs, two inputs that differ in one fact with the answer to each, come from Orrery's renderers or from the user's JSONL
file, one object per line:

    {"prompt": "what is this ?", "image": "cat.png", "answer": "cat",
     "counterfactual": {"image": "dog.png", "answer": "dog"}, "question": "animal", "id": "a"}

The counterfactual inherits missing keys from the original. `question` groups lines that ask the same thing.

Paths are relative to the file's folder. The whole file is checked first, so that a mistake in the last row does not
cost the work on the others.
"""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmscope.core.artifacts import parse_json, read_json, read_text, text_lines, write_json
from vlmscope.core.errors import UserError
from vlmscope.core.records import as_rgb, generator, normalised
from vlmscope.data.config import PairsConfig
from vlmscope.data.icons import icon_pairs, read_relations
from vlmscope.data.images import PictureFiles, check_image, open_image
from vlmscope.data.orrery.dataset import plainly_asked, scene_pairs
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.data.orrery.scenes import PICTURED, text_facts

_LOG = logging.getLogger(__name__)
_ROW_KEYS = ("id", "prompt", "image", "answer", "question")
_SIDE_KEYS = ("prompt", "image", "answer")
_PAIR_KEYS = (*_SIDE_KEYS, "counterfactual", "question", "id")
_ID = re.compile(r"[\w-][\w.-]{0,99}", re.ASCII)
PICTURES = "pictures.json"
OWN_QUESTION = "answer"  # group of lines without `question`


@dataclass(frozen=True)
class PromptRow:
    """One prompt with its pictures."""

    id: str  # can name a folder
    prompt: str
    images: tuple[Path, ...]
    origin: str  # file and row, for messages
    answer: str = ""  # "" where none is given, as is the question
    question: str = ""


def read_rows(path: str | Path) -> tuple[list[PromptRow], list[str]]:
    """The valid rows of a file, and one message for each invalid row, in order; a CSV's header is not numbered."""
    path = Path(path)
    readers = {".csv": _csv_rows, ".jsonl": _json_rows}
    if path.suffix.lower() not in readers:
        raise UserError(f"task.rows={path}: give a .csv or a .jsonl file")
    good: list[PromptRow] = []
    bad: list[str] = []
    seen: dict[str, str] = {}
    for number, record in enumerate(readers[path.suffix.lower()](path), start=1):
        origin = f"{path} row {number}"
        try:
            row = _row(record, number, origin, path.parent)
            if row.id in seen:
                raise UserError(f"id {row.id!r} is that of {seen[row.id]} too; give each row its own")
            seen[row.id] = f"row {number}"
            good.append(row)
        except UserError as error:
            bad.append(f"{origin}: {error}")
    if not good and not bad:
        raise UserError(f"{path} has no row; write one (image, prompt) a line")
    return good, bad


def _csv_rows(path: Path) -> Iterator[Any]:
    lines = csv.DictReader(io.StringIO(read_text(path), newline=""))
    names = [name.strip() for name in lines.fieldnames or []]
    if "prompt" not in names or set(names) - set(_ROW_KEYS) or len(set(names)) < len(names):
        more = "give prompt, image and perhaps id, answer, question"
        raise UserError(f"{path} has the columns {', '.join(names) or '(none)'}; {more}")
    lines.fieldnames = names
    try:
        for line in lines:
            if None in line:
                yield UserError("more fields than columns; put a prompt that holds a comma into double quotes")
            else:
                yield {key: value for key, value in line.items() if value}
    except csv.Error as error:
        raise UserError(f"{path} line {lines.line_num}: not valid CSV ({error}); correct it") from error


def _json_rows(path: Path) -> Iterator[Any]:
    for _, line in text_lines(path):
        try:
            yield parse_json(line)
        except UserError as error:
            yield error


def _row(record: Any, number: int, origin: str, folder: Path) -> PromptRow:
    if isinstance(record, UserError):
        raise record
    if not isinstance(record, dict):
        raise UserError('not a JSON object; write {"image": ..., "prompt": ...}')
    _check_keys(record, _ROW_KEYS)
    prompt = record.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError("no prompt; write one")
    name = record.get("id", f"row_{number:05d}")
    if not isinstance(name, str | int) or not _ID.fullmatch(str(name)):
        raise UserError(f"id {name!r} cannot be a folder's name; use letters, digits, '_', '-' and '.', at most 100")
    image = record.get("image")
    names = [part.strip() for part in image.split(";") if part.strip()] if isinstance(image, str) else image
    texts = [record.get(key) or "" for key in ("answer", "question")]
    if not all(isinstance(text, str) for text in texts):
        raise UserError("answer and question are words; put them into quotes")
    return PromptRow(str(name), prompt, tuple(_checked_paths(names, folder)), origin, *map(str.strip, texts))


def _check_keys(record: dict[str, Any], keys: Sequence[str]) -> None:
    if unknown := set(record) - set(keys):
        raise UserError(f"no key {min(unknown)!r}; keys are {', '.join(keys)}")


def _checked_paths(value: Any, folder: Path) -> list[Path]:
    """Picture paths from a string, a list or null, after checking the header of each picture."""
    names = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"image {value!r} is neither a path nor a list of paths")
    for name in names:
        check_image(folder / name)
    return [folder / name for name in names]


@dataclass(frozen=True)
class Side:
    """One input of a pair: prompt, pictures, and the answer."""

    prompt: str
    images: Sequence[Image.Image]
    answer: str


@dataclass(frozen=True)
class Pair:
    """Two inputs that differ in one fact."""

    id: str  # of the scene: questions about one scene share it
    question: str  # group that the pair is counted in
    change: str  # the fact that differs
    original: Side
    counterfactual: Side

    @property
    def moves(self) -> bool:
        """Whether the two answers differ; if they agree, any effect is a side effect."""
        return self.original.answer != self.counterfactual.answer

    @property
    def contents(self) -> dict[str, str]:
        """Side -> `content_key` of its pictures; with its words where these are what differs."""
        sides = {"original": self.original, "counterfactual": self.counterfactual}
        by_words = self.change == "prompt"
        return {f"{self.id} {name}": content_key(side.images, side.prompt if by_words else "")
                for name, side in sides.items()}  # fmt: skip


def content_key(images: Sequence[Image.Image | np.ndarray], prompt: str = "") -> str:
    """Key of an input by what it is: its words as `normalised`, and the pixels of each picture as RGB."""
    total = hashlib.sha256(normalised(prompt).encode())
    for image in images:
        picture = as_rgb(image if isinstance(image, Image.Image) else Image.fromarray(image))
        total.update(repr(picture.size).encode() + hashlib.sha256(picture.tobytes()).digest())
    return total.hexdigest()[:16]


@dataclass
class UsedPictures:
    """On which pictures a run chose something (features, levels, a setting), and on which it tested them.

    Each is purpose -> name of a picture -> `content_key`, as in the run's file `PICTURES`.
    """

    chosen: dict[str, dict[str, str]] = field(default_factory=dict)
    tested: dict[str, dict[str, str]] = field(default_factory=dict)

    def add(self, tests: bool, purpose: str, pictures: Mapping[str, str]) -> None:
        """Record pictures (name -> content key).

        Raises:
            UserError: one of them chose and tests.
        """
        own, other = (self.tested, self.chosen) if tests else (self.chosen, self.tested)
        known = {key: (use, name) for use, names in other.items() for name, key in names.items()}
        both = [(name, *known[key]) for name, key in pictures.items() if key in known]
        if both:
            name, use, twin = both[0]
            (test, tests_for), (choice, chose) = ((name, purpose), (twin, use))[:: 1 if tests else -1]
            more = f" (and {len(both) - 1} more)" if len(both) > 1 else ""
            raise UserError(
                f"{test} ({tests_for}) has the same content as {choice} ({chose}){more}: what is chosen on a picture "
                "cannot be tested on it; give other test pictures"
            )
        own.setdefault(purpose, {}).update(pictures)

    def inherit(self, run: Path) -> None:
        """Add what another run chose on, whose circuit this one tests; nothing where that is not recorded."""
        if (run / PICTURES).is_file():
            for purpose, pictures in read_json(run / PICTURES)["chosen"].items():
                self.add(False, f"{purpose} of {run}", pictures)

    def save(self, run: Path) -> None:
        """Write both into a run's folder; nothing where no picture was used."""
        if self.chosen or self.tested:
            write_json(run / PICTURES, {"chosen": self.chosen, "tested": self.tested})


def pictures_of_folders(images: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The user's `images:` with every folder replaced by its pictures, in the order of their names.

    `images.<concept>` may be one folder for everything: its folders `train`, `val` and `test` if it has these, else of
    its pictures every second one tests and the others choose (`images.<concept>_train`).

    Raises:
        UserError: a folder without pictures, or with a single one to be divided.
    """
    found = {name: [file for path in paths for file in _pictures_at(path)] for name, paths in images.items()}
    for name, paths in images.items():
        alone = len(paths) == 1 and Path(paths[0]).is_dir() and not name.endswith(("_train", "_val"))
        if not alone or f"{name}_train" in images:
            continue
        folder, files = Path(paths[0]), found[name]
        splits = {split: folder / split for split in ("train", "val", "test") if (folder / split).is_dir()}
        if splits:
            keys = {"train": f"{name}_train", "val": f"{name}_val", "test": name}
            found |= {keys[split]: _pictures_at(path) for split, path in splits.items()}
        elif len(files) < 2:
            raise UserError(f"images.{name}={folder}: one picture cannot both choose and test; give at least two")
        else:
            found |= {f"{name}_train": files[1::2], name: files[::2]}
    return found


def _pictures_at(path: str | Path) -> list[str]:
    """The pictures of a folder, or the file itself."""
    if not Path(path).is_dir():
        return [str(path)]
    files = sorted(str(file) for file in Path(path).iterdir() if file.suffix.lower() in PICTURE_SUFFIXES)
    if not files and not (Path(path) / "test").is_dir():
        raise UserError(f"{path}: no pictures in this folder; it needs {', '.join(sorted(PICTURE_SUFFIXES))} files")
    return files


def check_own_pictures(images: Mapping[str, Sequence[str]]) -> None:
    """Refuse the user's `images:` if a file cannot be opened, or if one has the pixels of a picture to choose on
    (`images.<concept>_train`, `_val`) and of one to test on.
    """
    used = UsedPictures()
    for name, paths in images.items():
        absent = [path for path in paths if not Path(path).exists()]
        if absent:
            raise UserError(
                f"images.{name}: no folder or picture {absent[0]}; give images.{name}=FOLDER, or mend the path"
            )
        keys = {path: content_key([open_image(path)]) for path in paths}
        used.add(not name.endswith(("_train", "_val")), f"images.{name}", keys)


PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
GROUP = 8  # rows that make a question of their own
OTHERS = "other"  # the question of all other rows


def row_questions(rows: Sequence[PromptRow]) -> dict[str, list[Side]]:
    """Rows by what they ask: their `question`, else their prompt where `GROUP` rows share it, else `OTHERS`."""
    shared = Counter(row.prompt for row in rows if not row.question)
    questions: dict[str, list[Side]] = {}
    for row in rows:
        name = row.question or (row.prompt if shared[row.prompt] >= GROUP else OTHERS)
        questions.setdefault(name, []).append(Side(row.prompt, PictureFiles(row.images), row.answer))
    return questions


def orrery_questions(count: int, kinds: Sequence[str], text: bool, seed: int = 0) -> dict[str, list[Side]]:
    """At most `count` cases of each of Orrery's questions, in canonical words.

    They are about test scenes of these kinds with pictures, and of text alone.
    """
    questions: dict[str, list[Side]] = {}
    for kind in kinds:
        for number in range(count):
            scene = plainly_asked(make_scene("test", kind, number, seed))
            assert scene.image is not None, "scenes of these kinds have pictures"
            image = Image.fromarray(scene.image)
            for asked in scene.questions:
                questions.setdefault(asked.group, []).append(Side(asked.question, (image,), asked.answer))
    facts: dict[str, list[Side]] = {}
    for group, prompt, answer in text_facts() if text else ():
        facts.setdefault(group, []).append(Side(prompt, (), answer))
    for group, sides in facts.items():
        if len(sides) >= GROUP:
            order = generator(seed, "questions", group).permutation(len(sides))[:count]
            questions[group] = [sides[number] for number in order.tolist()]
    return questions


def other_pictures(sizes: Sequence[tuple[int, int]], count: int) -> list[list[Image.Image]]:
    """`count` sets of pictures of these sizes (width, height), Orrery's validation scenes of every kind in turn."""
    sets = []
    for number in range(count):
        scene = make_scene("val", PICTURED[number % len(PICTURED)], number)
        assert scene.image is not None, "scenes of these kinds have pictures"
        sets.append([Image.fromarray(scene.image).resize(size) for size in sizes])
    return sets


def load_pairs(config: PairsConfig, split: str) -> list[Pair]:
    """Load the pairs of a split, 'train' or 'test'.

    Of a file, the first `config.train` scenes are for training and the next `config.test` for testing, of those that
    share no input with them: what decides is the content of an input, not its line or id.
    """
    if config.relations:
        return relation_pairs(config, split)
    if config.path is None:
        assert config.change is not None, "PairsConfig requires one of change, path and relations"
        count = config.train if split == "train" else config.test
        return orrery_pairs(config.change, split, count, config.seed, config.original, config.counterfactual)
    pairs = read_pairs(config.path)
    names = list(dict.fromkeys(pair.id for pair in pairs))
    chosen, rest = names[: config.train], names[config.train :]
    if split == "test" and not rest:
        raise UserError(
            f"{config.path} has {len(names)} pairs and pairs.train={config.train} takes them all; set pairs.train lower"
        )
    if split == "test":
        known = {key for pair in pairs if pair.id in set(chosen) for key in pair.contents.values()}
        repeats = {pair.id for pair in pairs if known & {*pair.contents.values()}}
        chosen = [name for name in rest if name not in repeats][: config.test]
        if left_out := len(repeats & {*rest}):
            _LOG.warning("%s: %d pairs share an input with a training pair, so they do not test", config.path, left_out)
        if not chosen:
            raise UserError(
                f"{config.path}: every pair after the first {config.train} shares an input (words and pixels) with "
                "a training pair; give test pairs of other pictures or prompts"
            )
    return [pair for pair in pairs if pair.id in set(chosen)]


def check_choosing(config: PairsConfig) -> None:
    """Check all pairs of a file, or the first rendered one, before a model is loaded."""
    if config.train < 1:
        raise UserError("pairs.train=0 leaves no pair to choose a circuit by; set how many choose, the others judge")
    load_pairs(config if config.path is not None else replace(config, train=1, test=1), "test")


def orrery_pairs(
    change: str, split: str, count: int, seed: int = 0, original: str | None = None, counterfactual: str | None = None
) -> list[Pair]:
    """Pairs of Orrery's scenes, one per question; arguments as in `scene_pairs`."""
    pairs = []
    for pair in scene_pairs(change, split, count, seed, original, counterfactual):
        sides = []
        for scene in (pair.original, pair.counterfactual):
            assert scene.image is not None, "scenes of a pair have pictures"
            images = (Image.fromarray(scene.image),)
            sides.append([Side(question.question, images, question.answer) for question in scene.questions])
        groups = [question.group for question in pair.original.questions]
        pairs += [Pair(pair.key, group, change, *both) for group, *both in zip(groups, *sides, strict=True)]
    return pairs


def relation_pairs(config: PairsConfig, split: str) -> list[Pair]:
    """Pairs of icons of different things, called "A to B", one per relation that the text model knows of both.

    The two answers may agree.
    """
    relations = read_relations(config.relations)
    pairs = []
    for icons in icon_pairs(relations, split, config.train if split == "train" else config.test, config.seed):
        for name, relation in relations.items():
            if not {icons.original, icons.counterfactual} <= relation.known:
                continue
            shown = ((icons.picture, icons.original), (icons.other_picture, icons.counterfactual))
            sides = [Side(relation.asked(), (picture,), relation.answers[concept]) for picture, concept in shown]
            pairs.append(Pair(f"{icons.original} to {icons.counterfactual}", name, "picture", *sides))
    return pairs


def read_pairs(path: str | Path) -> list[Pair]:
    """Read the user's pairs, in order; the first invalid line raises `UserError` with its number."""
    path = Path(path)
    lines: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]] = {}
    for number, line in text_lines(path):
        origin = f"{path} line {number}"
        try:
            record = parse_json(line)
            sides = _sides(record, path.parent)
            key = str(record.get("id", origin)), str(record.get("question", OWN_QUESTION))
            if key in lines:
                raise UserError(f"id {key[0]!r} asks {key[1]!r} twice; give each its own id")
        except UserError as error:
            raise UserError(f"{origin}: {error}") from error
        lines[key] = sides
    if not lines:
        raise UserError(f"{path} has no pair; write one object a line")
    pairs = []
    for (name, question), sides in lines.items():
        change = "prompt" if sides[0]["image"] == sides[1]["image"] else "picture"
        opened = [Side(side["prompt"], PictureFiles(side["image"]), side["answer"]) for side in sides]
        pairs.append(Pair(name, question, change, *opened))
    return pairs


def _sides(record: Any, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Original and counterfactual of a line, the latter completed from the former."""
    if not isinstance(record, dict) or not isinstance(record.get("counterfactual"), dict):
        raise UserError('write {"prompt": ..., "image": ..., "answer": ..., "counterfactual": {...}}')
    _check_keys(record, _PAIR_KEYS)
    _check_keys(record["counterfactual"], _SIDE_KEYS)
    original = {key: record[key] for key in _SIDE_KEYS if key in record}
    changed = original | record["counterfactual"]
    for name, side in (("the original", original), ("the counterfactual", changed)):
        for key in ("prompt", "answer"):
            if not isinstance(side.get(key), str) or not side[key].strip():
                raise UserError(f"{name} has no {key}; write one")
        side["image"] = _checked_paths(side.get("image"), folder)
    if original["prompt"] == changed["prompt"] and original["image"] == changed["image"]:
        raise UserError("original and counterfactual are the same; give another image or prompt")
    if len(original["image"]) != len(changed["image"]):
        counts = f"the original has {len(original['image'])} pictures, the counterfactual {len(changed['image'])}"
        raise UserError(f"{counts}; make them equal")
    return original, changed
