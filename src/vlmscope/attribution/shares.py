"""The fewest values that hold a share of a sum, without a sort of all of them.

The values come in blocks that can be made again. Positive floats are ordered as their bits are, so a histogram of sums
over the leading bits finds the narrow range in which the last value lies that is needed; only that range is sorted, or
cut up again when it still holds too many. Memory does not grow with the number of values.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

_BITS = 17  # of a float64 that one histogram tells apart
_SORTED = 1 << 17  # at most so many values are sorted

Blocks = Callable[[], Iterator[np.ndarray]]


@dataclass(frozen=True)
class Cut:
    """Where a smallest set ends: it holds every value above `value`, and the first `ties` of those equal to it."""

    value: float
    ties: int


def smallest_set(values: np.ndarray, share: float) -> np.ndarray:
    """Mask of the fewest `values [n]` (>= 0) whose sum reaches `share` of the total; of equals, the first come
    first.
    """
    cut = find_cut(lambda: iter([values]), len(values), share)
    mask = values > cut.value
    mask[np.flatnonzero(values == cut.value)[: cut.ties]] = True
    return mask


def cumulative_share(values: np.ndarray) -> np.ndarray:
    """For each of `values [n]` the share of the total held by it and all before it in descending order."""
    order = np.argsort(-values, kind="stable")
    sums = np.cumsum(values[order])
    out = np.empty(len(values))
    out[order] = sums / sums[-1] if len(sums) and sums[-1] > 0 else 1.0
    return out


def find_cut(blocks: Blocks, count: int, share: float) -> Cut:
    """Where the fewest values end whose sum reaches `share` of the total. Zeros are never needed.

    Args:
        blocks: makes the values (>= 0, float64) anew, in blocks, in the same order each time.
        count: how many there are.
        share: of their sum, in (0, 1].
    """
    # A share of 1 would stop early by rounding.
    if share >= 1.0:
        return Cut(0.0, 0)
    low, shift, above, target = 0, 63, 0.0, None
    while count > _SORTED and shift > 0:
        parent, shift = shift, max(shift - _BITS, 0)
        sums, counts = _histogram(blocks, low, parent, shift)
        target = share * float(sums.sum()) if target is None else target
        from_top = above + np.concatenate([[0.0], np.cumsum(sums[::-1])])
        filled = np.flatnonzero(sums[::-1] > 0)
        if not len(filled):
            return Cut(0.0, 0)
        # Sums in another order may miss the target by rounding: then the lowest filled bin is the last needed.
        back = min(int(np.searchsorted(from_top[1:], target)), int(filled[-1]))
        above, chosen = float(from_top[back]), len(sums) - 1 - back
        low, count = low + (chosen << shift), int(counts[chosen])
    if shift == 0:
        value = float(np.array(low, dtype=np.int64).view(np.float64))
        assert target is not None
        return Cut(value, min(count, max(1, int(np.ceil((target - above) / value)))))
    rest = -np.sort(-np.concatenate([_within(values, low, shift) for values in blocks()] or [np.empty(0)]))
    rest = rest[rest > 0]
    if not len(rest):
        return Cut(0.0, 0)
    reached = above + np.cumsum(rest)
    goal = share * float(reached[-1]) if target is None else target
    last = min(int(np.searchsorted(reached, goal)), len(rest) - 1)
    return Cut(float(rest[last]), last + 1 - int(np.searchsorted(-rest, -rest[last])))


def _within(values: np.ndarray, low: int, shift: int) -> np.ndarray:
    """The values whose bits begin as `low` does, above the last `shift`."""
    if shift == 63:
        return values
    return values[values.view(np.int64) >> shift == low >> shift]


def _histogram(blocks: Blocks, low: int, parent: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums and numbers of the values in the range `(low, parent)`, by their bits between `parent` and `shift`."""
    bins = 1 << (parent - shift)
    sums, counts = np.zeros(bins), np.zeros(bins, dtype=np.int64)
    for block in blocks():
        values = _within(block, low, parent)
        values = values[values > 0]
        if not len(values):
            continue
        key = (values.view(np.int64) >> shift) - (low >> shift)
        # The bins in use lie close together; the rest of the histogram need not be touched.
        first, last = int(key.min()), int(key.max()) + 1
        key -= first
        sums[first:last] += np.bincount(key, weights=values)
        counts[first:last] += np.bincount(key)
    return sums, counts
