"""What a model is trained or studied on, free of any model: conversations about pictures, and plain text.

Whatever the source (a folder, a stream of shards), its examples become these records; how a model reads them is
`vlmscope.models.conversations`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

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


Sample = Conversation | Document
Opener = Callable[[str], "Image"]  # the picture of a name that a record holds
