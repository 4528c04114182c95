"""The choice of the strongest and of drawn pairs against plain sorting, and its merging."""

import numpy as np
import pytest

from vlmscope.features.study_tables import (
    NEVER,
    Pairs,
    chosen,
    drawn_first,
    item_hash,
    joined,
    no_pairs,
    strongest_first,
)

F = 7


def _pairs(seed: int, count: int = 400) -> Pairs:
    """Pairs in random order, few different peaks, so that many are equal."""
    rng = np.random.default_rng(seed)
    keys = rng.choice(F * 300, count, replace=False)
    sizes = rng.integers(1, 4, count)
    return Pairs(
        (keys % F).astype(np.int32),
        (keys // F + 300 * seed).astype(np.int64),
        rng.integers(1, 6, count).astype(np.float32),
        rng.integers(0, 50, count).astype(np.int32),
        np.concatenate([[0], np.cumsum(sizes)]),
        rng.integers(0, 50, sizes.sum()).astype(np.uint16),
        rng.integers(1, 256, sizes.sum()).astype(np.uint8),
    )


def _rows(pairs: Pairs) -> set:
    parts = np.split(np.arange(len(pairs.positions)), pairs.starts[1:-1])
    return {
        (f, i, p, q, tuple(pairs.positions[e]), tuple(pairs.levels[e]))
        for f, i, p, q, e in zip(pairs.feature, pairs.item, pairs.peak, pairs.position, parts, strict=True)
    }


@pytest.mark.parametrize(("n", "m"), [(3, 0), (5, 4), (1000, 1000)])
def test_choice_equals_plain_sorting(n: int, m: int) -> None:
    pairs = _pairs(1)
    found = chosen(pairs, F, n, m)
    wanted = set()
    for feature in range(F):
        own = [int(i) for i in np.flatnonzero(pairs.feature == feature)]
        top = sorted(own, key=lambda i: (-pairs.peak[i], pairs.item[i]))
        drawn = sorted(own, key=lambda i: int(item_hash(pairs.item[i : i + 1])[0]))
        wanted |= {*top[:n], *drawn[:m]}
        if len(own) >= n:
            assert found.peak[feature] == pairs.peak[top[n - 1]]
            assert found.item[feature] == pairs.item[top[n - 1]]
        else:
            assert found.peak[feature] == 0
            assert found.item[feature] == NEVER
        if m == 0:
            assert found.hash[feature] == -1
    assert _rows(found.pairs) == _rows(pairs.take(np.array(sorted(wanted))))


def test_merging_parts_is_choosing_among_all() -> None:
    parts = [_pairs(seed) for seed in range(4)]
    whole = chosen(joined(parts), F, 4, 5)
    some = chosen(joined([chosen(joined(parts[:2]), F, 4, 5).pairs, no_pairs()]), F, 4, 5).pairs
    merged = chosen(joined([parts[3], some, chosen(parts[2], F, 4, 5).pairs]), F, 4, 5)
    for name in Pairs.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(merged.pairs, name), getattr(whole.pairs, name))
    np.testing.assert_array_equal(merged.hash, whole.hash)


def test_orders() -> None:
    pairs = _pairs(2)
    by = [(int(pairs.feature[i]), -float(pairs.peak[i]), int(pairs.item[i])) for i in strongest_first(pairs)]
    assert by == sorted(by)
    hashes = item_hash(pairs.item)
    drawn = [(int(pairs.feature[i]), int(hashes[i])) for i in drawn_first(pairs)]
    assert drawn == sorted(drawn)


def test_a_draw_is_fair() -> None:
    """Each tenth of the items gets its tenth of the draws: 1000 of 10,000, 4 standard deviations are 114."""
    hashes = item_hash(np.arange(10_000) * 256)
    drawn = np.argsort(hashes)[:1000]
    counts = np.bincount(drawn // 1000, minlength=10)
    assert abs(counts - 100).max() < 40
    assert len(np.unique(hashes)) == 10_000
