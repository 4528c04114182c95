"""What one layer's features fire on, gathered from sparse codes while the model runs.

Only active entries are looked at, and of these only the few that can still change what is kept go on to the sorting in
`kept_pairs`: those whose peak exceeds the n-th strongest so far, or whose item is drawn.

Legend: B items, T positions of one, N of all, k slots of the code, F features, V active entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlmscope.core.study import BINS, IMAGE, KINDS, LEVELS, LOWEST_OCTAVE
from vlmscope.features.study.kept_pairs import NEVER, Chosen, Pairs, chosen, item_hash, joined, no_pairs
from vlmscope.transcoders.transcoder import SparseCode

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
