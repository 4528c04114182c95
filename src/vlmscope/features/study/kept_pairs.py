"""The strongest items of every feature and a random draw of its items, exactly, in bounded memory.

A *pair* is a feature with an item on which it fires. Kept are the pairs among the n with the largest peaks of their
feature (of equal peaks the earlier item), and those among the m with the smallest hash of the item. Both choices hang
on the set of pairs alone. So the choice among chosen pairs of two parts of the data is the choice among all: parts can
come in any order, be made by several processes, and be merged (`chosen(joined([..]))`).

A bottom-m draw by a hash is a uniform draw without replacement (Broder 1997; Cohen & Kaplan 2007).

Legend: P pairs, E positions of all pairs together, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Pairs:
    """Pairs with the positions at which the feature fires.

    Attributes:
        feature: `[P]` int32.
        item: `[P]` int64.
        peak: `[P]` float32, above 0.
        position: `[P]` int32, the first at which the peak is reached.
        starts: `[P + 1]` int64, where each pair's positions begin.
        positions: `[E]` uint16, ascending for each pair.
        levels: `[E]` uint8.
    """

    feature: np.ndarray
    item: np.ndarray
    peak: np.ndarray
    position: np.ndarray
    starts: np.ndarray
    positions: np.ndarray
    levels: np.ndarray

    def __len__(self) -> int:
        return len(self.feature)

    def take(self, rows: np.ndarray) -> Pairs:
        """Some pairs, in the order of `rows`."""
        counts = np.diff(self.starts)[rows]
        starts = np.concatenate([[0], np.cumsum(counts)])
        entries = np.repeat(self.starts[rows] - starts[:-1], counts) + np.arange(starts[-1])
        return Pairs(
            self.feature[rows],
            self.item[rows],
            self.peak[rows],
            self.position[rows],
            starts,
            self.positions[entries],
            self.levels[entries],
        )

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name, for a file."""
        return dict(vars(self))

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Pairs:
        """The inverse of `arrays`."""
        return cls(**{name: arrays[name] for name in cls.__dataclass_fields__})


def no_pairs() -> Pairs:
    """Nothing."""
    return Pairs(
        np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.int32),
        np.zeros(1, np.int64), np.zeros(0, np.uint16), np.zeros(0, np.uint8),
    )  # fmt: skip


def joined(parts: Sequence[Pairs]) -> Pairs:
    """All pairs of several parts."""
    offsets = np.cumsum([0, *(len(part.positions) for part in parts)])
    starts = [part.starts[:-1] + offset for part, offset in zip(parts, offsets[:-1], strict=True)]
    names = [name for name in Pairs.__dataclass_fields__ if name != "starts"]
    whole = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return Pairs.of({**whole, "starts": np.concatenate([*starts, offsets[-1:]])})


def item_hash(item: np.ndarray) -> np.ndarray:
    """A well mixed number of 0 .. 2^63 - 1 for each item: [..] int64 -> [..] int64 (splitmix64, Steele et al. 2014)."""
    z = item.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


def strongest_first(pairs: Pairs) -> np.ndarray:
    """`[P]`, the pairs by feature, then from the strongest to the weakest, then by item."""
    # A positive float's bits grow with it, so that one integer holds feature and peak.
    key = (pairs.feature.astype(np.int64) << 32) - pairs.peak.view(np.int32)
    return np.lexsort((pairs.item, key))


def drawn_first(pairs: Pairs) -> np.ndarray:
    """`[P]`, the pairs by feature, then in the order in which they are drawn."""
    return np.lexsort((pairs.item, item_hash(pairs.item), pairs.feature))


def ranks(features: np.ndarray) -> np.ndarray:
    """`[P]`, for features in order: how many of the same one stand before each."""
    first = np.flatnonzero(np.diff(features, prepend=-1))
    return np.arange(len(features)) - np.repeat(first, np.diff(np.append(first, len(features))))


@dataclass(frozen=True)
class Chosen:
    """The pairs that are kept, and what another pair must beat to be kept too.

    Attributes:
        pairs: by feature, strongest first.
        peak: `[F]` float32, of the n-th strongest; 0 where there are fewer.
        item: `[F]` int64, its item; `NEVER` where there are fewer.
        hash: `[F]` int64, that of the m-th drawn; `NEVER` where there are fewer, -1 for m = 0.
    """

    pairs: Pairs
    peak: np.ndarray
    item: np.ndarray
    hash: np.ndarray


def chosen(pairs: Pairs, n_features: int, n: int, m: int) -> Chosen:
    """The n strongest and m drawn pairs of each feature, of pairs in any order, each there once."""
    order = strongest_first(pairs)
    keep = np.zeros(len(pairs), dtype=bool)
    peak, item = np.zeros(n_features, np.float32), np.full(n_features, NEVER)
    rank = ranks(pairs.feature[order])
    keep[order[rank < n]] = True
    last = order[rank == n - 1]
    peak[pairs.feature[last]], item[pairs.feature[last]] = pairs.peak[last], pairs.item[last]
    limit = np.full(n_features, NEVER if m else -1)
    if m:
        draw = drawn_first(pairs)
        rank = ranks(pairs.feature[draw])
        keep[draw[rank < m]] = True
        last = draw[rank == m - 1]
        limit[pairs.feature[last]] = item_hash(pairs.item[last])
    return Chosen(pairs.take(order[keep[order]]), peak, item, limit)
