"""Samples: the stored form, records of several layouts, and sources that are read in passes.

Pictures remain file bytes until a model needs them, so streams are shuffled, hashed and written without decoding. A
record is a JSON object of one of these forms:

    {"images": [...], "texts": CONVERSATION}   any number of pictures, and a conversation about them
    {"images": [...], "text": "..."}           pictures with their caption
    {"text": "..."}                            plain text

A conversation has one of three layouts, recognised by its keys. It may also be a JSON text, a list of JSON texts, or
an object of lists (a column of structs):

    [{"user": "...", "assistant": "..."}, ...]                         the Cauldron
    [{"role": "user", "content": "..." or [{"type": ...}, ...]}, ...]  messages, as chat templates take them
    [{"from": "human", "value": "..."}, ...]                           ShareGPT and LLaVA

In messages, a part of type "image" or the word `<image>` stands for a picture. The model's template puts pictures
before the first question, so such marks may stand before or after it and are removed. A record may also have an `id`
and `facts`, and `image` with one path instead of `images`, as LLaVA writes it; other keys are refused, since a misspelt
one would lose the pictures. Other keys of a turn are ignored.
"""

from __future__ import annotations

import hashlib
import json
import logging
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlmscope.core.artifacts import parse_json
from vlmscope.core.errors import UserError, first_line
from vlmscope.core.records import CAPTION_REQUEST, Conversation, Document, Exchange, Sample, check_characters, generator
from vlmscope.data.images import decode_image, picture_format

_LOG = logging.getLogger(__name__)
MAX_FILE_BYTES = 2**30  # as `tables.MAX_ROW_BYTES`
DIGEST_BYTES = 16  # of SHA-256: the chance of a collision among 10^9 samples is 10^-21


@dataclass(frozen=True)
class RawSample:
    """A conversation about pictures, or plain text, whose `exchanges` are empty.

    `images` are the bytes of picture files; `origin` says where the sample came from; `facts` are known properties by
    name, neither shown to a model nor stored in shards. Text that is not valid Unicode is refused.
    """

    images: tuple[bytes, ...] = ()
    exchanges: tuple[Exchange, ...] = ()
    text: str = ""
    origin: str = ""
    facts: Mapping[str, str | int] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for text in (self.text, *(words for turn in self.exchanges for words in turn)):
            check_characters(text, f"{self.origin}: {text[:30]!r}")

    def opened(self) -> Sample:
        """Decode the pictures; a damaged one raises `UserError` that names the sample."""
        if not self.exchanges:
            return Document(self.text, self.origin)
        pictures = tuple(
            decode_image(data, f"{self.origin}: picture {number}") for number, data in enumerate(self.images, start=1)
        )
        return Conversation(pictures, self.exchanges, self.origin)

    def digest(self) -> bytes:
        """`DIGEST_BYTES` of the SHA-256 of pictures and words, without the origin: equal for equal samples."""
        total = hashlib.sha256()
        for image in self.images:
            total.update(hashlib.sha256(image).digest())
        total.update(json.dumps([self.text, self.exchanges], ensure_ascii=True).encode())
        return total.digest()[:DIGEST_BYTES]

    def to_shard(self, key: str) -> dict[str, Any]:
        """A WebDataset sample: `<key>.json` with the words, `<key>.<n>.<format>` with each picture's original bytes."""
        body: dict[str, Any] = {"origin": self.origin}
        if self.exchanges:
            body["texts"] = [{"user": turn.user, "assistant": turn.assistant} for turn in self.exchanges]
        else:
            body["text"] = self.text
        names = [f"{n}.{picture_format(data, f'{self.origin}: picture {n + 1}')}" for n, data in enumerate(self.images)]
        body["images"] = names
        sample: dict[str, Any] = {"__key__": key, "json": json.dumps(body, ensure_ascii=False).encode()}
        return sample | dict(zip(names, self.images, strict=True))

    @classmethod
    def from_shard(cls, sample: Mapping[str, Any]) -> RawSample:
        """The inverse of `to_shard`; other content raises ValueError, KeyError or TypeError."""
        body = json.loads(sample["json"])
        turns = tuple(Exchange(turn["user"], turn["assistant"]) for turn in body.get("texts", ()))
        return cls(tuple(sample[name] for name in body["images"]), turns, body.get("text", ""), body["origin"])


