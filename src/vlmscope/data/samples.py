"""A sample as it is stored, read from records of several layouts, and the passes that sources offer over samples.

Pictures stay the bytes of their files until a model asks for them, so streams are shuffled, hashed and written without
looking inside. A record is a JSON object of one of these forms:

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

Questions about one picture: the picture is encoded once as a shared prefix; each question with its answer is a segment
that attends to the prefix and to itself only, at the positions it would have alone. Every segment is therefore exactly
the single-turn prompt that the model meets in use (tests compare the logits), at a fraction of the cost, and no answer
can be copied from another turn.

Documents: joined end to end, each followed by the end-of-sequence token, and cut every `length` tokens, as in the paper
(arXiv 2602.20330). A sequence is one piece for the model: positions run through, and documents in it see each other.
"""

from __future__ import annotations

import hashlib
import json
import logging
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlmscope.core.artifacts import parse_json
from vlmscope.core.errors import UserError, first_line
from vlmscope.core.records import CAPTION_REQUEST, Conversation, Document, Exchange, Sample, check_characters, generator
from vlmscope.data.images import decode_image, picture_format
from vlmscope.data.orrery.scenes import Scene

_LOG = logging.getLogger(__name__)
MAX_FILE_BYTES = 2**30  # as `tables.MAX_ROW_BYTES`
DIGEST_BYTES = 16  # of SHA-256: among 10^9 samples two differ in it but for a chance of 10^-21


@dataclass(frozen=True)
class RawSample:
    """A conversation about pictures, or plain text, whose `exchanges` are empty.

    `images` are files (JPEG, PNG, WebP ...); `origin` says where it came from; `facts` are what is known of it, by
    name: no model sees them and no shard keeps them. Words that neither a shard nor a model can take are refused.
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
        """The record that a model reads; a damaged picture is a `UserError` that names the sample."""
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
        """The inverse of `to_shard`; of anything else it raises ValueError, KeyError or TypeError."""
        body = json.loads(sample["json"])
        turns = tuple(Exchange(turn["user"], turn["assistant"]) for turn in body.get("texts", ()))
        return cls(tuple(sample[name] for name in body["images"]), turns, body.get("text", ""), body["origin"])


def held_out(sample: RawSample, share: float) -> bool:
    """Whether a sample is kept for validation: decided by its digest, so equal samples fall on the same side."""
    return int.from_bytes(sample.digest()[:6], "big") < share * 2**48


def file_bytes(path: Path, origin: str) -> bytes:
    """The content of a picture's file; a device or a pipe, which may never end, is not read, nor a very large file."""
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


def nonempty(text: Any, what: str) -> str:
    """A text that says something; a `UserError` that names `what` when it does not or is no text."""
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{what} is missing or empty; give a text, or leave the row out")
    return text


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
    """What a JSON object of one of the layouts holds; `origin` is where it stands, for messages."""
    if not isinstance(record, Mapping):
        raise UserError(f'{origin}: it is not a JSON object; write one such as {{"images": [...], "texts": [...]}}')
    given = [key for key in (*CONVERSATIONS, "text") if key in record]
    if len(given) != 1:
        keys = f"neither texts nor text, messages or conversations; its keys are {', '.join(sorted(record))}"
        both = f"both {' and '.join(given[:2])}" if given else keys
        raise UserError(f"{origin}: it has {both}; give one of them (layouts: docs/bring_your_own.md)")
    images, image = record.get("images") or [], record.get("image")
    if image and not images and isinstance(image, str):
        images = [image]
    elif image:
        reason = "it has both images and image" if images else "image must be a path, such as a.png"
        raise UserError(f"{origin}: {reason}; correct it")
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise UserError(f'{origin}: images must be a list of paths, such as ["a.png"]; correct it')
    if given == ["text"]:
        text = nonempty(record["text"], f"{origin}: text")
        return Record(images, (Exchange(CAPTION_REQUEST, text),), "") if images else Record([], (), text)
    return Record(images, exchanges_of(record[given[0]], len(images), f"{origin}: {given[0]}"), "")


