"""Rows of several sources, each once, numbered and cut into batches that several processes share out.

The next row comes from the source that is furthest behind: that with the fewest rows so far, divided by its weight. The
numbers and the batches are those of the whole, so every process goes through all rows, but reads (`Row()`) only those
of its own batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from vlmscope.data.readers import Reader, Row, Source
from vlmscope.data.share import WHOLE, Share


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
