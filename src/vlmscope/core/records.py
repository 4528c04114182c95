"""Records shared by all packages: ids of features, parts of pictures, positions, conversations, and random streams.

Ids become strings only at export and on the command line. Image files are opened by `vlmscope.data.images`; how a model
reads a conversation is `vlmscope.models.batching`. Random streams do not depend on the order of use.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from vlmscope.core.errors import UserError

_FEATURE = re.compile(r"L(\d+)/(\d+)", re.ASCII)


class FeatureId(NamedTuple):
    """One latent of one layer's transcoder. Sorts by layer, then index; prints as `L3/512`."""

    layer: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]  # a feature id is never searched with tuple.index

    def __str__(self) -> str:
        return f"L{self.layer}/{self.index}"

    @property
    def cantor(self) -> int:
        """The one number that the field's viewers know a feature by: (l + i)(l + i + 1) / 2 + i."""
        return (self.layer + self.index) * (self.layer + self.index + 1) // 2 + self.index

    @classmethod
    def parse(cls, text: str) -> FeatureId:
        """Read `L3/512` (spaces around it are allowed)."""
        match = _FEATURE.fullmatch(text.strip())
        if match is None:
            raise UserError(f"not a feature id: {text!r}; write it as L<layer>/<index>, for example L3/512")
        return cls(int(match[1]), int(match[2]))


_ORIENTATION = 0x0112  # EXIF
_TOP = 65535  # white in 16 bits


class PatchBox(NamedTuple):
    """The part of a picture that a soft token stands for, as fractions 0..1 of its width and height; y points down."""

    left: float
    top: float
    right: float
    bottom: float

    def pixels(self, width: int, height: int) -> tuple[int, int, int, int]:
        """The box in whole pixels `(left, top, right, bottom)` of a picture of this size.

        A box without area, such as that of a token that ends a row, becomes one pixel wide or high.
        """
        left, top = (
            min(round(start * length), length - 1) for start, length in ((self.left, width), (self.top, height))
        )
        return left, top, max(round(self.right * width), left + 1), max(round(self.bottom * height), top + 1)

    def overlaps(self, other: PatchBox) -> bool:
        """Whether two parts of a picture have an area in common."""
        across = min(self.right, other.right) > max(self.left, other.left)
        return across and min(self.bottom, other.bottom) > max(self.top, other.top)


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture in RGB, upright; one that is RGB and upright already is returned as it is.

    EXIF orientation is applied, grey is repeated, and transparency is laid on white, as the image processors of
    transformers do. 16-bit grey is scaled from 0..65,535 and floating-point grey from 0..1, whatever values occur; a
    picture of which nothing says which value is white is a `UserError`.
    """
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    check_mode(image)
    clear = image.info.get("transparency")
    if image.mode == "F" or image.mode.startswith("I"):
        white = np.asarray(image).astype(np.float32)  # shares of it
        if image.mode != "F":
            if clear is not None:
                white[white == clear] = _TOP
            white /= _TOP
        elif not (white.min() >= 0 and white.max() <= 1):  # NaN too
            raise UserError(
                f"its pixels are floating-point numbers from {white.min():.4g} to {white.max():.4g}, where 0 is black "
                "and 1 is white; scale them to 0..1, or save it with 8 or 16 bits"
            )
        return Image.fromarray(np.rint(white * 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or clear is not None:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def check_mode(image: Image.Image) -> None:
    """Raise a `UserError` when a picture's header does not say which value is white."""
    if image.mode == "I" and image.format != "PPM":  # Pillow scales the files of that family to 16 bits
        raise UserError("its pixels are 32-bit integers, of which none is known to be white; save it with 8 or 16 bits")


ROLES = ("special", "image", "question", "last")  # of a prompt's positions
ANSWER = "answer"  # the role of an answer's positions, appended or generated


@dataclass(frozen=True)
class Places:
    """The positions of a prompt, as far as they can be chosen by."""

    roles: np.ndarray  # [T] strings
    patch_boxes: Sequence[PatchBox | None] = ()  # T, None for text; empty where a batch's pictures differ in shape


@dataclass(frozen=True)
class Positions:
    """Positions by role, or by a part of the picture: the union of both."""

    roles: tuple[str, ...] = ()  # of `ROLES`, or "answer"
    box: PatchBox | None = None  # soft tokens whose own part of the picture overlaps this one, of every picture

    def mask(self, places: Places) -> np.ndarray:
        """`[T]` bool; a box needs the places of soft tokens."""
        chosen = np.isin(places.roles, self.roles)
        if self.box is None:
            return chosen
        if len(places.patch_boxes) != len(chosen):
            raise UserError(
                "positions.box: the pictures have different shapes, so the box has other soft tokens in each; "
                "give pictures of one shape, or positions.roles=[image]"
            )
        inside = [box is not None and box.overlaps(self.box) for box in places.patch_boxes]
        return chosen | np.array(inside, dtype=bool)

    @property
    def generated(self) -> bool:
        """Whether tokens that are generated after the prompt are among them."""
        return ANSWER in self.roles

    def __str__(self) -> str:
        parts = [*self.roles, *(["the box " + " ".join(f"{x:g}" for x in self.box)] if self.box else [])]
        return ", ".join(parts)


CAPTION_REQUEST = "Describe this image in detail."  # what a caption answers, as in the paper (arXiv 2602.20330)


class Exchange(NamedTuple):
    """What the user says and what the assistant answers, both verbatim."""

    user: str
    assistant: str


@dataclass(frozen=True)
class Conversation:
    """Exchanges about pictures, or about none; the pictures come with the first one."""

    images: tuple[Image.Image, ...]  # RGB, in order
    exchanges: tuple[Exchange, ...]  # at least one
    origin: str = ""  # where it came from, for messages, such as "train.jsonl line 12"


@dataclass(frozen=True)
class Document:
    """Plain text without turns; `origin` as in `Conversation`."""

    text: str
    origin: str = ""


def check_characters(text: str, what: str) -> None:
    """Refuse a text with half a surrogate pair, which is no character: no tokenizer takes it, no UTF-8 file holds it.

    JSON can spell one ("\\ud800"), and a byte of the command line that is not UTF-8 becomes one.
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


def derive(seed: int, *keys: str | int) -> int:
    """A 64-bit seed for the stream named by `keys` under `seed`, for libraries that take a plain integer.

    `1` and `"1"`, or `("ab", "c")` and `("a", "bc")`, name different streams.
    """
    digest = hashlib.sha256(str(int(seed)).encode())
    for key in keys:
        kind = b"s" if isinstance(key, str) else b"i"
        text = key.encode() if isinstance(key, str) else str(int(key)).encode()
        digest.update(kind + len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest()[:8], "little")


_DRAWS = 1000  # of one control under one seed, at most


def control_draws(seed: int, count: int) -> range:
    """The numbers of `count` draws of a control under the root seed: 0, 1, 2 .. under seed 0, others under another."""
    return range(seed * _DRAWS, seed * _DRAWS + count)


def generator(seed: int, *keys: str | int) -> np.random.Generator:
    """An independent random generator for each path of keys, for example `generator(0, "train", "planets", 17)`.

    The same seed and keys give the same numbers on every machine and in every process, whatever else was drawn before.
    """
    return np.random.default_rng(derive(seed, *keys))
