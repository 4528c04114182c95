"""What every source offers: one pass over a share of its samples, and a mark from which the pass goes on.

A row is a function that gives the sample, so that rows can be shuffled before their pictures are read. A mark is plain
JSON; `open(share, mark)` yields exactly the rows that the marked pass had left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

from vlmscope.data.raw import RawSample
from vlmscope.data.share import Share

Row = Callable[[], RawSample]
Mark = Any  # JSON


class Reader(Protocol):
    """One pass over a share."""

    @property
    def bad_shards(self) -> int:
        """Corrupt shards, or files of a table, so far."""
        ...

    def __iter__(self) -> Iterator[Row]: ...

    def __next__(self) -> Row: ...

    def mark(self) -> Mark:
        """Where the pass stands; None before the first row."""
        ...

    @property
    def last(self) -> int:
        """The number of the row that was given last, counted through the share."""
        ...


class Source(Protocol):
    """Samples in an order of their own."""

    name: str

    def size(self) -> int | None:
        """How many samples there are; None when only reading tells."""
        ...

    def open(self, share: Share, mark: Mark = None) -> Reader:
        """A pass over `share`, from the beginning or from a mark of a pass over the same share."""
        ...


class Indexed:
    """A source whose sample `i` is `sample(i)`; a share has every total-th, so none reads what another has."""

    def __init__(self, name: str, count: int, sample: Callable[[int], RawSample], bad: int = 0) -> None:
        """`bad` files were left out."""
        self.name, self.count, self.sample, self.bad = name, count, sample, bad

    def size(self) -> int:
        """The number of samples."""
        return self.count

    def open(self, share: Share, mark: Mark = None) -> IndexedReader:
        """A pass; its mark is the number of rows done."""
        reader = IndexedReader(self.sample, share.rows(self.count), mark or 0)
        reader.bad_shards = self.bad
        return reader


class IndexedReader:
    """Goes through some rows of an indexed source."""

    bad_shards = 0

    def __init__(self, sample: Callable[[int], RawSample], rows: range, done: int) -> None:
        self.sample, self.rows, self.done = sample, rows, done

    def __iter__(self) -> Iterator[Row]:
        return self

    def __next__(self) -> Row:
        if self.done >= len(self.rows):
            raise StopIteration
        self.done += 1
        return partial(self.sample, self.rows[self.done - 1])

    def mark(self) -> int:
        """How many rows are done."""
        return self.done

    @property
    def last(self) -> int:
        """As `Reader.last`."""
        return self.done - 1
