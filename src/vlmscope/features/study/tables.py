"""The strongest examples, samples and counts of a layer's features, exact and mergeable.

The strongest items of every feature and a random draw of its items, exactly, in bounded memory.

A *pair* is a feature with an item on which it fires. Kept are the pairs among the n with the largest peaks of their
feature (of equal peaks the earlier item), and those among the m with the smallest hash of the item. Both choices hang
on the set of pairs alone. So the choice among chosen pairs of two parts of the data is the choice among all: parts can
come in any order, be made by several processes, and be merged (`chosen(joined([..]))`).

A bottom-m draw by a hash is a uniform draw without replacement (Broder 1997; Cohen & Kaplan 2007).

Legend: P pairs, E positions of all pairs together, F features.

What one layer's features fire on, gathered from sparse codes while the model runs.

Only active entries are looked at, and of these only the few that can still change what is kept go on to the sorting in
`kept_pairs`: those whose peak exceeds the n-th strongest so far, or whose item is drawn.

Legend: B items, T positions of one, N of all, k slots of the code, F features, V active entries.

The two tables of a layer, features and examples, from the arrays of all parts of a study.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from vlmscope.core.study import BINS, IMAGE, KINDS, LEVELS, LOWEST_OCTAVE, TOP
from vlmscope.features.study.config import StudyConfig
from vlmscope.features.study.items import EXAMPLE_TABLE, FEATURE_TABLE
from vlmscope.transcoders.transcoder import SparseCode

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


UNIT = 2.0**-20  # of sums: whole numbers add up to the same in any order
COUNTS = ("histogram", "sums", "items_fired")  # add up over parts of the data
_FEWEST = 4096  # pairs that wait at least before they are sorted in
_FIRST_BIN = (127 + LOWEST_OCTAVE) << 1  # of a float32's exponent with the first bit of its mantissa


@dataclass(frozen=True)
class Tokens:
    """The positions of some items, one after another; padding is left out.

    Attributes:
        ids: `[B]` int64, the items.
        item: `[N]` int64, which of these each position belongs to.
        position: `[N]` int64, its place in the item.
        kind: `[N]` int64 of `KINDS`.
        ids_there, item_there, kind_there: the same on the codes' device.
        hashes_there: `[B]` int64, of `item_hash`.
    """

    ids: np.ndarray
    item: np.ndarray
    position: np.ndarray
    kind: np.ndarray
    ids_there: Tensor
    item_there: Tensor
    kind_there: Tensor
    hashes_there: Tensor

    @classmethod
    def of(
        cls, ids: np.ndarray, kinds: Sequence[np.ndarray], valid: Sequence[np.ndarray], device: torch.device
    ) -> Tokens:
        """From ids [B], and for each item the kinds [T] of its positions and which of these are valid [T]."""
        item = np.repeat(np.arange(len(ids)), [int(mask.sum()) for mask in valid])
        position = np.concatenate([np.flatnonzero(mask) for mask in valid])
        kind = np.concatenate([one[mask] for one, mask in zip(kinds, valid, strict=True)]).astype(np.int64)
        there = [torch.from_numpy(array).to(device) for array in (ids, item, kind, item_hash(ids))]
        return cls(ids, item, position, kind, there[0], there[1], there[2], there[3])


class LayerStudy:
    """Counts and kept pairs of one layer."""

    def __init__(
        self, n_features: int, n: int, m: int, window: int, device: torch.device, only: Tensor | None = None
    ) -> None:
        """Nothing seen yet.

        Args:
            n_features: F of the transcoder.
            n: strongest items that are kept.
            m: items that are drawn.
            window: text positions around the peak that are kept.
            device: of the codes.
            only: these features alone, `[F']`; all when None. Results are then of F' features, in this order.
        """
        self.n, self.m, self.window = n, m, window
        self.column: Tensor | None = None
        if only is not None:
            self.column = torch.full((n_features,), -1, device=device)
            self.column[only.to(device)] = torch.arange(len(only), device=device)
        self.n_features = n_features if only is None else len(only)
        self.histogram = torch.zeros(self.n_features * len(KINDS) * BINS, dtype=torch.int64, device=device)
        self.sums = torch.zeros(self.n_features, dtype=torch.int64, device=device)  # in UNIT
        self.items_fired = torch.zeros(self.n_features, dtype=torch.int64, device=device)
        self.kept = no_pairs()
        self.waiting: list[Pairs] = []
        self._limits(chosen(self.kept, self.n_features, n, m))

    def state(self) -> dict[str, np.ndarray]:
        """All of it as arrays, after `settle`; all there is to merge, too."""
        self.settle()
        counts = {name: getattr(self, name).numpy(force=True) for name in COUNTS}
        return {**counts, **self.kept.arrays()}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from a state."""
        for name in COUNTS:
            getattr(self, name).copy_(torch.from_numpy(state[name]))
        found = chosen(Pairs.of(state), self.n_features, self.n, self.m)
        self.kept, self.waiting = found.pairs, []
        self._limits(found)

    @torch.no_grad()
    def add(self, code: SparseCode, tokens: Tokens) -> None:
        """Take in the codes [N, k] of some items, each whole."""
        feature, value = code.indices, code.values.float()
        active = value > 0
        if self.column is not None:
            feature = self.column[feature]
            active &= feature >= 0
        pair = tokens.item_there[:, None] * self.n_features + feature
        # Histograms lie feature by feature and kind by kind, without the bin, which the activation gives.
        cell = (feature * len(KINDS) + tokens.kind_there[:, None]) * BINS
        token = torch.arange(len(value), device=value.device)[:, None].expand_as(feature)
        if bool(active.all()):
            feature, value, pair, cell, token = (one.reshape(-1) for one in (feature, value, pair, cell, token))
        else:
            feature, value, pair, cell, token = (one[active] for one in (feature, value, pair, cell, token))
        self._count(feature, value, cell)
        peaks = value.new_zeros(len(tokens.ids) * self.n_features).scatter_reduce_(0, pair, value, "amax")
        wanted = self._wanted(peaks.view(-1, self.n_features), tokens).view(-1)[pair].nonzero().squeeze(1)
        if len(wanted):
            entries = _Entries(*(one[wanted].numpy(force=True) for one in (pair, token, value)))
            self.waiting.append(_pairs(entries, self.n_features, tokens, self.window))
            if sum(map(len, self.waiting)) > max(_FEWEST, len(self.kept) // 4):
                self.settle()

    def settle(self) -> None:
        """Sort in what waits."""
        if self.waiting:
            found = chosen(joined([self.kept, *self.waiting]), self.n_features, self.n, self.m)
            self.kept, self.waiting = found.pairs, []
            self._limits(found)

    def _limits(self, found: Chosen) -> None:
        device = self.histogram.device
        self.least_peak, self.least_item, self.most_hash = (
            torch.from_numpy(one).to(device) for one in (found.peak, found.item, found.hash)
        )
        known = found.item[found.item != NEVER]
        self.last_item = int(known.max()) if len(known) else -1

    def _count(self, feature: Tensor, value: Tensor, cell: Tensor) -> None:
        """Histograms and sums, from active entries [V]."""
        bins = ((value.view(torch.int32) >> 22) - _FIRST_BIN).clamp_(0, BINS - 1)
        self.histogram += torch.bincount(cell + bins, minlength=len(self.histogram))
        units = value.double().div_(UNIT).round_()  # whole numbers below 2^53 add up exactly in float64
        self.sums += torch.bincount(feature, weights=units, minlength=self.n_features).long()

    def _wanted(self, peaks: Tensor, tokens: Tokens) -> Tensor:
        """`[B, F]` bool: pairs that may be kept."""
        fired = peaks > 0
        self.items_fired += fired.sum(0)
        wanted = tokens.hashes_there[:, None] <= self.most_hash
        wanted &= fired
        wanted |= peaks > self.least_peak
        if int(tokens.ids.min()) < self.last_item:  # else all that is kept is earlier, and wins a tie
            wanted |= fired & (peaks == self.least_peak) & (tokens.ids_there[:, None] < self.least_item)
        return wanted


class _Entries(NamedTuple):
    """Active entries [V]: pair `item * F + feature`; token, ascending for each pair; activation."""

    pair: np.ndarray
    token: np.ndarray
    value: np.ndarray


def _pairs(entries: _Entries, n_features: int, tokens: Tokens, window: int) -> Pairs:
    """The pairs that entries belong to, with the positions that are kept of them."""
    order = np.argsort(entries.pair, kind="stable")
    pair, token, value = (one[order] for one in entries)
    first = np.flatnonzero(np.diff(pair, prepend=-1))
    counts = np.diff(np.append(first, len(pair)))
    peak = np.maximum.reduceat(value, first)
    at_peak = np.where(value == np.repeat(peak, counts), token, np.iinfo(np.int64).max)
    top = np.minimum.reduceat(at_peak, first)
    item, feature = np.divmod(pair[first], n_features)
    # Distance in text positions: a picture between the peak and a word has no length.
    text = np.cumsum(tokens.kind != IMAGE)
    near = np.abs(text[token] - text[np.repeat(top, counts)]) <= window
    near |= tokens.kind[token] == IMAGE
    levels = np.clip(np.rint(value * (LEVELS / np.repeat(peak, counts))), 1, LEVELS)
    starts = np.concatenate([[0], np.cumsum(np.add.reduceat(near.astype(np.int64), first))])
    return Pairs(
        feature.astype(np.int32),
        tokens.ids[item],
        peak,
        tokens.position[top].astype(np.int32),
        starts,
        tokens.position[token[near]].astype(np.uint16),
        levels[near].astype(np.uint8),
    )


@dataclass(frozen=True)
class Logits:
    """What features write towards: token ids and logits [F, c] of those raised most and of those lowered most."""

    top_ids: np.ndarray
    top: np.ndarray
    bottom_ids: np.ndarray
    bottom: np.ndarray


@dataclass(frozen=True)
class LayerTables:
    """`features` and `examples` as in `schema`; `items` [I], the ids that examples refer to."""

    features: pa.Table
    examples: pa.Table
    items: np.ndarray


@dataclass(frozen=True)
class Rows:
    """Examples in the order of the table: which pair, its group (0 top, 1 .. quantiles) and its rank there, `[R]`."""

    pair: np.ndarray
    group: np.ndarray
    rank: np.ndarray


def layer_tables(
    states: Sequence[Mapping[str, np.ndarray]],
    n_features: int,
    config: StudyConfig,
    logits: Logits | None,
    token: Callable[[int], str],
) -> LayerTables:
    """Merge the states of a layer's parts (`LayerStudy.state`) and make its tables."""
    merged = [Pairs.of(state) for state in states]
    pairs = chosen(joined(merged), n_features, config.top, config.samples).pairs
    counts = {name: np.sum([state[name] for state in states], axis=0) for name in COUNTS}
    rows, quantiles = example_rows(pairs, n_features, config)
    features = _features(pairs, counts, quantiles, logits, token)
    return LayerTables(features, _examples(pairs, rows), np.unique(pairs.item))


def example_rows(pairs: Pairs, n_features: int, config: StudyConfig) -> tuple[Rows, list[np.ndarray]]:
    """The table's rows, and for each feature the peaks at which the groups after the first begin."""
    order = strongest_first(pairs)
    rank = ranks(pairs.feature[order])
    top, top_rank = order[rank < config.top], rank[rank < config.top]
    draw = drawn_first(pairs)
    drawn = np.zeros(len(pairs), dtype=bool)
    drawn[draw[ranks(pairs.feature[draw]) < config.samples]] = True
    strong = order[drawn[order]]  # by feature, strongest first
    feature = pairs.feature[strong]
    count = np.bincount(feature, minlength=n_features)
    place = ranks(feature)
    group = (count[feature] - 1 - place) * config.quantiles // np.maximum(count[feature], 1)
    rank_in = ranks(feature.astype(np.int64) * config.quantiles + (config.quantiles - 1 - group))
    pair, groups = np.concatenate([top, strong]), np.concatenate([np.zeros_like(top), group + 1])
    all_ranks = np.concatenate([top_rank, rank_in])
    by = np.lexsort((all_ranks, groups, pairs.feature[pair]))
    return Rows(pair[by], groups[by], all_ranks[by]), _quantiles(pairs.peak[strong], count, config.quantiles)


def _quantiles(peaks: np.ndarray, count: np.ndarray, quantiles: int) -> list[np.ndarray]:
    """From sampled peaks by feature, strongest first, and how many each feature has, [F]."""
    ends, part = np.cumsum(count), np.arange(1, quantiles)
    found = []
    for end, n in zip(ends, count, strict=True):
        # Weakest first, group i + 1 begins at number ceil(i n / quantiles).
        begins = np.minimum(-(-part * n // quantiles), n - 1)
        found.append(peaks[end - 1 - begins] if n else peaks[:0])
    return found


def _examples(pairs: Pairs, rows: Rows) -> pa.Table:
    found = pairs.take(rows.pair)
    names = pa.array([TOP, *(f"q{n}" for n in range(1, int(rows.group.max(initial=0)) + 1))])
    starts = pa.array(found.starts.astype(np.int32))
    columns = [
        pa.array(found.feature),
        pa.DictionaryArray.from_arrays(pa.array(rows.group.astype(np.int32)), names).cast(pa.string()),
        pa.array(rows.rank.astype(np.int32)),
        pa.array(found.peak),
        pa.array(found.item),
        pa.array(found.position),
        pa.ListArray.from_arrays(starts, pa.array(found.positions)),
        pa.ListArray.from_arrays(starts, pa.array(found.levels)),
    ]
    return pa.Table.from_arrays(columns, schema=EXAMPLE_TABLE)


def _features(
    pairs: Pairs,
    counts: Mapping[str, np.ndarray],
    quantiles: Sequence[np.ndarray],
    logits: Logits | None,
    token: Callable[[int], str],
) -> pa.Table:
    n_features = len(quantiles)
    histogram = counts["histogram"].reshape(n_features, len(KINDS), BINS)
    fired = histogram.sum(-1)
    largest = np.zeros(n_features, dtype=np.float32)
    np.maximum.at(largest, pairs.feature, pairs.peak)
    starts = pa.array(np.cumsum([0, *map(len, quantiles)]).astype(np.int32))
    values = np.concatenate(quantiles) if quantiles else np.zeros(0, np.float32)
    columns: list[pa.Array] = [
        pa.array(np.arange(n_features, dtype=np.int32)),
        pa.array(counts["items_fired"]),
        *(pa.array(np.ascontiguousarray(fired[:, kind])) for kind in range(len(KINDS))),
        pa.array(counts["sums"] * UNIT),
        pa.array(largest),
        *(_fixed(histogram[:, kind]) for kind in range(len(KINDS))),
        pa.ListArray.from_arrays(starts, pa.array(values.astype(np.float32))),
        *_logit_columns(logits, n_features, token),
    ]
    return pa.Table.from_arrays(columns, schema=FEATURE_TABLE)


def _fixed(numbers: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(numbers).ravel()), BINS)


def _logit_columns(logits: Logits | None, n_features: int, token: Callable[[int], str]) -> list[pa.Array]:
    if logits is None:
        empty = [[] for _ in range(n_features)]
        return [pa.array(empty, FEATURE_TABLE.field(name).type) for name in FEATURE_TABLE.names[-4:]]
    strings = {number: token(number) for number in np.unique([logits.top_ids, logits.bottom_ids]).tolist()}
    columns = []
    for ids, values in ((logits.top_ids, logits.top), (logits.bottom_ids, logits.bottom)):
        starts = pa.array(np.arange(0, ids.size + 1, ids.shape[1], dtype=np.int32))
        words = pa.array([strings[i] for i in ids.ravel().tolist()], pa.string())
        columns.append(pa.ListArray.from_arrays(starts, words))
        columns.append(pa.ListArray.from_arrays(starts, pa.array(values.astype(np.float32).ravel())))
    return columns
