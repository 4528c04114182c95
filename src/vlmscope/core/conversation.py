"""What a model is trained or studied on, free of any model: conversations about pictures, and plain text.

Whatever the source (a folder, a stream of shards), its examples become these records; how a model reads them is
`vlmscope.models.conversations`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from vlmscope.core.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

CAPTION_REQUEST = "Describe this image in detail."  # what a caption answers, as in the paper (arXiv 2602.20330)


class Exchange(NamedTuple):
    """What the user says and what the assistant answers, both verbatim."""

    user: str
    assistant: str


@dataclass(frozen=True)
class Conversation:
    """Exchanges about pictures, or about none; the pictures come with the first one.

    Attributes:
        images: RGB pictures in order.
        exchanges: at least one.
        origin: where it came from, for messages, such as "train.jsonl line 12".
    """

    images: tuple[Image, ...]
    exchanges: tuple[Exchange, ...]
    origin: str = ""


@dataclass(frozen=True)
class Document:
    """Plain text without turns; `origin` as in `Conversation`."""

    text: str
    origin: str = ""


def check_characters(text: str, what: str) -> None:
    """Refuse a text with half a surrogate pair, which is no character: no tokenizer takes it, no UTF-8 file holds it.

    JSON can spell one ("\\ud800"), and a byte of the command line that is not UTF-8 becomes one.

    Raises:
        UserError: with `what` and the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = error.start
        raise UserError(
            f"{what} has {text[at]!r} at character {at + 1}, after {text[max(0, at - 20) : at]!r}, which is no "
            "character; write it in UTF-8"
        ) from error


Sample = Conversation | Document
Opener = Callable[[str], "Image"]  # the picture of a name that a record holds