def exchanges_of(value: Any, n_images: int, what: str) -> tuple[Exchange, ...]:
    """The exchanges of a conversation in one of the layouts above.

    A system message is put before the first question, with an empty line between, as Gemma's chat template does.

    `value` is what JSON, Arrow or Parquet gave, `what` names it in messages. It is refused when it is of no layout, a
    turn is missing or empty, or the pictures' marks do not fit the `n_images` pictures.
    """
    turns = _turns(value, what)
    layout = _layout(turns[0])
    if layout is None:
        raise UserError(f"{what} must be a list {_LAYOUT}; its first entry {_described(turns[0])}")
    for number, turn in enumerate(turns, start=1):
        if _layout(turn) != layout:
            raise UserError(f"{what}: entry {number} {_described(turn)}, the first one {_described(turns[0])}")
    if layout == _PAIR:
        pairs = [[turn.get(who) for who in _PAIR] for turn in turns]
    else:
        words = _taking_turns(turns, layout, n_images, what)
        pairs = [words[at : at + 2] for at in range(0, len(words), 2)]
    for number, pair in enumerate(pairs, start=1):
        for who, text in zip(_PAIR, pair, strict=True):
            nonempty(text, f"{what}: {who} of exchange {number}")
    return tuple(Exchange(*pair) for pair in pairs)


def _turns(value: Any, what: str) -> list[Any]:
    """The entries of a conversation, at least one, decoded from JSON where they are texts."""
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
        return value  # refused as a text by what comes next


def _layout(turn: Any) -> tuple[str, str] | None:
    if not isinstance(turn, Mapping):
        return None
    if set(_PAIR) & set(turn):
        return _PAIR
    return next((keys for keys in (_MESSAGE, _SHARE) if set(keys) <= set(turn)), None)


def _described(value: Any) -> str:
    return f"has the keys {', '.join(sorted(map(str, value)))}" if isinstance(value, Mapping) else f"is {value!r:.40}"


def _taking_turns(turns: list[Any], layout: tuple[str, str], n_images: int, what: str) -> list[str]:
    """What messages say, question and answer in turn, without the pictures' marks."""
    said: list[str] = []
    system = ""
    for number, turn in enumerate(turns, start=1):
        who, content = (turn[key] for key in layout)
        speaker = _SPEAKERS.get(str(who))
        if speaker is None:
            raise UserError(f"{what}: message {number} is of {who!r}; user, assistant and system are read")
        words = _content(content, f"{what}: message {number}")
        if speaker == "system" and number == 1:
            system = words
            continue
        due = _PAIR[len(said) % 2]
        if speaker != due:
            raise UserError(f"{what}: message {number} is the {speaker}'s where the {due}'s is due")
        said.append(words)
    if len(said) % 2 or not said:
        raise UserError(f"{what}: {'it ends with a question' if said else 'it has no question'}; give its answer")
    marks = sum(words.count(_MARK) for words in (system, *said))
    if marks and marks != n_images:
        raise UserError(f"{what}: {marks} {_MARK} are written and {n_images} pictures are given; make them equal")
    said[0] = _without_marks(said[0])
    if any(_MARK in words for words in (system, *said)):
        raise UserError(
            f"{what}: {_MARK} within the words or after the first question; pictures are shown before it, so write "
            "them there or leave the line out"
        )
    if system.strip() and said[0].strip():
        said[0] = f"{system}\n\n{said[0]}"
    return said


def _without_marks(question: str) -> str:
    """The question without the pictures' marks before and after its words."""
    while question.lstrip().startswith(_MARK):
        question = question.lstrip().removeprefix(_MARK).lstrip()
    while question.rstrip().endswith(_MARK):
        question = question.rstrip().removesuffix(_MARK).rstrip()
    return question


def _content(content: Any, what: str) -> str:
    """What a message says, with a mark for each picture among its parts."""
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
    """Which of `size` examples comes at place `number` of an endless order: each once an epoch, each epoch shuffled."""
    epoch, place = divmod(number, size)
    return int(_shuffled(seed, epoch, size)[place])


@lru_cache(maxsize=4)
def _shuffled(seed: int, epoch: int, size: int) -> np.ndarray:
    return generator(seed, "conversations", epoch).permutation(size)


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
Row = Callable[[], RawSample]  # unread, so that rows can be shuffled before their pictures are read
Mark = Any  # plain JSON


