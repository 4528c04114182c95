"""Prompts from files: many rows for `task.rows`, and named sets for `prompts=`.

Many prompts with their pictures, from a file: the rows of `task=trace task.rows=FILE`.

A CSV file has a head line with the columns `prompt`, `image` (one path, or several separated by `;`; empty for text
alone) and perhaps `id`; a JSONL file has an object with these keys a line, where `image` may be a list too. Paths are
relative to the file's folder. Everything is looked at before anything is returned, so that a mistake in the last row
does not cost the work on the others.

Prompt sets of the case studies: plain records, free of torch, so that Hydra can register them.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmscope.core.artifacts import parse_json, read_text, text_lines
from vlmscope.core.errors import UserError
from vlmscope.data.images import check_image

_KEYS = ("id", "prompt", "image")
_ID = re.compile(r"[\w-][\w.-]{0,99}", re.ASCII)


@dataclass(frozen=True)
class PromptRow:
    """One row: a name that can be a folder's, the prompt, its pictures, and where it stands, for messages."""

    id: str
    prompt: str
    images: tuple[Path, ...]
    origin: str


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: what is wrong, with the file and the row's number."""

    origin: str
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


def read_rows(path: str | Path) -> tuple[list[PromptRow], list[BadRow]]:
    """The rows of a file, good and bad, each in order. Rows count from 1 and the head line of a CSV does not count.

    Raises:
        UserError: the file cannot be read, is neither CSV nor JSONL, lacks a column, or has no row.
    """
    path = Path(path)
    readers = {".csv": _csv_rows, ".jsonl": _json_rows}
    if path.suffix.lower() not in readers:
        raise UserError(f"task.rows={path}: give a .csv or a .jsonl file")
    good: list[PromptRow] = []
    bad: list[BadRow] = []
    seen: dict[str, str] = {}
    for number, record in enumerate(readers[path.suffix.lower()](path), start=1):
        origin = f"{path} row {number}"
        try:
            row = _row(record, number, origin, path.parent)
            if row.id in seen:
                raise UserError(f"id {row.id!r} is that of {seen[row.id]} too; give each row its own")
            seen[row.id] = f"row {number}"
            good.append(row)
        except UserError as error:
            bad.append(BadRow(origin, str(error)))
    if not good and not bad:
        raise UserError(f"{path} has no row; write one (image, prompt) a line")
    return good, bad


def _csv_rows(path: Path) -> Iterator[Any]:
    lines = csv.DictReader(io.StringIO(read_text(path), newline=""))
    names = [name.strip() for name in lines.fieldnames or []]
    if "prompt" not in names or set(names) - set(_KEYS) or len(set(names)) < len(names):
        raise UserError(f"{path} has the columns {', '.join(names) or '(none)'}; give prompt, image and perhaps id")
    lines.fieldnames = names
    try:
        for line in lines:
            if None in line:
                yield UserError("more fields than columns; put a prompt that holds a comma into double quotes")
            else:
                yield {key: value for key, value in line.items() if value}
    except csv.Error as error:
        raise UserError(f"{path} line {lines.line_num}: not valid CSV ({error}); correct it") from error


def _json_rows(path: Path) -> Iterator[Any]:
    for _, line in text_lines(path):
        try:
            yield parse_json(line)
        except UserError as error:
            yield error


def _row(record: Any, number: int, origin: str, folder: Path) -> PromptRow:
    if isinstance(record, UserError):
        raise record
    if not isinstance(record, dict):
        raise UserError('not a JSON object; write {"image": ..., "prompt": ...}')
    if unknown := set(record) - set(_KEYS):
        raise UserError(f"no key {min(unknown)!r}; keys are {', '.join(_KEYS)}")
    prompt = record.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError("no prompt; write one")
    name = record.get("id", f"row_{number:05d}")
    if not isinstance(name, str | int) or not _ID.fullmatch(str(name)):
        raise UserError(f"id {name!r} cannot be a folder's name; use letters, digits, '_', '-' and '.', at most 100")
    images = tuple(folder / image for image in _images(record.get("image")))
    for image in images:
        check_image(image)
    return PromptRow(str(name), prompt, images, origin)


def _images(value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return [part.strip() for part in value.split(";") if part.strip()]
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return value
    raise UserError(f"image {value!r} is neither a path nor a list of paths")


WORDINGS = ("paper", "ours")


@dataclass
class PromptConfig:
    """One prompt of a set.

    Attributes:
        prompt: what the user says; the model's template adds the pictures' placeholders.
        images: in words, the pictures that it needs, in order; none for text alone.
        answer: the word that a right answer has, None where none is expected.
        contrast: the name of the prompt of the same set that it is compared with or patched from.
        wording: whose words these are, `paper` or `ours`.
    """

    prompt: str
    images: list[str] = field(default_factory=list)
    answer: str | None = None
    contrast: str | None = None
    wording: str = "ours"

    def __post_init__(self) -> None:
        if self.wording not in WORDINGS:
            raise UserError(f"prompts: wording {self.wording!r} of {self.prompt!r}; choose {' or '.join(WORDINGS)}")


@dataclass
class PromptSetConfig:
    """The prompts of one case study.

    Attributes:
        source: which case study of the paper (arXiv 2602.20330) it is for, and what is known of it.
        prompts: name -> prompt.
    """

    source: str
    prompts: dict[str, PromptConfig]

    def __post_init__(self) -> None:
        for name, prompt in self.prompts.items():
            if prompt.contrast is not None and (prompt.contrast == name or prompt.contrast not in self.prompts):
                others = ", ".join(other for other in self.prompts if other != name)
                raise UserError(f"prompts.{name}.contrast={prompt.contrast}: no other such prompt; choose {others}")
