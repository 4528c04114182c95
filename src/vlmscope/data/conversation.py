"""Records of three layouts as conversations, and the order in which they are drawn. Pure functions.

    {"images": [...], "texts": [{"user": "...", "assistant": "..."}, ...]}   the Cauldron's layout; pictures may be none
    {"images": [...], "text": "..."}                                         pictures with their caption
    {"text": "..."}                                                          plain text

Other keys, of a record or of an exchange, are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from vlmscope.core.conversation import CAPTION_REQUEST, Conversation, Document, Exchange, Opener, Sample
from vlmscope.core.errors import UserError
from vlmscope.core.seeds import generator


def check_record(record: Any, origin: str) -> list[str]:
    """Refuse a record of none of the layouts.

    Args:
        record: what JSON gave.
        origin: where it stands, for the message.

    Returns:
        The names of its pictures, in order.

    Raises:
        UserError: with `origin` and what is wrong.
    """
    if not isinstance(record, Mapping):
        raise UserError(f'{origin}: it is not a JSON object; write one such as {{"images": [...], "texts": [...]}}')
    if ("texts" in record) == ("text" in record):
        said = "both texts and text" if "text" in record else "neither texts nor text"
        raise UserError(f"{origin}: it has {said}; give one of them (layouts: docs/bring_your_own.md)")
    images = record.get("images") or []
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise UserError(f'{origin}: images must be a list of paths, such as ["a.png"]; correct it')
    if "text" in record:
        _check_text(record["text"], f"{origin}: text")
        return images
    texts = record["texts"]
    if not isinstance(texts, list) or not texts:
        raise UserError(f'{origin}: texts must be a list such as [{{"user": "...", "assistant": "..."}}]; correct it')
    for number, exchange in enumerate(texts, start=1):
        if not isinstance(exchange, Mapping):
            raise UserError(f"{origin}: exchange {number} of texts is not a JSON object; correct it")
        for speaker in ("user", "assistant"):
            _check_text(exchange.get(speaker), f"{origin}: {speaker} of exchange {number}")
    return images


def _check_text(text: Any, what: str) -> None:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{what} is missing or empty; give a text, or leave the line out")


def sample_of(record: Mapping[str, Any], open_picture: Opener, origin: str = "") -> Sample:
    """A record that `check_record` accepts, with its pictures opened by `open_picture`."""
    images = tuple(open_picture(name) for name in record.get("images") or [])
    if "texts" in record:
        return Conversation(images, tuple(Exchange(e["user"], e["assistant"]) for e in record["texts"]), origin)
    if images:
        return Conversation(images, (Exchange(CAPTION_REQUEST, record["text"]),), origin)
    return Document(record["text"], origin)


def drawn(seed: int, number: int, size: int) -> int:
    """Which of `size` examples comes at place `number` of an endless order: each once an epoch, each epoch shuffled."""
    epoch, place = divmod(number, size)
    return int(_shuffled(seed, epoch, size)[place])


@lru_cache(maxsize=4)
def _shuffled(seed: int, epoch: int, size: int) -> np.ndarray:
    return generator(seed, "conversations", epoch).permutation(size)
