"""Where the features of one layer fire: exact counts, strongest items and a random draw of items, in bounded memory.

A *pair* is a feature with an item on which it fires. Kept are the pairs among the n with the largest peaks of their
feature (of equal peaks the earlier item), and those among the m with the smallest hash of the item, a uniform draw
without replacement (Broder 1997; Cohen & Kaplan 2007). Both choices depend on the set of pairs alone, so parts of the
data can come in any order, be made by several processes, and be merged: `chosen(joined([..]))`.

`LayerStudy` gathers pairs from sparse codes while the model runs. Only the few active entries that can still change
what is kept are sorted: those whose peak exceeds the n-th strongest so far, or whose item is drawn. `layer_tables`
makes the two tables of a layer, features and examples, from the arrays of all parts of a study.

Legend: B items, T positions of one, N of all, k slots of the code, F features, V active entries, P pairs, E positions
of all pairs together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from vlmscope.core.records import PatchBox
from vlmscope.core.study import BINS, IMAGE, KINDS, LEVELS, LOWEST_OCTAVE, TEXT, TOP, item_hash
from vlmscope.features.config import StudyConfig
from vlmscope.features.study_files import EXAMPLE_TABLE, FEATURE_TABLE
from vlmscope.models.loading import VLM
from vlmscope.transcoders.transcoder import SparseCode

NEVER = np.iinfo(np.int64).max
UNIT = 2.0**-20  # of sums: whole numbers add up to the same in any order
COUNTS = ("histogram", "sums", "items_fired")  # add up over parts of the data
_FEWEST = 4096  # pairs that wait at least before they are sorted in
_FIRST_BIN = (127 + LOWEST_OCTAVE) << 1  # of a float32's exponent with the first bit of its mantissa


@dataclass(frozen=True)
class Pairs:
    """Pairs with the positions at which the feature fires."""

    feature: np.ndarray  # `[P]` int32
    item: np.ndarray  # `[P]` int64
    peak: np.ndarray  # `[P]` float32, above 0
    position: np.ndarray  # `[P]` int32, the first at which the peak is reached
    count: np.ndarray  # `[P]` int64, of positions
    positions: np.ndarray  # `[E]` uint16, ascending for each pair
    levels: np.ndarray  # `[E]` uint8

    def __len__(self) -> int:
        return len(self.feature)

    def take(self, rows: np.ndarray) -> Pairs:
        """Some pairs, in the order of `rows`."""
        count, ends = self.count[rows], np.cumsum(self.count)[rows]
        entries = np.repeat(ends - np.cumsum(count), count) + np.arange(count.sum())
        by_pair = (self.feature[rows], self.item[rows], self.peak[rows], self.position[rows])
        return Pairs(*by_pair, count, self.positions[entries], self.levels[entries])

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray]) -> Pairs:
        """From arrays by name, such as those of a file (`vars(pairs)`)."""
        return cls(**{name: arrays[name] for name in cls.__dataclass_fields__})


def no_pairs() -> Pairs:
    """An empty table of pairs."""
    dtypes = (np.int32, np.int64, np.float32, np.int32, np.int64, np.uint16, np.uint8)
    return Pairs(*(np.zeros(0, dtype) for dtype in dtypes))


def joined(parts: Sequence[Pairs]) -> Pairs:
    """All pairs of several parts."""
    return Pairs(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in Pairs.__dataclass_fields__}
    )


def ranks(features: np.ndarray) -> np.ndarray:
    """`[P]`, for features in order: how many of the same one stand before each."""
    first = np.flatnonzero(np.diff(features, prepend=-1))
    return np.arange(len(features)) - np.repeat(first, np.diff(np.append(first, len(features))))


class Chosen(NamedTuple):
    """The pairs that are kept, and what another pair must beat to be kept too."""

    pairs: Pairs  # by feature, strongest first
    peak: np.ndarray  # `[F]` float32, of the n-th strongest; 0 where there are fewer
    item: np.ndarray  # `[F]` int64, its item; `NEVER` where there are fewer
    hash: np.ndarray  # `[F]` int64, that of the m-th drawn; `NEVER` where there are fewer, -1 for m = 0


def chosen(pairs: Pairs, n_features: int, n: int, m: int) -> Chosen:
    """The n strongest and m drawn pairs of each feature, of pairs in any order, each there once."""
    # A positive float's bits grow with it, so that one integer holds feature and peak; of equal peaks the earlier item.
    order = np.lexsort((pairs.item, (pairs.feature.astype(np.int64) << 32) - pairs.peak.view(np.int32)))
    keep = np.zeros(len(pairs), dtype=bool)
    peak, item = np.zeros(n_features, np.float32), np.full(n_features, NEVER)
    rank = ranks(pairs.feature[order])
    keep[order[rank < n]] = True
    last = order[rank == n - 1]
    peak[pairs.feature[last]], item[pairs.feature[last]] = pairs.peak[last], pairs.item[last]
    limit = np.full(n_features, NEVER if m else -1)
    if m:
        draw = np.lexsort((pairs.item, item_hash(pairs.item), pairs.feature))
        rank = ranks(pairs.feature[draw])
        keep[draw[rank < m]] = True
        last = draw[rank == m - 1]
        limit[pairs.feature[last]] = item_hash(pairs.item[last])
    return Chosen(pairs.take(order[keep[order]]), peak, item, limit)


class TowerPositions(NamedTuple):
    """The positions of pictures in a vision tower: picture by picture, row by row, class tokens before their tile."""

    tokens: np.ndarray  # `[T]` int64, of each the number among all tokens of a forward of the tower
    kinds: np.ndarray  # `[T]` uint8, `IMAGE`, or `TEXT` for class tokens
    boxes: list[list[PatchBox]]  # of each picture's patches


def tower_positions(vlm: VLM, tensors: Mapping[str, Tensor], sizes: Sequence[tuple[int, int]]) -> TowerPositions:
    """The positions of the pictures of one prompt, at least one."""
    pictures = [one.tiles for one in vlm.adapter.picture_patches(tensors, sizes, vlm.processor.image_processor)]
    tiles = [tile for picture in pictures for tile in picture]
    kinds = [np.repeat([TEXT, IMAGE], (tile.n_class, len(tile.boxes))) for tile in tiles]
    boxes = [[box for tile in picture for box in tile.boxes] for picture in pictures]
    tokens = np.concatenate([tile.tokens for tile in tiles])
    return TowerPositions(tokens, np.concatenate(kinds).astype(np.uint8), boxes)


class Tokens:
    """The positions of some items, one after another; padding is left out."""

    def __init__(
        self, ids: np.ndarray, kinds: Sequence[np.ndarray], valid: Sequence[np.ndarray], device: torch.device
    ) -> None:
        """From ids [B], and for each item the kinds [T] of its positions and which of these are valid [T]."""
        self.ids = ids
        self.position = np.concatenate([np.flatnonzero(mask) for mask in valid])  # [N], in the item
        self.kind = np.concatenate([row[mask] for row, mask in zip(kinds, valid, strict=True)]).astype(np.int64)
        item = np.repeat(np.arange(len(ids)), [int(mask.sum()) for mask in valid])  # [N], which of `ids`
        # Items, item and kind of each position, and hashes of the items, where the codes are.
        self.on_device = [torch.from_numpy(a).to(device) for a in (ids, item, self.kind, item_hash(ids))]


class LayerStudy:
    """Counts and kept pairs of one layer."""

    def __init__(
        self, n_features: int, n: int, m: int, window: int, device: torch.device, only: Tensor | None = None
    ) -> None:
        """Keep n strongest and m drawn items per feature, with `window` text positions around the peak.

        With `only` [F'] these features alone; results are then of F' features, in this order.
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
        self.waiting: list[Pairs] = []
        self._keep(no_pairs())

    def state(self) -> dict[str, np.ndarray]:
        """The arrays from which a study resumes, and by which its parts are merged; settles first."""
        self.settle()
        return {name: getattr(self, name).numpy(force=True) for name in COUNTS} | vars(self.kept)

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Resume from a state."""
        for name in COUNTS:
            getattr(self, name).copy_(torch.from_numpy(state[name]))
        self._keep(Pairs.of(state))

    @torch.no_grad()
    def add(self, code: SparseCode, tokens: Tokens) -> None:
        """Count the codes [N, k] of whole items, and gather the pairs that may be kept."""
        _, token_item, token_kind, _ = tokens.on_device
        feature, value = code.indices, code.values.float()
        active = value > 0
        if self.column is not None:
            feature = self.column[feature]
            active &= feature >= 0
        pair = token_item[:, None] * self.n_features + feature
        # Histograms lie feature by feature and kind by kind, without the bin, which the activation gives.
        cell = (feature * len(KINDS) + token_kind[:, None]) * BINS
        token = torch.arange(len(value), device=value.device)[:, None].expand_as(feature)
        entries = (feature, value, pair, cell, token)
        if bool(active.all()):  # as in most codes of exactly k features: no mask is needed, which would copy
            feature, value, pair, cell, token = (entry.reshape(-1) for entry in entries)
        else:
            feature, value, pair, cell, token = (entry[active] for entry in entries)
        bins = ((value.view(torch.int32) >> 22) - _FIRST_BIN).clamp_(0, BINS - 1)
        self.histogram += torch.bincount(cell + bins, minlength=len(self.histogram))
        units = value.double().div_(UNIT).round_()  # whole numbers below 2^53 add up exactly in float64
        self.sums += torch.bincount(feature, weights=units, minlength=self.n_features).long()
        peaks = value.new_zeros(len(tokens.ids) * self.n_features).scatter_reduce_(0, pair, value, "amax")
        kept_entries = self._candidates(peaks.view(-1, self.n_features), tokens).view(-1)[pair].nonzero().squeeze(1)
        if len(kept_entries):
            pair, token, value = (entry[kept_entries].numpy(force=True) for entry in (pair, token, value))
            self.waiting.append(self._pairs(pair, token, value, tokens))
            # Sorting in costs as much as all that is kept, so enough must wait.
            if sum(map(len, self.waiting)) > max(_FEWEST, len(self.kept) // 4):
                self.settle()

    def settle(self) -> None:
        """Merge the pairs that wait into those kept."""
        if self.waiting:
            self._keep(joined([self.kept, *self.waiting]))
            self.waiting = []

    def _keep(self, pairs: Pairs) -> None:
        self.kept, *limits = chosen(pairs, self.n_features, self.n, self.m)
        known = limits[1][limits[1] != NEVER]
        self.last_item = int(known.max()) if len(known) else -1
        self.least_peak, self.least_item, self.most_hash = (
            torch.from_numpy(limit).to(self.histogram.device) for limit in limits
        )

    def _candidates(self, peaks: Tensor, tokens: Tokens) -> Tensor:
        """`[B, F]` bool: pairs that may be kept."""
        ids, _, _, hashes = tokens.on_device
        fired = peaks > 0
        self.items_fired += fired.sum(0)
        candidates = hashes[:, None] <= self.most_hash
        candidates &= fired
        candidates |= peaks > self.least_peak
        if int(tokens.ids.min()) < self.last_item:  # else all that is kept is earlier, and wins a tie
            candidates |= fired & (peaks == self.least_peak) & (ids[:, None] < self.least_item)
        return candidates

    def _pairs(self, pair: np.ndarray, token: np.ndarray, value: np.ndarray, tokens: Tokens) -> Pairs:
        """Pairs from entries [V]: `pair` is item * F + feature, `token` ascends for each pair."""
        order = np.argsort(pair, kind="stable")
        pair, token, value = pair[order], token[order], value[order]
        first = np.flatnonzero(np.diff(pair, prepend=-1))
        counts = np.diff(np.append(first, len(pair)))
        peak = np.maximum.reduceat(value, first)
        at_peak = np.where(value == np.repeat(peak, counts), token, NEVER)
        top = np.minimum.reduceat(at_peak, first)
        item, feature = np.divmod(pair[first], self.n_features)
        # Distance in text positions: a picture between the peak and a word has no length.
        text = np.cumsum(tokens.kind != IMAGE)
        near = np.abs(text[token] - text[np.repeat(top, counts)]) <= self.window
        near |= tokens.kind[token] == IMAGE
        levels = np.clip(np.rint(value * (LEVELS / np.repeat(peak, counts))), 1, LEVELS)
        return Pairs(
            feature.astype(np.int32),
            tokens.ids[item],
            peak,
            tokens.position[top].astype(np.int32),
            np.add.reduceat(near.astype(np.int64), first),
            tokens.position[token[near]].astype(np.uint16),
            levels[near].astype(np.uint8),
        )


class Logits(NamedTuple):
    """Ids and logits [F, c] of the tokens that features raise most, and of those that they lower most."""

    top_ids: np.ndarray
    top: np.ndarray
    bottom_ids: np.ndarray
    bottom: np.ndarray


def layer_tables(
    states: Sequence[Mapping[str, np.ndarray]],
    n_features: int,
    config: StudyConfig,
    logits: Logits | None,
    token: Callable[[int], str],
) -> tuple[pa.Table, pa.Table]:
    """`FEATURE_TABLE` and `EXAMPLE_TABLE` of a layer from the states of its parts (`LayerStudy.state`).

    Logits are left out when None; `token` gives the string of a token id.
    """
    counts = {name: np.sum([state[name] for state in states], axis=0) for name in COUNTS}
    pairs, _, _, limit = chosen(joined([Pairs.of(state) for state in states]), n_features, config.top, config.samples)
    rank = ranks(pairs.feature)
    top = np.flatnonzero(rank < config.top)
    drawn = np.flatnonzero(item_hash(pairs.item) <= limit[pairs.feature])  # as strong to weak as all pairs are
    # Drawn ones are cut into groups of equal size by activation: 1 is the weakest; 0 are the strongest of all.
    feature, quantiles = pairs.feature[drawn], config.quantiles
    count = np.bincount(feature, minlength=n_features)
    quantile = (count[feature] - 1 - ranks(feature)) * quantiles // np.maximum(count[feature], 1)
    quantile_rank = ranks(feature.astype(np.int64) * quantiles + (quantiles - 1 - quantile))
    row, group = np.concatenate([top, drawn]), np.concatenate([np.zeros_like(top), quantile + 1])
    rank = np.concatenate([rank[top], quantile_rank])
    order = np.lexsort((rank, group, pairs.feature[row]))
    # Weakest first, group i + 1 begins at number ceil(i n / quantiles) of a feature's n drawn ones.
    begins = np.minimum(-(-np.arange(1, quantiles) * count[:, None] // quantiles), count[:, None] - 1)
    borders = pairs.peak[drawn][(np.cumsum(count)[:, None] - 1 - begins)[count > 0]].ravel()
    features = _feature_table(pairs, counts, _lists(np.where(count > 0, quantiles - 1, 0), borders), logits, token)
    return features, _example_table(pairs.take(row[order]), group[order], rank[order], quantiles)


def _example_table(pairs: Pairs, group: np.ndarray, rank: np.ndarray, quantiles: int) -> pa.Table:
    names = pa.array([TOP, *(f"q{n}" for n in range(1, quantiles + 1))])
    columns = [
        pa.array(pairs.feature),
        pa.DictionaryArray.from_arrays(pa.array(group.astype(np.int32)), names).cast(pa.string()),
        pa.array(rank.astype(np.int32)),
        pa.array(pairs.peak),
        pa.array(pairs.item),
        pa.array(pairs.position),
        _lists(pairs.count, pairs.positions),
        _lists(pairs.count, pairs.levels),
    ]
    return pa.Table.from_arrays(columns, schema=EXAMPLE_TABLE)


def _feature_table(
    pairs: Pairs,
    counts: Mapping[str, np.ndarray],
    borders: pa.Array,
    logits: Logits | None,
    token: Callable[[int], str],
) -> pa.Table:
    n_features = len(borders)
    histogram = counts["histogram"].reshape(n_features, len(KINDS), BINS)
    by_kind = [np.ascontiguousarray(histogram[:, kind]) for kind in range(len(KINDS))]
    largest = np.zeros(n_features, dtype=np.float32)
    np.maximum.at(largest, pairs.feature, pairs.peak)
    columns: list[pa.Array] = [
        pa.array(np.arange(n_features, dtype=np.int32)),
        pa.array(counts["items_fired"]),
        *(pa.array(bins.sum(-1)) for bins in by_kind),
        pa.array(counts["sums"] * UNIT),
        pa.array(largest),
        *(pa.FixedSizeListArray.from_arrays(pa.array(bins.ravel()), BINS) for bins in by_kind),
        borders,
    ]
    if logits is None:
        empty = [[] for _ in range(n_features)]
        columns += [pa.array(empty, FEATURE_TABLE.field(name).type) for name in FEATURE_TABLE.names[-4:]]
    else:
        strings = {number: token(number) for number in np.unique([logits.top_ids, logits.bottom_ids]).tolist()}
        for ids, values in ((logits.top_ids, logits.top), (logits.bottom_ids, logits.bottom)):
            count = np.full(*ids.shape)
            columns.append(_lists(count, [strings[number] for number in ids.ravel().tolist()]))
            columns.append(_lists(count, values.astype(np.float32).ravel()))
    return pa.Table.from_arrays(columns, schema=FEATURE_TABLE)


def _lists(count: np.ndarray, values: np.ndarray | list[str]) -> pa.Array:
    """Lists of `count` values each."""
    starts = np.append(0, np.cumsum(count)).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(starts), pa.array(values))