def held_out(sample: RawSample, share: float) -> bool:
    """Whether a sample belongs to validation, decided by its digest so that duplicates fall on the same side."""
    return int.from_bytes(sample.digest()[:6], "big") < share * 2**48


def file_bytes(path: Path, origin: str) -> bytes:
    """Read a picture's file; devices and pipes, which may never end, and very large files raise `UserError`."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{origin}: cannot read {path}: it is not a file; give the path of a picture")
        if status.st_size > MAX_FILE_BYTES:
            raise UserError(f"{origin}: {path} has {status.st_size:,} bytes, at most {MAX_FILE_BYTES:,} are read")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{origin}: cannot read {path}: {reason}; correct the path") from error


def nonempty(text: Any, what: str) -> str:
    """The text itself; anything but a text with visible characters raises `UserError` that names `what`."""
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{what} is missing or empty; give a text, or leave the row out")
    return text


CONVERSATIONS = ("texts", "messages", "conversations")  # usual names of keys and columns that hold one
_KEYS = ("images", "image", "text", *CONVERSATIONS, "id", "facts")  # of a record
_MARK = "<image>"
_PAIR, _MESSAGE, _SHARE = ("user", "assistant"), ("role", "content"), ("from", "value")
_SPEAKERS = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_LAYOUT = 'such as [{"user": "...", "assistant": "..."}], or of role and content, or of from and value'


class Record(NamedTuple):
    """The content of a record; plain text has neither pictures nor exchanges."""

    images: list[str]  # paths
    exchanges: tuple[Exchange, ...]
    text: str


def record_parts(record: Any, origin: str) -> Record:
    """Parse a JSON object of one of the layouts above; `origin` names it in messages."""
    if not isinstance(record, Mapping):
        raise UserError(f'{origin}: it is not a JSON object; write one such as {{"images": [...], "texts": [...]}}')
    keys = [key for key in (*CONVERSATIONS, "text") if key in record]
    if len(keys) != 1:
        neither = f"neither texts nor text, messages or conversations; its keys are {', '.join(sorted(record))}"
        problem = f"both {' and '.join(keys[:2])}" if keys else neither
        raise UserError(f"{origin}: it has {problem}; give one of them (layouts: docs/bring_your_own.md)")
    for key in record:
        if key not in _KEYS:
            near = get_close_matches(str(key).lower(), _KEYS, n=1)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else f"keys are {', '.join(_KEYS)}; notes of your own go into facts"
            )
            raise UserError(f"{origin}: no key {key!r}; {hint}")
    images, image = record.get("images") or [], record.get("image")
    if image and not images and isinstance(image, str):
        images = [image]
    elif image:
        reason = "it has both images and image" if images else "image must be a path, such as a.png"
        raise UserError(f"{origin}: {reason}; correct it")
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise UserError(f'{origin}: images must be a list of paths, such as ["a.png"]; correct it')
    if keys == ["text"]:
        text = nonempty(record["text"], f"{origin}: text")
        return Record(images, (Exchange(CAPTION_REQUEST, text),), "") if images else Record([], (), text)
    return Record(images, exchanges_of(record[keys[0]], len(images), f"{origin}: {keys[0]}"), "")


def exchanges_of(value: Any, n_images: int, what: str) -> tuple[Exchange, ...]:
    """Parse a conversation in one of the layouts above, as JSON, Arrow or Parquet gave it.

    A system message is put before the first question, with an empty line between, as Gemma's chat template does.

    Raises:
        UserError: `what` has no known layout, a missing or empty turn, or marks for other than `n_images` pictures.
    """
    turns = _turns(value, what)
    layout = _layout(turns[0])
    if layout is None:
        raise UserError(f"{what} must be a list {_LAYOUT}; its first entry {_described(turns[0])}")
    for number, turn in enumerate(turns, start=1):
        if _layout(turn) != layout:
            raise UserError(f"{what}: entry {number} {_described(turn)}, the first one {_described(turns[0])}")
    if layout == _PAIR:
        pairs = [[turn.get(speaker) for speaker in _PAIR] for turn in turns]
    else:
        texts = _taking_turns(turns, layout, n_images, what)
        pairs = [texts[start : start + 2] for start in range(0, len(texts), 2)]
    for number, pair in enumerate(pairs, start=1):
        for speaker, text in zip(_PAIR, pair, strict=True):
            nonempty(text, f"{what}: {speaker} of exchange {number}")
    return tuple(Exchange(*pair) for pair in pairs)


def _turns(value: Any, what: str) -> list[Any]:
    """The entries of a conversation, at least one, decoded from JSON where necessary."""
    turns = _decoded(value)
    if isinstance(turns, Mapping):  # a column of structs: an object of equally long lists
        columns = list(turns.values())
        if all(isinstance(column, list) for column in columns) and len({len(column) for column in columns}) == 1:
            turns = [dict(zip(turns, entry, strict=True)) for entry in zip(*columns, strict=True)]
    if not isinstance(turns, Sequence) or isinstance(turns, str | bytes) or not turns:
        raise UserError(f"{what} must be a list {_LAYOUT}; it {_described(turns)}")
    return [_decoded(entry) for entry in turns]


def _decoded(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except UserError:
        return value  # the caller refuses plain text with a message of its own


def _layout(turn: Any) -> tuple[str, str] | None:
    if not isinstance(turn, Mapping):
        return None
    if set(_PAIR) & set(turn):
        return _PAIR
    return next((keys for keys in (_MESSAGE, _SHARE) if set(keys) <= set(turn)), None)


def _described(value: Any) -> str:
    return f"has the keys {', '.join(sorted(map(str, value)))}" if isinstance(value, Mapping) else f"is {value!r:.40}"


def _taking_turns(turns: list[Any], layout: tuple[str, str], n_images: int, what: str) -> list[str]:
    """Questions and answers in turn from messages, without the picture marks."""
    texts: list[str] = []
    system = ""
    for number, turn in enumerate(turns, start=1):
        role, content = (turn[key] for key in layout)
        speaker = _SPEAKERS.get(str(role))
        if speaker is None:
            raise UserError(f"{what}: message {number} is of {role!r}; user, assistant and system are read")
        words = _content(content, f"{what}: message {number}")
        if speaker == "system" and number == 1:
            system = words
            continue
        due = _PAIR[len(texts) % 2]
        if speaker != due:
            raise UserError(f"{what}: message {number} is the {speaker}'s where the {due}'s is due")
        texts.append(words)
    if len(texts) % 2 or not texts:
        raise UserError(f"{what}: {'it ends with a question' if texts else 'it has no question'}; give its answer")
    marks = sum(words.count(_MARK) for words in (system, *texts))
    if marks and marks != n_images:
        raise UserError(f"{what}: {marks} {_MARK} are written and {n_images} pictures are given; make them equal")
    texts[0] = _without_marks(texts[0])
    if any(_MARK in words for words in (system, *texts)):
        raise UserError(
            f"{what}: {_MARK} within the words or after the first question; pictures are shown before it, so write "
            "them there or leave the line out"
        )
    if system.strip() and texts[0].strip():
        texts[0] = f"{system}\n\n{texts[0]}"
    return texts


def _without_marks(question: str) -> str:
    """The question without the picture marks before and after its words."""
    while question.lstrip().startswith(_MARK):
        question = question.lstrip().removeprefix(_MARK).lstrip()
    while question.rstrip().endswith(_MARK):
        question = question.rstrip().removesuffix(_MARK).rstrip()
    return question


def _content(content: Any, what: str) -> str:
    """The text of a message, with a mark for each picture among its parts."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list) or not all(isinstance(part, Mapping) for part in content):
        raise UserError(f"{what} is neither a text nor a list of parts that are objects; correct it")
    words = ""
    for part in content:
        kind = part.get("type")
        if kind not in ("text", "image"):
            raise UserError(f"{what} has a part of type {kind!r}; text and image are read")
        if kind == "image" and any(part.get(key) for key in ("image", "path", "url", "base64")):
            raise UserError(f"{what} brings a picture of its own; put it into the list of pictures")
        words += _MARK if kind == "image" else part.get("text") or ""
    return words


