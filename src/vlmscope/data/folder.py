"""A folder of the user's own data, and rows of several sources numbered for a study.

A folder of the user's own data: `train.jsonl`, `val.jsonl` if there is one, and the pictures that they name.

One JSON object a line (layouts: `vlmscope.data.samples`), picture paths relative to the folder. The files are read
through once, to find mistakes before anything long starts and to note where each line begins; a line is read again,
and its pictures opened, when it is asked for.

Rows of several sources, each once, numbered and cut into batches that several processes share out.

The next row comes from the source that is furthest behind: that with the fewest rows so far, divided by its weight. The
numbers and the batches are those of the whole, so every process goes through all rows, but reads (`Row()`) only those
of its own batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from vlmscope.core.artifacts import parse_json
from vlmscope.core.errors import UserError
from vlmscope.core.records import Sample, check_characters, generator
from vlmscope.data.images import check_image, open_image
from vlmscope.data.samples import WHOLE, Reader, Row, Share, Source, record_parts, sample_of

T = TypeVar("T")


class Line(NamedTuple):
    """Where an example stands: its byte offset and line number (from 1); and how many pictures it has."""

    offset: int
    number: int
    n_images: int


class JsonLines(Sequence[Sample]):
    """The examples of one file, or some of them; all lines are looked at first.

    `check_words` refuses words that no model can take, too; else they show themselves at their row, as pictures do
    without `check_pictures`.

    Raises:
        UserError: when the file cannot be read, holds no example, or a line is wrong: the message says which.
    """

    def __init__(self, path: Path, check_pictures: bool = True, check_words: bool = True) -> None:
        self.path, self.check_pictures, self.check_words = path, check_pictures, check_words
        self.lines = list(self._checked())
        if not self.lines:
            raise UserError(f"{path} holds no example; write one JSON object a line (docs/bring_your_own.md)")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: Any) -> Any:
        """The example at `index`, its pictures opened; the examples of a slice stay closed."""
        if isinstance(index, slice):
            return self.subset(range(len(self))[index])
        origin = self.origin(index)
        return sample_of(self.record(index), lambda name: self._picture(open_image, name, origin), origin)

    def record(self, index: int) -> dict[str, Any]:
        """The JSON object of an example, of a layout of `vlmscope.data.samples`."""
        with self.path.open("rb") as file:
            file.seek(self.lines[index].offset)
            return _record(file.readline(), self.origin(index))

    def origin(self, index: int) -> str:
        """The file and line of an example, for messages."""
        return self._origin(self.lines[index].number)

    def subset(self, rows: Sequence[int]) -> JsonLines:
        """The examples of these rows, in this order."""
        part = JsonLines.__new__(JsonLines)
        part.path, part.lines = self.path, [self.lines[row] for row in rows]
        return part

    def _checked(self) -> Iterator[Line]:
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}; check data.path") from error
        offset, seen = 0, set()
        with file, tqdm(desc=f"checking {self.path.name}", unit="line", delay=2.0) as bar:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    origin = self._origin(number)
                    names, exchanges, text = record_parts(_record(line, origin), origin)
                    for said in (text, *chain(*exchanges)) if self.check_words else ():
                        check_characters(said, f"{origin}: {said[:30]!r}")
                    for name in set(names) - seen if self.check_pictures else ():
                        self._picture(check_image, name, origin)
                    seen.update(names)
                    yield Line(offset, number, len(names))
                offset += len(line)
                bar.update()

    def _origin(self, number: int) -> str:
        return f"{self.path} line {number}"

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


def load_folder(folder: str | Path, val_share: float, seed: int) -> tuple[JsonLines, JsonLines]:
    """The training and validation examples of a folder.

    Args:
        folder: has `train.jsonl` and perhaps `val.jsonl`.
        val_share: without `val.jsonl`, this share of the training examples is held out, at least one.
        seed: says which.

    Raises:
        UserError: as `JsonLines`, or there are too few examples to hold one out.
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


class NumberedRow(NamedTuple):
    """A row not yet read: its number among all, whose it is, its number there, and how to read it."""

    number: int
    source: str
    source_row: int
    read: Row


class NumberedRows:
    """An iterator of one process's batches."""

    def __init__(
        self,
        sources: Mapping[str, tuple[float, Source]],
        batch_size: int,
        share: Share = WHOLE,
        limit: int | None = None,
    ) -> None:
        """Start at the beginning.

        Args:
            sources: with their weights.
            batch_size: rows of a batch; the last one may have fewer.
            share: batch n is for part n modulo `share.total`.
            limit: rows in all.
        """
        self.sources, self.batch_size, self.share, self.limit = dict(sources), batch_size, share, limit
        self.taken = dict.fromkeys(self.sources, 0)
        self.ended: list[str] = []
        self.readers: dict[str, Reader] = {name: source.open(WHOLE) for name, (_, source) in self.sources.items()}

    def size(self) -> int | None:
        """Rows in all; None when only reading tells."""
        sizes = [source.size() for _, source in self.sources.values()]
        known = None if None in sizes else sum(size for size in sizes if size is not None)
        return min((size for size in (known, self.limit) if size is not None), default=None)

    @property
    def done(self) -> int:
        """Rows gone through, by whichever process they are read."""
        return sum(self.taken.values())

    @property
    def bad_shards(self) -> int:
        """Corrupt files that were left out."""
        return sum(reader.bad_shards for reader in self.readers.values())

    def __iter__(self) -> Iterator[list[NumberedRow]]:
        while True:
            number = self.done // self.batch_size
            batch = self._batch()
            if not batch:
                return
            if number % self.share.total == self.share.index:
                yield batch

    def state(self) -> dict[str, Any]:
        """JSON values, between two batches."""
        marks = {name: reader.mark() if self.taken[name] else None for name, reader in self.readers.items()}
        return {"taken": dict(self.taken), "ended": list(self.ended), "marks": marks}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken, with the same settings."""
        self.taken, self.ended = dict(state["taken"]), list(state["ended"])
        self.readers = {name: source.open(WHOLE, state["marks"][name]) for name, (_, source) in self.sources.items()}

    def _batch(self) -> list[NumberedRow]:
        rows: list[NumberedRow] = []
        while len(rows) < self.batch_size and (self.limit is None or self.done < self.limit):
            alive = [name for name in self.sources if name not in self.ended]
            if not alive:
                break
            name = min(alive, key=lambda one: self.taken[one] / self.sources[one][0])
            read = next(self.readers[name], None)
            if read is None:
                self.ended.append(name)
                continue
            rows.append(NumberedRow(self.done, name, self.readers[name].last, read))
            self.taken[name] += 1
        return rows
