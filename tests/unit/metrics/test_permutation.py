"""p-values by permutation are never 0."""

import numpy as np

from vlmscope.core.records import generator
from vlmscope.metrics.causal import permutation_p


def test_p_counts_draws_as_large() -> None:
    null = np.array([[0.0, 5.0], [1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    assert permutation_p(np.array([2.0, 6.0]), null).tolist() == [3 / 5, 1 / 5]


def test_p_is_even_when_nothing_is_there() -> None:
    rng = generator(0, "p")
    found = permutation_p(rng.standard_normal(2000), rng.standard_normal((199, 2000)))
    assert 0.03 < (found <= 0.05).mean() < 0.07 and found.min() > 0
