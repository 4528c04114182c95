"""A sample as it is stored, passed on and said, and the passes that sources offer over them.

Which part of a stream one consumer reads, when several ranks with several workers each read it together.

A sample as it is stored and passed on: pictures as the bytes of their files, and what is said about them.

No pixel is decoded until a model asks for it, so streams are shuffled, hashed and written without looking inside.

Records and table cells as conversations, and the order in which they are drawn. Pure functions.

    {"images": [...], "texts": CONVERSATION}   pictures, which may be none, and what is said about them
    {"images": [...], "text": "..."}           pictures with their caption
    {"text": "..."}                            plain text

A conversation is in one of three layouts, known by its keys. It may also be a JSON text, a list of JSON texts, or an
object of lists (a column of structs):

    [{"user": "...", "assistant": "..."}, ...]                         the Cauldron
    [{"role": "user", "content": "..." or [{"type": ...}, ...]}, ...]  messages, as chat templates take them
    [{"from": "human", "value": "..."}, ...]                           ShareGPT and LLaVA

In messages, a part of type "image" or the word `<image>` stands for a picture. The pictures go before the first
question, where the model's template puts them, so the marks may stand before it or after it and are taken out. Other
keys, of a record or of a turn, are left alone.

Scenes as batches of single-turn prompts with their answers, in the form of the Hugging Face forward.

What every source offers: one pass over a share of its samples, and a mark from which the pass goes on.

A row is a function that gives the sample, so that rows can be shuffled before their pictures are read. A mark is plain
JSON; `open(share, mark)` yields exactly the rows that the marked pass had left.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from vlmscope.core.artifacts import parse_json
from vlmscope.core.errors import UserError
from vlmscope.core.records import (
    CAPTION_REQUEST,
    Conversation,
    Document,
    Exchange,
    Opener,
    Sample,
    check_characters,
    generator,
)
from vlmscope.data.images import decode_image, picture_format
from vlmscope.data.orrery.scenes import Scene
from vlmscope.data.packing import IGNORE, pack


@dataclass(frozen=True)
class Share:
    """Part `index` of `total`: rank r of R with worker w of W reads part r W + w of R W."""

    index: int = 0
    total: int = 1

    @classmethod
    def of(cls, rank: int, ranks: int, worker: int = 0, workers: int = 1) -> Share:
        """The part of one worker of one rank."""
        return cls(rank * workers + worker, ranks * workers)

    def rows(self, size: int) -> range:
        """Its rows of `size`: every `total`-th. Over all parts each row comes once; the parts differ by one at most."""
        return range(self.index, size, self.total)

    def stretch(self, size: int) -> range:
        """Its rows of `size` as one stretch, for files that are read from the front. Each row once, as in `rows`."""
        return range(self.index * size // self.total, (self.index + 1) * size // self.total)


WHOLE = Share()


MAX_FILE_BYTES = 2**30  # as `bad_files.MAX_ROW_BYTES`
DIGEST_BYTES = 16  # of SHA-256: among 10^9 samples two differ in it but for a chance of 10^-21


@dataclass(frozen=True)
class RawSample:
    """A conversation about pictures, or plain text.

    Attributes:
        images: files (JPEG, PNG, WebP ...) in order.
        exchanges: what is said; empty for plain text.
        text: plain text; empty for a conversation.
        origin: where it came from, for messages.
        facts: what is known of it, by name; no model sees them and no shard keeps them.
    """

    images: tuple[bytes, ...] = ()
    exchanges: tuple[Exchange, ...] = ()
    text: str = ""
    origin: str = ""
    facts: Mapping[str, str | int] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        """Refuse words that neither a shard nor a model can take.

        Raises:
            UserError: with the origin and the place.
        """
        for text in (self.text, *(said for turn in self.exchanges for said in turn)):
            check_characters(text, f"{self.origin}: {text[:30]!r}")

    def opened(self) -> Sample:
        """The record that a model reads.

        Raises:
            UserError: a picture is damaged; the message names the sample.
        """
        if not self.exchanges:
            return Document(self.text, self.origin)
        pictures = tuple(
            decode_image(data, f"{self.origin}: picture {number}") for number, data in enumerate(self.images, start=1)
        )
        return Conversation(pictures, self.exchanges, self.origin)

    def digest(self) -> bytes:
        """`DIGEST_BYTES` of the SHA-256 of pictures and words: equal for equal samples, wherever they come from."""
        total = hashlib.sha256()
        for image in self.images:
            total.update(hashlib.sha256(image).digest())
        total.update(json.dumps([self.text, self.exchanges], ensure_ascii=True).encode())
        return total.digest()[:DIGEST_BYTES]

    def nbytes(self) -> int:
        """About how many bytes it takes in a shard."""
        words = self.text if not self.exchanges else "".join(part for turn in self.exchanges for part in turn)
        return sum(map(_in_tar, map(len, self.images))) + _in_tar(len(words.encode()) + 100)

    def to_shard(self, key: str) -> dict[str, Any]:
        """A WebDataset sample: `<key>.json` with the words, `<key>.<n>.<format>` for each picture, as it was."""
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
        """The inverse of `to_shard`.

        Raises:
            ValueError, KeyError, TypeError: it is none.
        """
        body = json.loads(sample["json"])
        turns = tuple(Exchange(turn["user"], turn["assistant"]) for turn in body.get("texts", ()))
        return cls(tuple(sample[name] for name in body["images"]), turns, body.get("text", ""), body["origin"])


def held_out(sample: RawSample, share: float) -> bool:
    """Whether a sample is kept for validation: decided by its digest, so equal samples fall on the same side."""
    return int.from_bytes(sample.digest()[:6], "big") < share * 2**48


def _in_tar(size: int) -> int:
    """A file's bytes in a tar: a header of 512, and the content rounded up to 512."""
    return 512 + -(-size // 512) * 512


def file_bytes(path: Path, origin: str) -> bytes:
    """The content of a picture's file.

    Raises:
        UserError: there is none, it is a folder, a device or a pipe, or larger than `MAX_FILE_BYTES`.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{origin}: cannot read {path}: it is no file; give the path of a picture")
        if status.st_size > MAX_FILE_BYTES:
            raise UserError(f"{origin}: {path} has {status.st_size:,} bytes, at most {MAX_FILE_BYTES:,} are read")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{origin}: cannot read {path}: {reason}; correct the path") from error


def words(value: Any, what: str) -> str:
    """A text that says something.

    Raises:
        UserError: it is missing, empty or no text.
    """
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{what} is missing or empty")
    return value


CONVERSATIONS = ("texts", "messages", "conversations")  # keys and columns that hold one, as they are usually called
_MARK = "<image>"
_PAIR, _MESSAGE, _SHARE = ("user", "assistant"), ("role", "content"), ("from", "value")
_SPEAKERS = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
_LAYOUT = 'such as [{"user": "...", "assistant": "..."}], or of role and content, or of from and value'


class Record(NamedTuple):
    """What a record holds: the names of its pictures, and what is said; without pictures and exchanges, plain text."""

    images: list[str]
    exchanges: tuple[Exchange, ...]
    text: str


def record_parts(record: Any, origin: str) -> Record:
    """What a record holds.

    Args:
        record: what JSON gave.
        origin: where it stands, for the message.

    Raises:
        UserError: with `origin` and what is wrong: it is of none of the layouts.
    """
    if not isinstance(record, Mapping):
        raise UserError(f'{origin}: it is not a JSON object; write one such as {{"images": [...], "texts": [...]}}')
    given = [key for key in (*CONVERSATIONS, "text") if key in record]
    if len(given) != 1:
        other = f"; its keys are {', '.join(sorted(record))}"
        said = (
            f"both {given[0]} and {given[1]}" if given else f"neither texts nor text, messages or conversations{other}"
        )
        raise UserError(f"{origin}: it has {said}; give one of them (layouts: docs/bring_your_own.md)")
    images = _names(record, origin)
    if given == ["text"]:
        text = _text(record["text"], f"{origin}: text")
        return Record(images, (Exchange(CAPTION_REQUEST, text),), "") if images else Record([], (), text)
    return Record(images, exchanges_of(record[given[0]], len(images), f"{origin}: {given[0]}"), "")


def _names(record: Mapping[str, Any], origin: str) -> list[str]:
    images, image = record.get("images") or [], record.get("image")
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise UserError(f'{origin}: images must be a list of paths, such as ["a.png"]; correct it')
    if not image:
        return images
    if images or not isinstance(image, str):
        said = "it has both images and image" if images else "image must be a path, such as a.png"
        raise UserError(f"{origin}: {said}; correct it")
    return [image]


def _text(text: Any, what: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{what} is missing or empty; give a text, or leave the line out")
    return text


def sample_of(record: Mapping[str, Any], open_picture: Opener, origin: str = "") -> Sample:
    """The sample of a record, with its pictures opened by `open_picture`.

    Raises:
        UserError: as `record_parts`.
    """
    names, exchanges, text = record_parts(record, origin)
    return Conversation(tuple(map(open_picture, names)), exchanges, origin) if exchanges else Document(text, origin)


def exchanges_of(value: Any, n_images: int, what: str) -> tuple[Exchange, ...]:
    """The exchanges of a conversation in one of the layouts above.

    A system message is put before the first question, with an empty line between, as Gemma's chat template does.

    Args:
        value: what JSON, Arrow or Parquet gave.
        n_images: how many pictures it is about.
        what: names the value, for messages.

    Raises:
        UserError: it is of no layout, a turn is missing or empty, or the pictures' marks do not fit the pictures.
    """
    turns = _turns(value, what)
    layout = _layout(turns[0])
    if layout is None:
        raise UserError(f"{what} must be a list {_LAYOUT}; its first entry {_described(turns[0])}")
    for number, turn in enumerate(turns, start=1):
        if _layout(turn) != layout:
            raise UserError(f"{what}: entry {number} {_described(turn)}, the first one {_described(turns[0])}")
    pairs = turns if layout == _PAIR else _pairs(turns, layout, n_images, what)
    return tuple(
        Exchange(*(_text(pair.get(who), f"{what}: {who} of exchange {number}") for who in _PAIR))
        for number, pair in enumerate(pairs, start=1)
    )


def _turns(value: Any, what: str) -> list[Any]:
    """The entries of a conversation, at least one, decoded from JSON where they are texts."""
    found = _decoded(value)
    if isinstance(found, Mapping):
        columns = [column for column in found.values() if isinstance(column, list)]
        if columns and len({len(column) for column in columns}) == len({len(found), len(columns)}) == 1:
            found = [dict(zip(found, entry, strict=True)) for entry in zip(*columns, strict=True)]
    if not isinstance(found, Sequence) or isinstance(found, str | bytes) or not found:
        raise UserError(f"{what} must be a list {_LAYOUT}; it {_described(found)}")
    return [_decoded(entry) for entry in found]


def _decoded(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except UserError:
        return value  # refused as a text by what comes next


def _layout(turn: Any) -> tuple[str, str] | None:
    if not isinstance(turn, Mapping):
        return None
    if set(_PAIR) & set(turn):
        return _PAIR
    return next((keys for keys in (_MESSAGE, _SHARE) if set(keys) <= set(turn)), None)


def _described(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"has the keys {', '.join(sorted(map(str, value)))}"
    if isinstance(value, list) and not value:
        return "is empty"
    names = {str: "a text that is not JSON", type(None): "null", int: "a number", float: "a number", list: "a list"}
    return f"is {names.get(type(value), type(value).__name__)}"


def _pairs(turns: list[Any], layout: tuple[str, str], n_images: int, what: str) -> list[dict[str, str]]:
    """Messages as {user, assistant}, without the pictures' marks."""
    who, content = layout
    said: list[str] = []
    system = ""
    for number, turn in enumerate(turns, start=1):
        speaker = _SPEAKERS.get(str(turn[who]))
        if speaker is None:
            raise UserError(f"{what}: message {number} is of {turn[who]!r}; user, assistant and system are read")
        words = _content(turn[content], f"{what}: message {number}")
        if speaker == "system" and number == 1:
            system = words
            continue
        due = ("user", "assistant")[len(said) % 2]
        if speaker != due:
            raise UserError(f"{what}: message {number} is the {speaker}'s where the {due}'s is due")
        said.append(words)
    if len(said) % 2 or not said:
        raise UserError(f"{what}: {'it ends with a question' if said else 'it has no question'}; give its answer")
    said[0] = _unmarked(said, system, n_images, what)
    if system.strip() and said[0].strip():
        said[0] = f"{system}\n\n{said[0]}"
    return [{"user": said[at], "assistant": said[at + 1]} for at in range(0, len(said), 2)]


def _content(content: Any, what: str) -> str:
    """What a message says, with a mark for each picture among its parts."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise UserError(f"{what} is neither a text nor a list of parts; correct it")
    words = ""
    for part in content:
        if not isinstance(part, Mapping):
            raise UserError(f"{what} has a part that is no object; correct it")
        kind = part.get("type")
        if kind == "text":
            words += part.get("text") or ""
        elif kind != "image":
            raise UserError(f"{what} has a part of type {kind!r}; text and image are read")
        elif any(part.get(key) for key in ("image", "path", "url", "base64")):
            raise UserError(f"{what} brings a picture of its own; put it into the list of pictures")
        else:
            words += _MARK
    return words


def _unmarked(said: list[str], system: str, n_images: int, what: str) -> str:
    """The first question without the pictures' marks, which stand before it or after it, or nowhere."""
    first = said[0]
    while first.lstrip().startswith(_MARK):
        first = first.lstrip().removeprefix(_MARK).lstrip()
    while first.rstrip().endswith(_MARK):
        first = first.rstrip().removesuffix(_MARK).rstrip()
    marks = sum(words.count(_MARK) for words in (system, *said))
    if marks and marks != n_images:
        raise UserError(f"{what}: {marks} {_MARK} are written and {n_images} pictures are given; make them equal")
    if any(_MARK in words for words in (system, first, *said[1:])):
        raise UserError(
            f"{what}: {_MARK} within the words or after the first question; pictures are shown before it, so write "
            "them there or leave the line out"
        )
    return first


def drawn(seed: int, number: int, size: int) -> int:
    """Which of `size` examples comes at place `number` of an endless order: each once an epoch, each epoch shuffled."""
    epoch, place = divmod(number, size)
    return int(_shuffled(seed, epoch, size)[place])


@lru_cache(maxsize=4)
def _shuffled(seed: int, epoch: int, size: int) -> np.ndarray:
    return generator(seed, "conversations", epoch).permutation(size)


def chat_batch(scenes: Sequence[Scene], tokenizer, soft_tokens: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """One random question a scene with its answer.

    Returns:
        `input_ids`, `attention_mask`, `token_type_ids` [B, T], `pixel_values` [P, 3, 64, 64] (absent without
        pictures) and
        `loss_mask` [B, T] bool, True at answer tokens.
    """
    packed = pack(scenes, tokenizer, soft_tokens, rng, max_questions=1)
    ids = packed.input_ids
    answers = torch.zeros_like(ids, dtype=torch.bool)
    answers[:, 1:] = (packed.labels != IGNORE)[:, :-1]
    alive = packed.segments >= 0
    batch = {
        "input_ids": ids,
        "attention_mask": alive.long(),
        "token_type_ids": (ids == tokenizer.convert_tokens_to_ids("<image_soft_token>")).long(),
        "loss_mask": answers & alive,
    }
    if len(packed.pixels):
        batch["pixel_values"] = packed.pixels
    return batch


Row = Callable[[], RawSample]
Mark = Any  # JSON


class Reader(Protocol):
    """One pass over a share."""

    @property
    def bad_shards(self) -> int:
        """Corrupt shards, or files of a table, so far."""
        ...

    def __iter__(self) -> Iterator[Row]: ...

    def __next__(self) -> Row: ...

    def mark(self) -> Mark:
        """Where the pass stands; None before the first row."""
        ...

    @property
    def last(self) -> int:
        """The number of the row that was given last, counted through the share."""
        ...


class Source(Protocol):
    """Samples in an order of their own."""

    name: str

    def size(self) -> int | None:
        """How many samples there are; None when only reading tells."""
        ...

    def open(self, share: Share, mark: Mark = None) -> Reader:
        """A pass over `share`, from the beginning or from a mark of a pass over the same share."""
        ...


class Indexed:
    """A source whose sample `i` is `sample(i)`; a share has every total-th, so none reads what another has."""

    def __init__(self, name: str, count: int, sample: Callable[[int], RawSample], bad: int = 0) -> None:
        """`bad` files were left out."""
        self.name, self.count, self.sample, self.bad = name, count, sample, bad

    def size(self) -> int:
        """The number of samples."""
        return self.count

    def open(self, share: Share, mark: Mark = None) -> IndexedReader:
        """A pass; its mark is the number of rows done."""
        reader = IndexedReader(self.sample, share.rows(self.count), mark or 0)
        reader.bad_shards = self.bad
        return reader


class IndexedReader:
    """Goes through some rows of an indexed source."""

    bad_shards = 0

    def __init__(self, sample: Callable[[int], RawSample], rows: range, done: int) -> None:
        self.sample, self.rows, self.done = sample, rows, done

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        if self.done >= len(self.rows):
            raise StopIteration
        self.done += 1
        return partial(self.sample, self.rows[self.done - 1])

    def mark(self) -> int:
        """How many rows are done."""
        return self.done

    @property
    def last(self) -> int:
        """As `Reader.last`."""
        return self.done - 1
