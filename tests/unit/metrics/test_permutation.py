"""p-values are never 0, and the correction is Benjamini and Hochberg's."""

import numpy as np
import pytest
from scipy.stats import false_discovery_control

from vlmscope.core.seeds import generator
from vlmscope.metrics.permutation import benjamini_hochberg, permutation_p


def test_p_counts_draws_as_large() -> None:
    null = np.array([[0.0, 5.0], [1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    assert permutation_p(np.array([2.0, 6.0]), null).tolist() == [3 / 5, 1 / 5]


def test_p_is_even_when_nothing_is_there() -> None:
    rng = generator(0, "p")
    found = permutation_p(rng.standard_normal(2000), rng.standard_normal((199, 2000)))
    assert 0.03 < (found <= 0.05).mean() < 0.07 and found.min() > 0


def test_correction_equals_scipys() -> None:
    p = generator(1, "p").random((5, 8)) ** 3
    np.testing.assert_allclose(benjamini_hochberg(p), false_discovery_control(p, axis=None).reshape(5, 8))
    assert benjamini_hochberg(np.array([0.04])) == pytest.approx([0.04])
    assert benjamini_hochberg(np.zeros(0)).shape == (0,)
