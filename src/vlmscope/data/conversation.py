"""Records and table cells as conversations, and the order in which they are drawn. Pure functions.

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
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from vlmscope.core.artifacts import parse_json
from vlmscope.core.conversation import CAPTION_REQUEST, Conversation, Document, Exchange, Opener, Sample
from vlmscope.core.errors import UserError
from vlmscope.core.seeds import generator

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
