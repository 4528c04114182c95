"""Where edges are kept, in memory or in anonymous files, and the smallest sets of numbers that reach a share.

Without torch, so that a program that only reads graphs starts quickly.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from vlmscope.core.errors import UserError


class Memory:
    """Arrays in memory."""

    on_disk = False

    def zeros(self, count: int, dtype: DTypeLike) -> np.ndarray:
        """`[count]`."""
        return np.zeros(count, dtype)


class Disk(Memory):
    """Arrays in anonymous files in a folder, mapped into memory: the system reads and drops pages as needed.

    A file disappears with its last array, however the program ends. Its room is reserved when it is made, so that a
    full disk is an error then and not a crash in the middle.
    """

    on_disk = True

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = Path(tempfile.gettempdir()) if folder is None else folder

    def zeros(self, count: int, dtype: DTypeLike) -> np.ndarray:
        """`[count]`, in a file of its own."""
        if count == 0:
            return np.zeros(0, dtype)
        size = count * np.dtype(dtype).itemsize
        try:
            with tempfile.TemporaryFile(dir=self.folder) as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                # The mapping outlives the file's handle.
                return np.asarray(np.memmap(file, dtype=dtype, mode="r+" if file.seek(0, 2) else "w+", shape=(count,)))
        except OSError as error:
            raise UserError(
                f"cannot put {size / 1e9:.2g} GB of edges into {self.folder}: {error.strerror}; choose another "
                "hydra.run.dir, fewer attribution.max_nodes, or more attribution.memory_gb"
            ) from error

    def free_bytes(self) -> int:
        """Room on the folder's disk."""
        return shutil.disk_usage(self.folder).free


MEMORY = Memory()


_BITS = 17  # bits of a float64 that one histogram tells apart
_SORTED = 1 << 17  # most values that are sorted at once

Blocks = Callable[[], Iterator[np.ndarray]]


class Cut(NamedTuple):
    """The end of a smallest set, which holds every value above `value` and the first `ties` of those equal to it."""

    value: float
    ties: int


def smallest_set(values: np.ndarray, share: float) -> np.ndarray:
    """Mask of the fewest `values [n]` (>= 0) whose sum reaches `share` of the total; of equal ones the first."""
    cut = find_cut(lambda: iter([values]), len(values), share)
    mask = values > cut.value
    mask[np.flatnonzero(values == cut.value)[: cut.ties]] = True
    return mask


def cumulative_share(values: np.ndarray) -> np.ndarray:
    """For each of `values [n]` the share of the total that it and all larger values hold; of equal ones the earlier."""
    order = np.argsort(-values, kind="stable")
    sums = np.cumsum(values[order])
    out = np.empty(len(values))
    out[order] = sums / sums[-1] if len(sums) and sums[-1] > 0 else 1.0
    return out


def find_cut(blocks: Blocks, count: int, share: float) -> Cut:
    """The cut of the fewest of `count` values (>= 0, float64) whose sum reaches `share` of the total.

    `blocks` recomputes the values in blocks, in the same order each time. Positive floats are ordered as their bits
    are, so a histogram of sums over the leading bits finds the narrow range that holds the smallest value needed; only
    that range is sorted, or divided again when it still holds too many. Zeros are never needed.
    """
    # A sum of floats may reach the total before its last value.
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
    """The values whose bits agree with `low` above the last `shift`."""
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
        # The bins in use lie close together; `bincount` from 0 would write the whole histogram.
        first, last = int(key.min()), int(key.max()) + 1
        key -= first
        sums[first:last] += np.bincount(key, weights=values)
        counts[first:last] += np.bincount(key)
    return sums, counts
