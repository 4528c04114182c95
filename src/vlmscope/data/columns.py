"""Rows of the three table schemas of the paper's data (arXiv 2602.20330) as samples. Pure functions.

    hf_text          {text}                                       SmolLM2-135M-10B
    hf_image_label   {image, label} or {image, caption}           ImageNet-1k, or pictures with captions
    hf_cauldron      {images: [...], texts: [{user, assistant}]}  the Cauldron, raw, and the layouts of `.conversation`

A picture is {"bytes": ..., "path": ...}, as `datasets` stores it undecoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmscope.core.conversation import Exchange
from vlmscope.core.errors import UserError
from vlmscope.core.seeds import derive
from vlmscope.data.conversation import exchanges_of
from vlmscope.data.raw import RawSample, file_bytes, words
from vlmscope.data.source_config import SourceConfig

Parser = Callable[[Mapping[str, Any], str], RawSample]  # (row, origin) -> sample


def columns_of(config: SourceConfig) -> list[str]:
    """The columns that a source reads."""
    if config.kind == "hf_text":
        return [config.text]
    if config.kind == "hf_cauldron":
        return [column for column in (config.images, config.texts) if column is not None]
    return [config.image, config.caption or config.label]


def parser(config: SourceConfig, names: Sequence[str] | None = None) -> Parser:
    """What makes a sample of a row; it raises a `UserError` with the row's origin when the row cannot be used.

    Args:
        config: the source.
        names: class names, when the label column holds their numbers.
    """
    if config.kind == "hf_text":
        return lambda row, origin: RawSample(text=words(row[config.text], f"{origin}: {config.text}"), origin=origin)
    if config.kind == "hf_cauldron":
        return lambda row, origin: _cauldron(config, row, origin)
    return lambda row, origin: _image_label(config, names, row, origin)


def _cauldron(config: SourceConfig, row: Mapping[str, Any], origin: str) -> RawSample:
    pictures = (row[config.images] or []) if config.images is not None else []
    if not isinstance(pictures, list):
        pictures = [pictures]
    exchanges = exchanges_of(row[config.texts], len(pictures), f"{origin}: {config.texts}")
    return RawSample(tuple(picture_bytes(one, origin, config.path) for one in pictures), exchanges, origin=origin)


def _image_label(config: SourceConfig, names: Sequence[str] | None, row: Mapping[str, Any], origin: str) -> RawSample:
    picture = picture_bytes(row[config.image], origin, config.path)
    if config.caption is not None:
        caption = words(row[config.caption], f"{origin}: {config.caption}")
    else:
        template = config.templates[derive(0, "template", origin) % len(config.templates)]
        caption = template.replace("{label}", label_name(row[config.label], names, f"{origin}: {config.label}"))
    return RawSample((picture,), (Exchange(config.request, caption),), origin=origin)


def label_name(label: Any, names: Sequence[str] | None, what: str) -> str:
    """A class by name; of WordNet's synonyms ("tench, Tinca tinca") the first.

    Raises:
        UserError: there is no such class, or a number without names.
    """
    if isinstance(label, str):
        return words(label, what).split(",")[0].strip()
    if names is None:
        raise UserError(f"{what} is {label}, and the data do not name their classes; store a ClassLabel or names")
    if label is None or not 0 <= label < len(names):
        raise UserError(f"{what} is {label}: there is no such class among {len(names)}")
    return str(names[label]).split(",")[0].strip()


def picture_bytes(picture: Any, origin: str, folder: str | None = None) -> bytes:
    """The file of a picture as `datasets` stores it, or its path, which is relative to the data's `folder`.

    Raises:
        UserError: there is none.
    """
    if isinstance(picture, Mapping):
        picture = picture.get("bytes") or picture.get("path")
    if isinstance(picture, str) and picture:
        return file_bytes(Path(folder or ".") / picture, origin)
    if isinstance(picture, bytes) and picture:
        return picture
    raise UserError(f"{origin}: it has no picture")