def drawn(seed: int, number: int, size: int) -> int:
    """Index of example `number` in an endless order of `size` examples: each once per epoch, each epoch shuffled."""
    epoch, position = divmod(number, size)
    return int(_shuffled(seed, epoch, size)[position])


@lru_cache(maxsize=4)
def _shuffled(seed: int, epoch: int, size: int) -> np.ndarray:
    return generator(seed, "conversations", epoch).permutation(size)


@dataclass(frozen=True)
class Share:
    """Part `index` of `total`, such as a rank's."""

    index: int = 0
    total: int = 1

    def rows(self, size: int) -> range:
        """Every `total`-th of `size` rows: each row in exactly one part; part sizes differ by one at most."""
        return range(self.index, size, self.total)

    def stretch(self, size: int) -> range:
        """One contiguous stretch of `size` rows, for files that are read from the front; each row in one part."""
        return range(self.index * size // self.total, (self.index + 1) * size // self.total)


WHOLE = Share()
Row = Callable[[], RawSample]  # unread, so that rows can be shuffled before their pictures are read
Mark = Any  # plain JSON


class Reader(Iterator[Row], ABC):
    """One pass over a share of a source; `row` is the number of the next row in the share."""

    bad_shards = 0  # corrupt shards met so far

    def __init__(self, row: int) -> None:
        self.row = row

    @abstractmethod
    def mark(self) -> Mark:
        """Position of the pass: a pass opened at this mark yields exactly the remaining rows."""


@dataclass(frozen=True)
class Source:
    """Samples in a fixed order.

    `open(share, mark)` starts a pass over a share, or resumes an earlier pass over the same share at its mark.
    """

    name: str
    size: int | None  # number of samples; None if unknown before reading
    open: Callable[..., Reader]
    sample: Callable[[int], RawSample] | None = None  # one sample by its number, where random access is possible


def indexed(name: str, count: int, sample: Callable[[int], RawSample]) -> Source:
    """A source with random access, whose sample `i` is `sample(i)`."""

    def open_share(share: Share, mark: Mark = None) -> Reader:
        return _IndexedReader(sample, share.rows(count), mark or 0)

    return Source(name, count, open_share, sample)


class _IndexedReader(Reader):
    """Pass over a source with random access; its mark is the number of rows read."""

    def __init__(self, sample: Callable[[int], RawSample], rows: range, done: int) -> None:
        super().__init__(done)
        self.sample, self.rows = sample, rows

    def __next__(self) -> Row:
        if self.row >= len(self.rows):
            raise StopIteration
        self.row += 1
        return partial(self.sample, self.rows[self.row - 1])

    def mark(self) -> Mark:
        return self.row


class BadFiles:
    """Corrupt shards of a source: left out with a warning, up to a limit."""

    def __init__(self, name: str, most: int, mend: str, before: int = 0) -> None:
        """`most` is `data.max_bad_shards`, `mend` how to get a good copy, `before` the count of a resumed pass."""
        self.name, self.most, self.mend, self.before = name, most, mend, before
        self.files: list[str] = []

    def __len__(self) -> int:
        return self.before + len(self.files)

    def add(self, file: str | Path, error: Exception) -> None:
        """Record a corrupt file, once if it is met again; raise `UserError` when there are too many."""
        if str(file) in self.files:
            return
        self.files.append(str(file))
        what = f"data.sources.{self.name}: {file} is corrupt ({first_line(error)})"
        if len(self) > self.most:
            raise UserError(
                f"{what}, number {len(self)}, and data.max_bad_shards={self.most}; {self.mend}, or raise the limit"
            ) from error
        _LOG.warning("%s; left out (%d of at most %d)", what, len(self), self.most)
