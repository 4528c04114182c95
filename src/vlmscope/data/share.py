"""Which part of a stream one consumer reads, when several ranks with several workers each read it together."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Share:
    """Part `index` of `total`: rank r of R with worker w of W reads part r W + w of R W."""

    index: int = 0
    total: int = 1

    @classmethod
    def of(cls, rank: int, ranks: int, worker: int = 0, workers: int = 1) -> Share:
        """The part of one worker of one rank."""
        return cls(rank * workers + worker, ranks * workers)

    def rows(self, size: int) -> range:
        """Its rows of `size`: every `total`-th. Over all parts each row comes once; the parts differ by one at most."""
        return range(self.index, size, self.total)

    def stretch(self, size: int) -> range:
        """Its rows of `size` as one stretch, for files that are read from the front. Each row once, as in `rows`."""
        return range(self.index * size // self.total, (self.index + 1) * size // self.total)


WHOLE = Share()
