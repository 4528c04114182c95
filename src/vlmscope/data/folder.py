"""A folder of the user's own data: `train.jsonl`, `val.jsonl` if there is one, and the pictures that they name.

One JSON object a line (layouts: `vlmscope.data.samples`), picture paths relative to the folder. The files are read
through once, to find mistakes before anything long starts and to note where each line begins; a line is read again,
and its pictures opened, when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from vlmscope.core.artifacts import parse_json
from vlmscope.core.errors import UserError
from vlmscope.core.records import Conversation, Document, Sample, check_characters, generator
from vlmscope.data.config import SourceConfig
from vlmscope.data.images import check_image, open_image
from vlmscope.data.samples import RawSample, Source, file_bytes, indexed, record_parts

T = TypeVar("T")


class Line(NamedTuple):
    """Where an example stands: its byte offset and line number (from 1); and how many pictures it has."""

    offset: int
    number: int
    n_images: int


class JsonLines(Sequence[Sample]):
    """The examples of one file, or some of them; the layout of all lines is looked at first.

    With `check` their pictures and characters are too; else bad ones show themselves at their row.
    """

    def __init__(self, path: Path, check: bool = True) -> None:
        self.path = path
        self.lines = list(self._checked(check))
        if not self.lines:
            raise UserError(f"{path} holds no example; write one JSON object a line (docs/bring_your_own.md)")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: Any) -> Any:
        """The example at `index`, its pictures opened; the examples of a slice stay closed."""
        if isinstance(index, slice):
            return self.subset(range(len(self))[index])
        origin = self.origin(index)
        names, exchanges, text = record_parts(self.record(index), origin)
        if not exchanges:
            return Document(text, origin)
        return Conversation(tuple(self._picture(open_image, name, origin) for name in names), exchanges, origin)

    def record(self, index: int) -> dict[str, Any]:
        """The JSON object of an example, of a layout of `vlmscope.data.samples`."""
        with self.path.open("rb") as file:
            file.seek(self.lines[index].offset)
            return _record(file.readline(), self.origin(index))

    def origin(self, index: int) -> str:
        """The file and line of an example, for messages."""
        return f"{self.path} line {self.lines[index].number}"

    def subset(self, rows: Sequence[int]) -> JsonLines:
        """The examples of these rows, in this order."""
        part = JsonLines.__new__(JsonLines)
        part.path, part.lines = self.path, [self.lines[row] for row in rows]
        return part

    def _checked(self, check: bool) -> Iterator[Line]:
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}; check data.path") from error
        offset, seen = 0, set()
        with file, tqdm(desc=f"checking {self.path.name}", unit="line", delay=2.0) as bar:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    origin = f"{self.path} line {number}"
                    names, exchanges, text = record_parts(_record(line, origin), origin)
                    if check:
                        for words in (text, *chain(*exchanges)):
                            check_characters(words, f"{origin}: {words[:30]!r}")
                        for name in set(names) - seen:
                            self._picture(check_image, name, origin)
                        seen.update(names)
                    yield Line(offset, number, len(names))
                offset += len(line)
                bar.update()

    def _picture(self, read: Callable[[Path], T], name: str, origin: str) -> T:
        """What `read` makes of a picture's path; its refusal names the line too."""
        try:
            return read(self.path.parent / name)
        except UserError as error:
            raise UserError(f"{origin}: {error}") from error


def _record(line: bytes, origin: str) -> Any:
    try:
        return parse_json(line.decode("utf-8-sig"))
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{origin}: not UTF-8 text; save the file as UTF-8") from error


def folder_source(name: str, config: SourceConfig, split: str) -> Source:
    """The examples of `<split>.jsonl` as a source; their `facts` of words and whole numbers go along."""
    path = Path(str(config.path)) / f"{split}.jsonl"
    if not path.is_file():
        raise UserError(f"no {path.name} in {path.parent}; data.sources.{name}.path: as docs/bring_your_own.md says")
    lines = JsonLines(path, check=False)

    def sample(row: int) -> RawSample:
        record, origin = lines.record(row), lines.origin(row)
        names, exchanges, text = record_parts(record, origin)
        pictures = tuple(file_bytes(path.parent / image, origin) for image in names)
        given = record.get("facts")
        facts = {k: v for k, v in given.items() if isinstance(v, str | int)} if isinstance(given, dict) else {}
        return RawSample(pictures, exchanges, text, origin, facts)

    return indexed(name, min(len(lines), config.limit or len(lines)), sample)


def load_folder(folder: str | Path, val_share: float, seed: int) -> tuple[JsonLines, JsonLines]:
    """The training and validation examples of a folder.

    Without `val.jsonl`, `val_share` of the training examples is held out, at least one; `seed` says which.
    """
    folder = Path(folder)
    if not (folder / "train.jsonl").is_file():
        raise UserError(f"no train.jsonl in {folder}; data.path must be a folder laid out as in docs/bring_your_own.md")
    train = JsonLines(folder / "train.jsonl")
    if (folder / "val.jsonl").is_file():
        return train, JsonLines(folder / "val.jsonl")
    held_out = max(1, round(val_share * len(train)))
    if held_out >= len(train):
        raise UserError(
            f"{train.path} holds {len(train)} examples, too few to hold {held_out} out for validation; "
            "give more, or a val.jsonl"
        )
    order = generator(seed, "validation").permutation(len(train)).tolist()
    return train.subset(sorted(order[held_out:])), train.subset(sorted(order[:held_out]))
