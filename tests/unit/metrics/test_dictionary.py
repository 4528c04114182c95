"""Measures of a dictionary against their definitions, hand-made figures and planted cases."""

import numpy as np
import pytest
import torch
from scipy import sparse

from vlmscope.core.records import generator
from vlmscope.metrics.dictionary import (
    FvuAccumulator,
    TokenFvuAccumulator,
    dead_fraction,
    duplicated_fraction,
    firing_counts,
    fvu,
    modality,
    monosemanticity,
    nearest_cosines,
    unit_embeddings,
)
from vlmscope.metrics.rates import wilson_interval

N, D, F = 40, 7, 12


def test_fvu_of_hand_made_numbers() -> None:
    y = torch.tensor([[0.0, 0.0], [2.0, 0.0], [4.0, 0.0]])  # deviations from the mean (2, 0): 4 + 0 + 4
    assert float(fvu(y, y)) == 0.0
    assert float(fvu(y, y.mean(0).expand_as(y))) == 1.0
    assert float(fvu(y, y + torch.tensor([0.0, 1.0]))) == pytest.approx(3 / 8)


@pytest.mark.parametrize("sizes", [(50,), (1, 1, 48), (20, 0, 30)])
def test_streaming_fvu_equals_the_whole(sizes: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    # The mean drifts and is far from zero, where a naive sum of squares would lose digits.
    y = torch.randn(50, 3, generator=g, dtype=torch.float64) + torch.arange(50)[:, None] * 0.1 + 1e4
    y_hat = y + 0.3 * torch.randn(50, 3, generator=g, dtype=torch.float64)
    stream = FvuAccumulator()
    for part, part_hat in zip(y.split(list(sizes)), y_hat.split(list(sizes)), strict=True):
        stream.update(part, part_hat)
    assert stream.count == 50
    assert stream.compute() == pytest.approx(float(fvu(y, y_hat)), rel=1e-10)


def fvu_about_tokens(tokens: torch.Tensor, y: torch.Tensor, y_hat: torch.Tensor) -> float:
    """The definition, written out."""
    residual, deviations = 0.0, 0.0
    for token in tokens.unique():
        own = y[tokens == token]
        if len(own) > 1:
            residual += float((own - y_hat[tokens == token]).square().sum())
            deviations += float((own - own.mean(0)).square().sum())
    return residual / deviations


@pytest.mark.parametrize("sizes", [(60,), (1, 1, 58), (20, 0, 40), (7,) * 8 + (4,)])
def test_streaming_fvu_about_each_tokens_mean_equals_the_definition(sizes: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 9, (60,), generator=g)
    tokens[33] = 70  # seen once, so that it has nothing to vary about
    means = 1e4 * torch.randn(71, 3, generator=g, dtype=torch.float64)
    y = means[tokens] + torch.randn(60, 3, generator=g, dtype=torch.float64)
    y_hat = y + 0.3 * torch.randn(60, 3, generator=g, dtype=torch.float64)
    y_hat[33] += 50.0
    stream = TokenFvuAccumulator()
    for part in zip(*(t.split(list(sizes)) for t in (tokens, y, y_hat)), strict=True):
        stream.update(*part)
    assert stream.compute() == pytest.approx(fvu_about_tokens(tokens, y, y_hat), rel=1e-9)
    odd = tokens % 2 == 1
    expected = fvu_about_tokens(tokens[odd], y[odd], y_hat[odd])
    assert stream.compute(lambda token: token % 2 == 1) == pytest.approx(expected, rel=1e-9)
    # Knowing the token is nearly all about the common mean, and nothing about the tokens' own.
    known = torch.stack([y[tokens == token].mean(0) for token in tokens])
    flattered, about_own = FvuAccumulator(), TokenFvuAccumulator()
    flattered.update(y, known)
    about_own.update(tokens, y, known)
    assert flattered.compute() < 1e-6 and about_own.compute() == pytest.approx(1.0)


def test_counts_and_dead() -> None:
    indices = torch.tensor([[0, 1], [1, 3]])
    values = torch.tensor([[1.0, 2.0], [0.5, 0.0]])  # feature 3 is listed but not active
    counts = firing_counts(indices, values, 4)
    assert counts.tolist() == [1, 2, 0, 0]
    assert dead_fraction(counts) == 0.5


def rows(seed: int, n: int = 40, d: int = 64) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_planted_pairs_are_found_whatever_their_length_and_opposite_or_dead_ones_are_not() -> None:
    first, second, third = rows(0), rows(1), rows(2, n=30)
    second[:10] = 3.0 * first[5:15] + 0.1 * rows(3, 10)  # nearly parallel
    third[:4] = -first[:4]  # opposite
    third[4:6] = second[20:22]  # parallel, but dead
    alive = {
        0: torch.ones(40, dtype=torch.bool),
        4: torch.ones(40, dtype=torch.bool),
        7: torch.ones(30, dtype=torch.bool),
    }
    alive[7][4:6] = False
    found = duplicated_fraction({0: first, 4: second, 7: third}, alive)
    assert found == {0: 10 / 40, 4: 10 / 40, 7: 0.0}
    # Within one layer nothing counts, and a layer without a live feature has no figure.
    twins = torch.cat([first, first])
    assert duplicated_fraction({0: twins}, {0: torch.ones(80, dtype=torch.bool)}) == {0: 0.0}
    assert duplicated_fraction({0: first}, {0: torch.zeros(40, dtype=torch.bool)}) == {}


def test_twins_are_those_of_the_whole_table_of_cosines() -> None:
    first, second = rows(0), torch.cat([rows(1, 20), 2.0 * rows(0)[7:9] + 0.2 * rows(5, 2), rows(0)[11:12]])
    alive = {0: torch.ones(40, dtype=torch.bool), 3: torch.ones(23, dtype=torch.bool)}
    alive[3][22] = False  # parallel to L0/11, but dead
    alive[0][30] = False
    cosines = torch.nn.functional.cosine_similarity(first[:, None], second[None], dim=-1)
    cosines[:, 22] = -1
    for block in (3, 2048):
        found = nearest_cosines({0: [first], 3: [second]}, alive, own_layer=False, block=block)
        torch.testing.assert_close(found[0], cosines.max(1).values[alive[0]])
        assert len(found[0]) == 39 and len(found[3]) == 22 and (found[0] >= 0.8).sum() == 2


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


def test_wilson_against_known_numbers() -> None:
    low, high = wilson_interval(np.array([0.0, 0.5, 0.8, 1.0]), np.array([10, 10, 10, 10]))
    np.testing.assert_allclose(low, [0.0, 0.2366, 0.4902, 0.7225], atol=1e-4)
    np.testing.assert_allclose(high, [0.2775, 0.7634, 0.9433, 1.0], atol=1e-4)


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
