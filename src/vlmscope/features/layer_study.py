"""What one layer's features fire on, gathered from sparse codes while the model runs.

Only active entries are looked at, and of these only the few that can still change what is kept go on to the sorting in
`kept_pairs`: those whose peak exceeds the n-th strongest so far, or whose item is drawn.

Legend: B items, T positions each, k slots of the code, F features, V active entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlmscope.core.study import BINS, IMAGE, KINDS, LEVELS, LOWEST_OCTAVE
from vlmscope.features.kept_pairs import NEVER, Chosen, Pairs, chosen, item_hash, joined, no_pairs
from vlmscope.transcoders.transcoder import SparseCode

UNIT = 2.0**-20  # of sums: whole numbers add up to the same in any order
COUNTS = ("histogram", "sums", "items_fired")  # add up over parts of the data
_FEWEST = 4096  # pairs that wait at least before they are sorted in
_FIRST_BIN = (127 + LOWEST_OCTAVE) << 1  # of a float32's exponent with the first bit of its mantissa


@dataclass(frozen=True)
class Items:
    """Items of one forward.

    Attributes:
        ids: `[B]` int64.
        kinds: `[B, T]` int64 of `KINDS`.
        valid: `[B, T]` bool, False at padding; None when there is none.
        ids_there, kinds_there: the same on the codes' device.
        hashes_there: `[B]` int64, of `item_hash`.
    """

    ids: np.ndarray
    kinds: np.ndarray
    valid: Tensor | None
    ids_there: Tensor
    hashes_there: Tensor
    kinds_there: Tensor

    @classmethod
    def of(cls, ids: np.ndarray, kinds: np.ndarray, valid: Tensor | None, device: torch.device) -> Items:
        """From ids [B] and kinds of positions [B, T]."""
        hashes, kinds = item_hash(ids), kinds.astype(np.int64)
        ids_there, hashes_there, kinds_there = (torch.from_numpy(array).to(device) for array in (ids, hashes, kinds))
        return cls(ids, kinds, valid, ids_there, hashes_there, kinds_there)


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
    def add(self, code: SparseCode, items: Items) -> None:
        """Take in the codes [B, T, k] of some items."""
        size, length, k = code.indices.shape
        values = code.values.float()
        active = values > 0
        if items.valid is not None:
            active &= items.valid.unsqueeze(-1)
        features, kinds = code.indices, items.kinds_there.unsqueeze(-1).expand_as(code.indices)
        if self.column is not None:
            features = self.column[features]
            active &= features >= 0
        item = torch.arange(size, device=values.device).view(-1, 1, 1).expand_as(features)
        position = torch.arange(length, device=values.device).view(1, -1, 1).expand_as(features)
        if bool(active.all()):
            flat = (features, values, kinds, item, position)
            feature, value, kind, item, position = (one.reshape(-1) for one in flat)
        else:
            feature, value, kind, item, position = (one[active] for one in (features, values, kinds, item, position))
        self._count(feature, value, kind)
        pair = item * self.n_features + feature
        peaks = value.new_zeros(size * self.n_features).scatter_reduce_(0, pair, value, "amax")
        wanted = self._wanted(peaks.view(size, self.n_features), items).view(-1)[pair].nonzero().squeeze(1)
        if len(wanted):
            entries = _Entries(*(one[wanted].numpy(force=True) for one in (pair, position, value)))
            self.waiting.append(_pairs(entries, self.n_features, items, self.window))
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

    def _count(self, feature: Tensor, value: Tensor, kind: Tensor) -> None:
        """Histograms and sums, from active entries [V]."""
        bits = (value.view(torch.int32) >> 22).long()
        bins = (bits - _FIRST_BIN).clamp_(0, BINS - 1)
        self.histogram += torch.bincount((feature * len(KINDS) + kind) * BINS + bins, minlength=len(self.histogram))
        units = (value.double() / UNIT).round_()  # whole numbers below 2^53 add up exactly in float64
        self.sums += torch.bincount(feature, weights=units, minlength=self.n_features).long()

    def _wanted(self, peaks: Tensor, items: Items) -> Tensor:
        """`[B, F]` bool: pairs that may be kept."""
        fired = peaks > 0
        self.items_fired += fired.sum(0)
        wanted = peaks > self.least_peak
        if int(items.ids.min()) < self.last_item:  # else all that is kept is earlier, and wins a tie
            wanted |= fired & (peaks == self.least_peak) & (items.ids_there[:, None] < self.least_item)
        return wanted | (fired & (items.hashes_there[:, None] <= self.most_hash))


class _Entries(NamedTuple):
    """Active entries [V]: pair `item * F + feature`; positions of a pair ascend; activations."""

    pair: np.ndarray
    position: np.ndarray
    value: np.ndarray


def _pairs(entries: _Entries, n_features: int, items: Items, window: int) -> Pairs:
    """The pairs that entries belong to, with the positions that are kept of them."""
    order = np.argsort(entries.pair, kind="stable")
    pair, position, value = (one[order] for one in entries)
    first = np.flatnonzero(np.diff(pair, prepend=-1))
    counts = np.diff(np.append(first, len(pair)))
    peak = np.maximum.reduceat(value, first)
    at_peak = np.where(value == np.repeat(peak, counts), position, np.iinfo(np.int64).max)
    top = np.minimum.reduceat(at_peak, first)
    item, feature = np.divmod(pair[first], n_features)
    # Distance in text positions: a picture between the peak and a word has no length.
    text = np.cumsum(items.kinds != IMAGE, axis=1)
    item_of, top_of = np.repeat(item, counts), np.repeat(top, counts)
    near = np.abs(text[item_of, position] - text[item_of, top_of]) <= window
    near |= items.kinds[item_of, position] == IMAGE
    levels = np.clip(np.rint(value * (LEVELS / np.repeat(peak, counts))), 1, LEVELS)
    starts = np.concatenate([[0], np.cumsum(np.add.reduceat(near.astype(np.int64), first))])
    return Pairs(
        feature.astype(np.int32),
        items.ids[item],
        peak,
        top.astype(np.int32),
        starts,
        position[near].astype(np.uint16),
        levels[near].astype(np.uint8),
    )
