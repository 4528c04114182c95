"""What a layer's features fire on, against loops over dense activations."""

import numpy as np
import pytest
import torch

from vlmscope.core.study import BINS, IMAGE, KINDS, bin_edges
from vlmscope.features.study_tables import COUNTS, UNIT, LayerStudy, Pairs, Tokens, chosen, joined
from vlmscope.transcoders.transcoder import SparseCode

F, ITEMS, T, K, N, M, WINDOW = 12, 30, 9, 4, 3, 5, 2
CPU = torch.device("cpu")


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


def _codes(data, rows) -> tuple[SparseCode, Tokens]:
    indices, values, kinds, valid, _ = data
    there = valid[rows]
    tokens = Tokens(rows * 256, list(kinds[rows]), list(there.numpy()), CPU)
    return SparseCode(indices[rows][there], values[rows][there]), tokens


def _run(data, order, size, only=None) -> LayerStudy:
    study = LayerStudy(F, N, M, WINDOW, CPU, only)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        study.add(*_codes(data, rows))
        if start % 2:
            study.settle()
    return study


def _same(one: dict, other: dict) -> None:
    for name in (*COUNTS, *Pairs.__dataclass_fields__):
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_everything_equals_a_plain_loop(data) -> None:
    dense, kinds = data[-1], data[2]
    study = _run(data, np.arange(ITEMS), 4)
    state = study.state()
    histogram = state["histogram"].reshape(F, len(KINDS), BINS)
    edges = bin_edges()
    for feature in range(F):
        acts = dense[..., feature]
        for kind in range(len(KINDS)):
            wanted, _ = np.histogram(acts[(kinds == kind) & (acts > 0)], edges)
            np.testing.assert_array_equal(histogram[feature, kind], wanted)
        assert state["sums"][feature] * UNIT == pytest.approx(acts.sum(dtype=np.float64), rel=1e-6)
        peaks = acts.max(1)
        assert state["items_fired"][feature] == (peaks > 0).sum()
        top = sorted((i for i in range(ITEMS) if peaks[i] > 0), key=lambda i: (-peaks[i], i))[:N]
        own = np.flatnonzero(state["feature"] == feature)
        kept = {int(state["item"][i]) // 256: i for i in own}
        assert [int(state["item"][i]) // 256 for i in own][:N] == top
        for item, row in kept.items():
            assert state["peak"][row] == peaks[item]
            peak = int(acts[item].argmax())
            assert state["position"][row] == peak
            text = np.cumsum((kinds[item] != IMAGE) & data[3][item].numpy())
            near = [
                t
                for t in range(T)
                if acts[item, t] > 0 and (kinds[item, t] == IMAGE or abs(text[t] - text[peak]) <= WINDOW)
            ]
            entries = slice(state["starts"][row], state["starts"][row + 1])
            assert state["positions"][entries].tolist() == near
            levels = np.clip(np.rint(acts[item, near] / peaks[item] * 255), 1, 255)
            np.testing.assert_array_equal(state["levels"][entries], levels)


@pytest.mark.parametrize("size", [1, 7, ITEMS])
def test_order_and_batches_change_nothing(data, size: int) -> None:
    wanted = _run(data, np.arange(ITEMS), 4).state()
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(ITEMS)
        _same(_run(data, order, size).state(), wanted)


def test_parts_merge_to_the_whole(data) -> None:
    wanted = _run(data, np.arange(ITEMS), 4).state()
    parts = [_run(data, np.arange(ITEMS)[i::3], 4).state() for i in range(3)]
    merged = chosen(joined([Pairs.of(part) for part in parts]), F, N, M).pairs
    counts = {name: np.sum([part[name] for part in parts], axis=0) for name in COUNTS}
    _same({**counts, **vars(merged)}, wanted)


def test_a_loaded_state_goes_on(data) -> None:
    half = _run(data, np.arange(ITEMS // 2), 4).state()
    study = LayerStudy(F, N, M, WINDOW, CPU)
    study.load(half)
    study.add(*_codes(data, np.arange(ITEMS // 2, ITEMS)))
    _same(study.state(), _run(data, np.arange(ITEMS), 4).state())


def test_some_features_alone(data) -> None:
    whole = _run(data, np.arange(ITEMS), 4).state()
    only = torch.tensor([5, 2])
    part = _run(data, np.arange(ITEMS), 4, only).state()
    for column, feature in enumerate(only.tolist()):
        mine, all_ = part["feature"] == column, whole["feature"] == feature
        for name in ("item", "peak", "position"):
            np.testing.assert_array_equal(part[name][mine], whole[name][all_])
    for name in ("sums", "items_fired"):
        np.testing.assert_array_equal(part[name], whole[name][only.numpy()])


def test_few_pairs_wait_once_the_strongest_are_known() -> None:
    """A feature with the same activation in every item: later items never beat the first ones."""
    study = LayerStudy(F, N, 0, WINDOW, CPU)
    kinds = [np.zeros(T, dtype=np.uint8)] * 10
    valid = [np.ones(T, dtype=bool)] * 10
    code = SparseCode(torch.zeros(10 * T, 1, dtype=torch.int64), torch.ones(10 * T, 1))
    study.add(code, Tokens(np.arange(10), kinds, valid, CPU))
    study.settle()
    study.add(code, Tokens(np.arange(10, 20), kinds, valid, CPU))
    assert not study.waiting
    assert study.kept.item.tolist() == [0, 1, 2]