class Reader(Iterator[Row], ABC):
    """One pass over a share of a source. `row` is the number of the next row, counted through the share."""

    bad_shards = 0  # corrupt shards, or files of a table, so far

    def __init__(self, row: int) -> None:
        self.row = row

    @abstractmethod
    def mark(self) -> Mark:
        """Where the pass stands: a pass from this mark yields exactly the rows that this one has left."""


@dataclass(frozen=True)
class Source:
    """Samples in an order of their own.

    `open(share, mark)` begins a pass over a share, or goes on where an earlier one of the same share stood.
    """

    name: str
    size: int | None  # how many samples there are; None when only reading tells
    open: Callable[..., Reader]
    sample: Callable[[int], RawSample] | None = None  # one sample by its number, where rows can be gone to at once


def indexed(name: str, count: int, sample: Callable[[int], RawSample], bad: int = 0) -> Source:
    """A source whose sample `i` is `sample(i)`; a share has every total-th. `bad` files were left out of it."""

    def open_share(share: Share, mark: Mark = None) -> Reader:
        return _IndexedReader(sample, share.rows(count), mark or 0, bad)

    return Source(name, count, open_share, sample)


class _IndexedReader(Reader):
    """Its mark is the number of rows done."""

    def __init__(self, sample: Callable[[int], RawSample], rows: range, done: int, bad: int) -> None:
        super().__init__(done)
        self.sample, self.rows, self.bad_shards = sample, rows, bad

    def __next__(self) -> Row:
        if self.row >= len(self.rows):
            raise StopIteration
        self.row += 1
        return partial(self.sample, self.rows[self.row - 1])

    def mark(self) -> Mark:
        return self.row


class BadFiles:
    """Corrupt shards of a source, or files of a table: left out with a warning, up to a limit."""

    def __init__(self, name: str, most: int, mend: str, before: int = 0) -> None:
        """`most` is `data.max_bad_shards`, `mend` how to get a good copy, `before` how many a resumed pass had."""
        self.name, self.most, self.mend, self.before = name, most, mend, before
        self.files: list[str] = []

    def __len__(self) -> int:
        return self.before + len(self.files)

    def add(self, file: str | Path, error: Exception) -> None:
        """Note a corrupt file; one that a pass meets again counts once. One too many is a `UserError`."""
        if str(file) in self.files:
            return
        self.files.append(str(file))
        what = f"data.sources.{self.name}: {file} is corrupt ({first_line(error)})"
        if len(self) > self.most:
            raise UserError(
                f"{what}, number {len(self)}, and data.max_bad_shards={self.most}; {self.mend}, or raise the limit"
            ) from error
        _LOG.warning("%s; left out (%d of at most %d)", what, len(self), self.most)


IGNORE = -100
SOFT = "<image_soft_token>"


@dataclass(frozen=True)
class PackedBatch:
    """A padded batch of packed scenes. T is the longest sequence, P the number of scenes with a picture."""

    input_ids: Tensor  # [B, T] int64
    position_ids: Tensor  # [B, T] int64, restarting after the prefix for each segment
    segments: Tensor  # [B, T] int64, 0 prefix, 1.. questions, -1 padding
    labels: Tensor  # [B, T] int64, the next token where an answer is to be predicted, else `IGNORE`
    groups: list[list[str]]  # question group ('name', 'sum', ...) of each segment, for each scene
    pixels: Tensor  # [P, 3, 64, 64] float32 in -1..1

    def masks(self, window: int, soft_id: int) -> tuple[Tensor, Tensor]:
        """Boolean attention masks [B, 1, T, T] (True = may attend) of global and of sliding layers."""
        seg, pos = self.segments, self.position_ids
        same = (seg[:, None, :] == 0) | (seg[:, None, :] == seg[:, :, None])
        alive = (seg[:, None, :] >= 0) & (seg[:, :, None] >= 0)
        soft = self.input_ids == soft_id
        order = (pos[:, None, :] <= pos[:, :, None]) | (soft[:, None, :] & soft[:, :, None])
        full = same & alive & order
        # Padding attends to itself, so that no row of the softmax is empty.
        full = full | torch.eye(seg.shape[1], dtype=torch.bool)
        return full[:, None], (full & (pos[:, None, :] > pos[:, :, None] - window))[:, None]


