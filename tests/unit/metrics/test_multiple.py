"""Adjusted p-values: the definition by brute force, and what each correction promises."""

import numpy as np
import pytest
from scipy.stats import false_discovery_control

from vlmscope.core.records import generator
from vlmscope.metrics.causal import benjamini_hochberg


def by_definition(p: np.ndarray) -> np.ndarray:
    """q[i]: the smallest alpha at which the step-up procedure rejects i."""
    m = len(p)
    ranks = np.array([(p <= value).sum() for value in p])
    return np.array([min(1.0, *(p[j] * m / ranks[j] for j in range(m) if p[j] >= p[i])) for i in range(m)])


@pytest.mark.parametrize("seed", range(5))
def test_false_discovery_rate_by_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = rng.random(23).round(1 if seed == 0 else 6)  # seed 0 has ties
    np.testing.assert_allclose(benjamini_hochberg(p), by_definition(p), rtol=1e-12)


def test_shape_order_and_bounds() -> None:
    p = np.array([[0.5, 1.0], [1e-6, 0.2]])
    q = benjamini_hochberg(p)
    assert q.shape == p.shape and (q >= p).all() and (q <= 1).all()
    assert (np.argsort(q.ravel(), kind="stable") == np.argsort(p.ravel(), kind="stable")).all()
    assert benjamini_hochberg(np.empty(0)).shape == (0,)


def test_nothing_is_found_where_nothing_is() -> None:
    """Of 400 families of 50 true nulls, about one in twenty may have a rejection at 0.05; uncorrected nearly all do."""
    p = np.random.default_rng(0).random((400, 50))
    assert np.mean([(benjamini_hochberg(row) < 0.05).any() for row in p]) < 0.08
    assert np.mean((p < 0.05).any(1)) > 0.85


@pytest.mark.parametrize("bad", [-0.1, 1.1, np.nan])
def test_no_p_value(bad: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        benjamini_hochberg(np.array([0.5, bad]))


def test_correction_equals_scipys() -> None:
    p = generator(1, "p").random((5, 8)) ** 3
    np.testing.assert_allclose(benjamini_hochberg(p), false_discovery_control(p, axis=None).reshape(5, 8))
    assert benjamini_hochberg(np.array([0.04])) == pytest.approx([0.04])
    assert benjamini_hochberg(np.zeros(0)).shape == (0,)
