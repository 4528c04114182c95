"""The linear score equals the sum over pairs, and keeps what it must."""

import numpy as np
import pytest
from scipy import sparse

from vlmscope.core.records import generator
from vlmscope.metrics.dictionary import monosemanticity, unit_embeddings

N, D, F = 40, 7, 12


def pairwise(embeddings: np.ndarray, activations: np.ndarray) -> float:
    """The definition, quadratic in the number of pictures."""
    top = bottom = 0.0
    for i in range(len(embeddings)):
        for j in range(len(embeddings)):
            if i != j:
                weight = activations[i] * activations[j]
                top += weight * float(embeddings[i] @ embeddings[j])
                bottom += weight
    return top / bottom if bottom else float("nan")


@pytest.fixture
def case() -> tuple[np.ndarray, np.ndarray]:
    rng = generator(0, "mono")
    activations = rng.random((N, F)) * (rng.random((N, F)) < 0.4)
    return unit_embeddings(rng.standard_normal((N, D)) + 1.0), activations


def test_the_linear_form_is_the_mean_over_pairs(case: tuple[np.ndarray, np.ndarray]) -> None:
    embeddings, activations = case
    wanted = [pairwise(embeddings, column) for column in activations.T]
    assert np.ptp(wanted) > 0.05
    np.testing.assert_allclose(monosemanticity(embeddings, activations), wanted, rtol=0, atol=1e-12)
    np.testing.assert_allclose(monosemanticity(embeddings, sparse.csr_array(activations)), wanted, rtol=0, atol=1e-12)


def test_scale_order_rotation_and_silent_pictures_change_nothing(case: tuple[np.ndarray, np.ndarray]) -> None:
    embeddings, activations = case
    rng, wanted = generator(1, "mono"), monosemanticity(*case)
    turn, _ = np.linalg.qr(rng.standard_normal((D, D)))
    order = rng.permutation(N)
    more = np.vstack([embeddings, unit_embeddings(rng.standard_normal((9, D)))])
    for changed in (
        monosemanticity(embeddings, activations * np.exp(rng.standard_normal(F))),
        monosemanticity(embeddings[order], activations[order]),
        monosemanticity(embeddings @ turn, activations),
        monosemanticity(more, np.vstack([activations, np.zeros((9, F))])),
    ):
        np.testing.assert_allclose(changed, wanted, atol=1e-12)
    assert abs(monosemanticity(embeddings[order], activations) - wanted).max() > 0.01
