"""The choice of the strongest and of drawn pairs against plain sorting, and a layer's study against loops."""

import numpy as np
import pytest
import torch

from vlmscope.features.study_tables import (
    COUNTS,
    NEVER,
    LayerStudy,
    Pairs,
    Tokens,
    chosen,
    item_hash,
    joined,
)
from vlmscope.transcoders.transcoder import SparseCode

F, ITEMS, T, K, N, M, WINDOW = 12, 30, 9, 4, 3, 5, 2
CPU = torch.device("cpu")


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
        sizes,
        rng.integers(0, 50, sizes.sum()).astype(np.uint16),
        rng.integers(1, 256, sizes.sum()).astype(np.uint8),
    )


def _rows(pairs: Pairs) -> set:
    parts = np.split(np.arange(len(pairs.positions)), np.cumsum(pairs.count)[:-1])
    return {
        (f, i, p, q, tuple(pairs.positions[e]), tuple(pairs.levels[e]))
        for f, i, p, q, e in zip(pairs.feature, pairs.item, pairs.peak, pairs.position, parts, strict=True)
    }


def _same(one: dict, other: dict) -> None:
    for name in (*COUNTS, *Pairs.__dataclass_fields__):
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


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
        last = (pairs.peak[top[n - 1]], pairs.item[top[n - 1]]) if len(own) >= n else (0, NEVER)
        assert (found.peak[feature], found.item[feature]) == last
        if m == 0:
            assert found.hash[feature] == -1
    assert _rows(found.pairs) == _rows(pairs.take(np.array(sorted(wanted))))


@pytest.fixture(scope="module")
def data():
    """Codes with equal activations (ties) and inactive slots; kinds of positions; a mask."""
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.choice([0, 0.5, 0.75, 1.25, 3, 100], (ITEMS, T, K)).astype(np.float32))
    indices = torch.from_numpy(np.stack([rng.permutation(F)[:K] for _ in range(ITEMS * T)]).reshape(ITEMS, T, K))
    kinds = rng.integers(0, 3, (ITEMS, T)).astype(np.uint8)
    valid = torch.from_numpy(rng.random((ITEMS, T)) < 0.9)
    dense = SparseCode(indices, values * valid[..., None]).dense(F).numpy()
    return indices, values, kinds, valid, dense


def _run(data, order, size, state=None) -> dict[str, np.ndarray]:
    indices, values, kinds, valid, _ = data
    study = LayerStudy(F, N, M, WINDOW, CPU)
    if state is not None:
        study.load(state)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        there = valid[rows]
        tokens = Tokens(rows * 256, list(kinds[rows]), list(there.numpy()), CPU)
        study.add(SparseCode(indices[rows][there], values[rows][there]), tokens)
        if start % 2:
            study.settle()
    return study.state()


def test_order_batches_parts_and_resuming_change_nothing(data) -> None:
    wanted = _run(data, np.arange(ITEMS), 4)
    for seed, size in enumerate((1, 7, ITEMS)):
        _same(_run(data, np.random.default_rng(seed).permutation(ITEMS), size), wanted)
    half = _run(data, np.arange(ITEMS // 2), 4)
    _same(_run(data, np.arange(ITEMS // 2, ITEMS), ITEMS, state=half), wanted)
    parts = [_run(data, np.arange(ITEMS)[i::3], 4) for i in range(3)]
    merged = chosen(joined([Pairs.of(part) for part in parts]), F, N, M).pairs
    _same({name: np.sum([part[name] for part in parts], axis=0) for name in COUNTS} | vars(merged), wanted)
