"""Shards that `task=build_data` wrote, read back; a corrupt one is skipped with a warning and a count, up to a limit.

A consumer reads one stretch of the rows, counted over all shards in the order of their names: it opens only the shards
in which its stretch lies, however uneven they are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from vlmscope.core.errors import UserError, is_out_of_memory
from vlmscope.data.orrery.dataset import scene_row
from vlmscope.data.raw import RawSample
from vlmscope.data.readers import Mark, Row
from vlmscope.data.shard_index import read_index
from vlmscope.data.shards import read_samples
from vlmscope.data.share import Share


class ShardSource:
    """The samples of one stream and split."""

    def __init__(self, name: str, folder: Path, stream: str, split: str, limit: int | None, max_bad: int) -> None:
        """Look at the index.

        Args:
            name: the source's name, for messages.
            folder: has `index.json`.
            stream, split: which shards.
            limit: the first so many samples only.
            max_bad: how many corrupt shards a pass may skip.

        Raises:
            UserError: there is no index, no such stream, or it holds no sample.
        """
        index = read_index(folder, f"data.sources.{name}.path")
        entries = index["shards"]
        # Orrery's own shards hold scenes with all their questions.
        self.parse = scene_row if index["meta"].get("dataset") == "orrery" else RawSample.from_shard
        self.name, self.folder, self.limit, self.max_bad = name, folder, limit, max_bad
        self.entries = {
            file: one
            for file, one in sorted(entries.items())
            if one["kind"] == stream and one["split"] == split and one["samples"]
        }
        if not self.entries:
            there = sorted({f"{one['kind']} ({one['split']})" for one in entries.values()})
            raise UserError(
                f"data.sources.{name}: {folder} has no samples of stream {stream!r}, split {split!r}; it has "
                f"{', '.join(there) or 'none'}"
            )

    def size(self) -> int:
        """The number of samples that the index counts."""
        total = sum(one["samples"] for one in self.entries.values())
        return total if self.limit is None else min(total, self.limit)

    def open(self, share: Share, mark: Mark = None) -> ShardReader:
        """A pass; its mark is the next row and the number of bad shards so far."""
        return ShardReader(self, share.stretch(self.size()), mark)


class ShardReader:
    """Goes through a stretch of rows once."""

    def __init__(self, source: ShardSource, stretch: range, mark: Mark) -> None:
        self.source, self.stop = source, stretch.stop
        self.row: int = stretch.start if mark is None else mark["row"]
        self.bad_shards: int = 0 if mark is None else mark["bad"]
        self.files = list(source.entries)
        self.ends = list(accumulate(one["samples"] for one in source.entries.values()))
        self.open_file: Iterator[RawSample] | None = None
        self.end = 0  # row at which the open shard ends

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        while self.row < self.stop:
            number = next(n for n, end in enumerate(self.ends) if end > self.row)
            try:
                if self.open_file is None or self.row >= self.end:
                    self.open_file = self._opened(number)
                    self.end = self.ends[number]
                sample = next(self.open_file)
            # A corrupt tar shows itself as a tar error, as JSON or names that make no sense, or as too few samples.
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                self._skip(number, error)
                continue
            self.row += 1
            return partial(_same, sample)
        raise StopIteration

    def _opened(self, number: int) -> Iterator[RawSample]:
        name = self.files[number]
        entry, path = self.source.entries[name], self.source.folder / name
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise ValueError(f"it has {size:,} bytes, the index says {entry['bytes']:,}")
        before = self.row - (self.ends[number] - entry["samples"])
        return map(self.source.parse, islice(read_samples([path]), before, None))

    def _skip(self, number: int, error: Exception) -> None:
        self.bad_shards += 1
        self.row, self.open_file = self.ends[number], None
        path = self.source.folder / self.files[number]
        reason = (str(error).strip().splitlines() or ["it ends too early"])[0]
        what = f"shard {path} is corrupt ({reason})"
        if self.bad_shards > self.source.max_bad:
            raise UserError(
                f"{what}, number {self.bad_shards}, and data.max_bad_shards={self.source.max_bad}; run task=build_data "
                "again, which mends it, or raise the limit"
            ) from error
        warnings.warn(f"{what}; skipped ({self.bad_shards} of at most {self.source.max_bad})", stacklevel=2)

    def mark(self) -> dict[str, Any]:
        """The next row and the number of bad shards."""
        return {"row": self.row, "bad": self.bad_shards}

    @property
    def last(self) -> int:
        """The row that was given last, among all of the source: those of a corrupt shard count too."""
        return self.row - 1


def _same(sample: RawSample) -> RawSample:
    return sample
