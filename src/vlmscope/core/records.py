"""Records shared by all packages: feature ids, parts of pictures, positions, conversations, and random streams.

Ids become strings only at export and on the command line. `vlmscope.data.images` opens picture files;
`vlmscope.models.batching` defines how a model reads a conversation. Random streams do not depend on the order of use.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from vlmscope.core.errors import UserError

# Layer l of the vision tower is layer TOWER + l in ids, graphs and tables: below the layers of the decoder.
TOWER = -1000
_FEATURE = re.compile(r"([LT])(\d+)/(\d+)", re.ASCII)


def layer_name(layer: int) -> str:
    """`L3` of the decoder, `T0` of the vision tower."""
    return f"L{layer}" if layer >= 0 else f"T{layer - TOWER}"


def layer_key(layer: int) -> str:
    """`layer_03` of the decoder, `tower_00` of the vision tower, as in names of files and metrics."""
    return f"layer_{layer:02d}" if layer >= 0 else f"tower_{layer - TOWER:02d}"


class FeatureId(NamedTuple):
    """One latent of one layer's transcoder; sorts by layer, then index; prints as `L3/512`, in the tower `T0/512`."""

    layer: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]  # a feature id is never searched with tuple.index

    def __str__(self) -> str:
        return f"{layer_name(self.layer)}/{self.index}"

    @property
    def cantor(self) -> int:
        """Cantor pairing (l + i)(l + i + 1) / 2 + i, by which circuit viewers identify a feature."""
        return (self.layer + self.index) * (self.layer + self.index + 1) // 2 + self.index

    @classmethod
    def parse(cls, text: str) -> FeatureId:
        """Parse `L3/512`; surrounding spaces are allowed."""
        match = _FEATURE.fullmatch(text.strip())
        if match is None:
            raise UserError(f"not a feature id: {text!r}; write it as L<layer>/<index>, for example L3/512")
        return cls(int(match[2]) + (TOWER if match[1] == "T" else 0), int(match[3]))


_ORIENTATION = 0x0112  # EXIF
_WHITE_16 = 65535  # white in 16 bits


class PatchBox(NamedTuple):
    """The part of a picture that a soft token stands for, as fractions 0..1 of its width and height; y points down."""

    left: float
    top: float
    right: float
    bottom: float

    def pixels(self, width: int, height: int) -> tuple[int, int, int, int]:
        """The box in whole pixels `(left, top, right, bottom)` of a picture of this size, at least one pixel each way.

        Tokens that end a row have boxes without area.
        """
        left, top = (
            min(round(start * length), length - 1) for start, length in ((self.left, width), (self.top, height))
        )
        return left, top, max(round(self.right * width), left + 1), max(round(self.bottom * height), top + 1)

    @property
    def centre(self) -> tuple[float, float]:
        """Its middle, x and y."""
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    def holds(self, x: float, y: float) -> bool:
        """Whether a point lies in it."""
        return self.left <= x < self.right and self.top <= y < self.bottom

    def overlaps(self, other: PatchBox) -> bool:
        """Whether two parts of a picture share an area."""
        across = min(self.right, other.right) > max(self.left, other.left)
        return across and min(self.bottom, other.bottom) > max(self.top, other.top)


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture to upright RGB; an upright RGB picture is returned itself, not as a copy.

    EXIF orientation is applied, grey is repeated, and transparency is composited on white, as the image processors of
    transformers do. 16-bit grey is scaled from 0..65,535 and floating-point grey from 0..1, whatever values occur.

    Raises:
        UserError: the value of white is unknown.
    """
    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    check_mode(image)
    transparent = image.info.get("transparency")
    if image.mode == "F" or image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float32)
        if image.mode != "F":
            if transparent is not None:
                grey[grey == transparent] = _WHITE_16
            grey /= _WHITE_16
        elif not (grey.min() >= 0 and grey.max() <= 1):  # refuses NaN too
            raise UserError(
                f"its pixels are floating-point numbers from {grey.min():.4g} to {grey.max():.4g}, where 0 is black "
                "and 1 is white; scale them to 0..1, or save it with 8 or 16 bits"
            )
        return Image.fromarray(np.rint(grey * 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or transparent is not None:
        rgba = image.convert("RGBA")
        ground = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def check_mode(image: Image.Image) -> None:
    """Raise `UserError` if a picture's header does not define the value of white."""
    if image.mode == "I" and image.format != "PPM":  # Pillow scales PPM files to 16 bits
        raise UserError("its pixels are 32-bit integers, of which none is known to be white; save it with 8 or 16 bits")