def pack(
    scenes: Sequence[Scene], tokenizer, soft_tokens: int, rng: np.random.Generator, max_questions: int = 6
) -> PackedBatch:
    """Pack scenes, questions in random order, answers followed by `<end_of_turn>`."""
    vocabulary = tokenizer.get_vocab()
    rows, groups = [], []
    for scene in scenes:
        asked = [scene.questions[int(i)] for i in rng.permutation(len(scene.questions))[:max_questions]]
        words = ["<bos>", "<start_of_turn>", "user"]
        if scene.image is not None:
            words += ["<start_of_image>", *[SOFT] * soft_tokens, "<end_of_image>"]
        prefix = len(words)
        positions, segments, labels = list(range(prefix)), [0] * prefix, [IGNORE] * prefix
        for number, question in enumerate(asked, start=1):
            prompt = [*question.question.split(), "<end_of_turn>", "<start_of_turn>", "model"]
            answer = [*question.answer.split(), "<end_of_turn>"]
            segment = prompt + answer[:-1]  # the last token predicts nothing that is scored
            words += segment
            positions += range(prefix, prefix + len(segment))
            segments += [number] * len(segment)
            labels += [IGNORE] * (len(prompt) - 1) + [vocabulary[word] for word in answer]
        rows.append(([vocabulary[word] for word in words], positions, segments, labels))
        groups.append([question.group for question in asked])
    length = max(len(row[0]) for row in rows)
    columns = [np.full((len(rows), length), fill, np.int64) for fill in (vocabulary["<pad>"], 0, -1, IGNORE)]
    for i, row in enumerate(rows):
        for column, values in zip(columns, row, strict=True):
            column[i, : len(values)] = values
    images = [scene.image for scene in scenes if scene.image is not None]
    pixels = to_pixels(np.stack(images)) if images else torch.zeros(0, 3, 64, 64)
    return PackedBatch(*map(torch.from_numpy, columns), groups=groups, pixels=pixels)


def to_pixels(pictures: np.ndarray) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W] in -1..1, what Orrery's image processor gives for 64 x 64 pictures."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).to(torch.float32).div(127.5).sub(1.0)


def chat_batch(scenes: Sequence[Scene], tokenizer, soft_tokens: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """One random question a scene with its answer, in the form of the Hugging Face forward.

    Returns:
        `input_ids`, `attention_mask`, `token_type_ids` [B, T], `pixel_values` [P, 3, 64, 64] (absent without
        pictures) and `loss_mask` [B, T] bool, True at answer tokens.
    """
    batch = pack(scenes, tokenizer, soft_tokens, rng, max_questions=1)
    answers = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    answers[:, 1:] = (batch.labels != IGNORE)[:, :-1]
    alive = batch.segments >= 0
    forward = {
        "input_ids": batch.input_ids,
        "attention_mask": alive.long(),
        "token_type_ids": (batch.input_ids == tokenizer.convert_tokens_to_ids(SOFT)).long(),
        "loss_mask": answers & alive,
    }
    return forward | ({"pixel_values": batch.pixels} if len(batch.pixels) else {})


class TokenPacker:
    """Takes documents, gives sequences; its state is the tokens left over."""

    def __init__(self, eos: int, length: int, bos: int | None = None) -> None:
        """`eos` follows each document, `bos` begins each sequence, for models that expect it."""
        if length < 2:
            raise ValueError(f"a sequence of {length} tokens predicts nothing: it needs at least 2")
        self.eos, self.length, self.head = eos, length, [] if bos is None else [bos]
        self.left: list[int] = []

    def add(self, document: Sequence[int]) -> None:
        """Append a document."""
        self.left += [*document, self.eos]

    def pop(self) -> list[int] | None:
        """A full sequence, if there is one."""
        body = self.length - len(self.head)
        if len(self.left) < body:
            return None
        sequence, self.left = self.head + self.left[:body], self.left[body:]
        return sequence

    def rest(self) -> list[int] | None:
        """What is left at the end of the data, shorter than a full sequence; None when it is nothing."""
        sequence, self.left = self.head + self.left, []
        return sequence if len(sequence) > max(1, len(self.head)) else None
