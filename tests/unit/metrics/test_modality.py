"""Rates, not counts, say where a feature belongs; few firings say nothing."""

import numpy as np

from vlmscope.core.records import generator
from vlmscope.metrics.dictionary import modality, wilson_interval


def test_the_index_is_a_share_of_rates() -> None:
    found = modality(np.array([10, 30, 0, 7]), np.array([10, 10, 5, 0]), np.array([20, 40, 5, 7]), 1000, 500)
    # 10 of 1000 against 10 of 500: a third. 30 of 1000 against 10 of 500: 0.03 of 0.05.
    np.testing.assert_allclose(found.index, [1 / 3, 0.6, 0.0, 1.0])
    assert (found.low <= found.index).all() and (found.index <= found.high).all()
    twice = modality(np.array([20, 60, 0, 14]), np.array([10, 10, 5, 0]), np.array([20, 40, 5, 7]), 2000, 500)
    np.testing.assert_allclose(twice.index, found.index)
    swapped = modality(np.array([10, 10, 5, 0]), np.array([10, 30, 0, 7]), np.array([20, 40, 5, 7]), 500, 1000)
    np.testing.assert_allclose(swapped.index, 1 - found.index)
    np.testing.assert_allclose(swapped.low, 1 - found.high, atol=1e-12)


def test_classes() -> None:
    image = np.array([900, 0, 500, 9, 3, 0])
    text = np.array([0, 900, 500, 1, 0, 0])
    inputs = np.array([300, 300, 300, 8, 3, 0])
    found = modality(image, text, inputs, 10_000, 10_000)
    assert found.kind.tolist() == ["image", "text", "both", "unsettled", "rare", "dead"]
    assert np.isnan([found.index[5], found.low[5], found.high[5]]).all()


def test_the_interval_covers_the_truth() -> None:
    """Over many draws of two Poisson counts, the true index lies inside in about 95 %."""
    rng, n_image, n_text, true = generator(0, "modality"), 2000, 700, 0.7
    image = rng.poisson(0.02 * true * n_image, 4000)
    text = rng.poisson(0.02 * (1 - true) * n_text, 4000)
    found = modality(image, text, image + text, n_image, n_text)
    inside = (found.low <= true) & (true <= found.high)
    assert 0.93 < inside.mean() < 0.97


def test_wilson_against_known_numbers() -> None:
    low, high = wilson_interval(np.array([0.0, 0.5, 1.0]), np.array([10, 10, 10]))
    np.testing.assert_allclose(low, [0.0, 0.2366, 0.7225], atol=1e-4)
    np.testing.assert_allclose(high, [0.2775, 0.7634, 1.0], atol=1e-4)
