"""The mean layer of a cumulative curve."""

import numpy as np
import pytest

from vlmscope.metrics.decoding import bootstrap_depth, mean_depth


def test_the_depth_is_the_mean_of_the_layers_by_what_they_add() -> None:
    added = np.array([0.1, 0.0, 0.5, 0.2])
    curve = np.cumsum(added)[None]
    assert mean_depth(curve) == pytest.approx((np.arange(4) * added).sum() / added.sum())
    assert mean_depth(np.array([[0, 0, 0, 2.0]])) == 3
    assert mean_depth(np.array([[2.0, 2, 2, 2]])) == 0


def test_differences_are_paired() -> None:
    rng = np.random.default_rng(0)
    curves = np.sort(rng.random((40, 5)), axis=1)
    later = np.concatenate([np.zeros((40, 1)), curves[:, :-1]], 1)
    later[:, -1] = curves[:, -1]
    one = bootstrap_depth(curves)
    assert one.ci_low < one.value < one.ci_high and one.cases == 40
    same = bootstrap_depth(curves, curves)
    assert (same.value, same.ci_low, same.ci_high) == (0, 0, 0)
    assert bootstrap_depth(later, curves).ci_low > 0
