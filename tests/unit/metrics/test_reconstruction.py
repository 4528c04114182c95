"""Metrics against hand-made figures and against the whole-data formula."""

import pytest
import torch

from vlmscope.metrics.dictionary import FvuAccumulator, dead_fraction, firing_counts, fvu


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


def test_counts_and_dead() -> None:
    indices = torch.tensor([[0, 1], [1, 3]])
    values = torch.tensor([[1.0, 2.0], [0.5, 0.0]])  # feature 3 is listed but not active
    counts = firing_counts(indices, values, 4)
    assert counts.tolist() == [1, 2, 0, 0]
    assert dead_fraction(counts) == 0.5