ROLES = ("special", "image", "question", "last")  # of a prompt's positions
ANSWER = "answer"  # the role of an answer's positions, appended or generated


@dataclass(frozen=True)
class Places:
    """Properties of a prompt's T positions by which they can be selected."""

    roles: np.ndarray  # [T] strings
    patch_boxes: Sequence[PatchBox | None] = ()  # T, None for text; empty where a batch's pictures differ in shape


@dataclass(frozen=True)
class Positions:
    """A selection of positions: those of some roles and those of a part of the picture."""

    roles: tuple[str, ...] = ()  # of `ROLES`, or "answer"
    box: PatchBox | None = None  # selects the soft tokens of every picture whose patches overlap it

    def mask(self, places: Places) -> np.ndarray:
        """`[T]` bool; a box requires `places.patch_boxes`."""
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
        """Whether tokens generated after the prompt are selected."""
        return ANSWER in self.roles

    def __str__(self) -> str:
        parts = [*self.roles, *(["the box " + " ".join(f"{x:g}" for x in self.box)] if self.box else [])]
        return ", ".join(parts)


CAPTION_REQUEST = "Describe this image in detail."  # the user turn of captions, as in the paper (arXiv 2602.20330)


class Exchange(NamedTuple):
    """A turn of the user and the answer of the assistant, both verbatim."""

    user: str
    assistant: str


@dataclass(frozen=True)
class Conversation:
    """Exchanges about any number of pictures, which come before the first question."""

    images: tuple[Image.Image, ...]  # RGB, in order
    exchanges: tuple[Exchange, ...]  # at least one
    origin: str = ""  # for messages, such as "train.jsonl line 12"


@dataclass(frozen=True)
class Document:
    """Plain text without turns; `origin` as in `Conversation`."""

    text: str
    origin: str = ""


def check_characters(text: str, what: str) -> None:
    """Raise `UserError` for a text with half a surrogate pair, which neither tokenizers nor UTF-8 files can represent.

    JSON can spell one ("\\ud800"), and a byte of the command line that is not UTF-8 becomes one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        start = error.start
        raise UserError(
            f"{what} has {text[start]!r} at character {start + 1}, after {text[max(0, start - 20) : start]!r}, "
            "which is not a valid character; write it in UTF-8"
        ) from error


def normalised(text: str) -> str:
    """A text by which duplicates are found: Unicode's compatibility form, without case, single spaces between words."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


Sample = Conversation | Document


def derive(seed: int, *keys: str | int) -> int:
    """A 64-bit seed of the stream named by `keys` under `seed`, for libraries that take an integer.

    Types and lengths are hashed too, so `1` and `"1"`, or `("ab", "c")` and `("a", "bc")`, name different streams.
    """
    digest = hashlib.sha256(str(int(seed)).encode())
    for key in keys:
        kind = b"s" if isinstance(key, str) else b"i"
        text = key.encode() if isinstance(key, str) else str(int(key)).encode()
        digest.update(kind + len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest()[:8], "little")


_DRAWS = 1000  # maximum number of draws of one control under one seed


def control_draws(seed: int, count: int) -> range:
    """Numbers of `count` draws of a control under the root seed: 0, 1, 2 .. for seed 0, disjoint for other seeds."""
    return range(seed * _DRAWS, seed * _DRAWS + count)


def generator(seed: int, *keys: str | int) -> np.random.Generator:
    """An independent random generator per path of keys, such as `generator(0, "train", "planets", 17)`.

    Equal seeds and keys give equal numbers on every machine and in every process, whatever was drawn before.
    """
    return np.random.default_rng(derive(seed, *keys))
