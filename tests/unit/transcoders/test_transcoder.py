"""The transcoder against its equation, written densely."""

from typing import Any

import pytest
import torch
from torch import Tensor

from vlmscope.core.errors import UserError
from vlmscope.transcoders.transcoder import (
    Standardisation,
    Transcoder,
    TranscoderConfig,
    fold,
    random_set,
)

D, F, K = 6, 20, 4


def _dense(transcoder: Transcoder, x: Tensor) -> Tensor:
    """`a W_dec + b_dec + W_skip x` with a dense `a` that keeps the K largest rectified pre-activations."""
    pre = (x @ transcoder.W_enc.T + transcoder.b_enc).relu()
    threshold = pre.sort(-1, descending=True).values[..., K - 1 : K]
    a = torch.where(pre >= threshold, pre, 0)
    skip = 0 if transcoder.W_skip is None else x @ transcoder.W_skip.T
    return a @ transcoder.W_dec + transcoder.b_dec + skip


def _one(skip: bool) -> tuple[Transcoder, Tensor]:
    transcoder = random_set(1, D, F, K, skip=skip, seed=3, dtype=torch.float64)[0]
    return transcoder, torch.randn(2, 9, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("skip", [False, True])
def test_gradients_are_those_of_the_dense_equation(skip: bool) -> None:
    transcoder, x = _one(skip)
    x.requires_grad_()
    inputs = [x, *transcoder.parameters()]
    g = torch.randn(2, 9, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    sparse = torch.autograd.grad((transcoder(x).reconstruction * g).sum(), inputs)
    dense = torch.autograd.grad((_dense(transcoder, x) * g).sum(), inputs)
    for ours, theirs in zip(sparse, dense, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"k": 21}, "k = 21"), ({"k": 0}, "k = 0"), ({"d_model": 0}, "d_model 0"), ({"activation": "gelu"}, "gelu.*topk")],
)
def test_impossible_configurations_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        settings: dict[str, Any] = {"d_model": D, "n_features": F, "k": K}
        Transcoder(TranscoderConfig(**(settings | change)))


@pytest.mark.parametrize("skip", [False, True])
def test_folding_a_standardisation_changes_nothing_but_coordinates(skip: bool) -> None:
    transcoder, x = _one(skip)
    x = x.reshape(-1, D) * 3 + 7
    y = torch.randn(18, D, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * 0.01 - 2
    standard = Standardisation.fit(x, y)
    x_standard, y_standard = standard.apply(x, y)
    for tensor in (x_standard, y_standard):
        torch.testing.assert_close(tensor.mean(0), torch.zeros(D, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(tensor.square().mean(), torch.tensor(1.0, dtype=torch.float64))
    # Half-way to white: the covariance C of inputs becomes proportional to C (C / c + 0.1)^(-1/2).
    before, after = torch.cov(x.T, correction=0), torch.cov(x_standard.T, correction=0)
    shrunk = before / before.diagonal().mean() + 0.1 * torch.eye(D, dtype=torch.float64)
    left, right = after @ after @ shrunk, before @ before
    torch.testing.assert_close(left / left.norm(), right / right.norm(), rtol=0, atol=1e-12)
    inside, outside = transcoder(x_standard), fold(transcoder, standard)(x)
    back = inside.reconstruction * standard.y_scale + standard.y_mean
    torch.testing.assert_close(outside.reconstruction, back, rtol=0, atol=1e-12)
    torch.testing.assert_close(outside.code.values, inside.code.values, rtol=0, atol=1e-11)
    assert torch.equal(outside.code.indices, inside.code.indices)
