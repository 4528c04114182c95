"""The sparse kernels against dense algebra and finite differences."""

import pytest
import torch
from torch import Tensor

from vlmscope.transcoders import transcoder as sparse
from vlmscope.transcoders.transcoder import FeatureOrder, gather_pre_activations, sparse_decode, transposed_bags

N, D, F, K = 7, 5, 11, 3


def _problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, w_enc, w_dec = (torch.randn(n, D, generator=g, dtype=dtype) for n in (N, F, F))
    b_enc = torch.randn(F, generator=g, dtype=dtype)
    indices = torch.stack([torch.randperm(F, generator=g)[:K] for _ in range(N)])
    return x, w_enc, w_dec, b_enc, indices


def test_decode_gradients() -> None:
    _, _, w_dec, _, indices = _problem()
    values = torch.rand(N, K, dtype=torch.float64)
    values[0] = 0.0  # a padded row still has a gradient to its values
    assert torch.autograd.gradcheck(
        lambda v, w: sparse_decode(indices, v, w), (values.requires_grad_(), w_dec.requires_grad_())
    )


def test_gather_gradients() -> None:
    x, w_enc, _, b_enc, indices = _problem()

    def at_support(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return gather_pre_activations((x @ w.T + b).detach(), indices, x, w, b)

    assert torch.autograd.gradcheck(at_support, tuple(t.requires_grad_() for t in (x, w_enc, b_enc)))


def test_transposed_bags_handles_unused_features_at_both_ends_and_no_tokens() -> None:
    indices = torch.tensor([[3, 5], [5, 4]])
    rows = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    out = transposed_bags(indices, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), rows, 8)
    expected = torch.zeros(8, 2)
    expected[3], expected[4] = rows[0], 4 * rows[1]
    expected[5] = 2 * rows[0] + 3 * rows[1]
    assert torch.equal(out, expected)
    assert transposed_bags(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2), rows[:0], 8).shape == (8, 2)


def test_a_shared_order_gives_the_same_gradients_and_is_sorted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(4)
    x, w_enc, w_dec = (torch.randn(n, 5, generator=rng, dtype=torch.float64) for n in (7, 11, 11))
    b_enc = torch.randn(11, generator=rng, dtype=torch.float64)
    sorts: list[int] = []
    real = sparse._by_feature
    monkeypatch.setattr(sparse, "_by_feature", lambda indices, n: sorts.append(n) or real(indices, n))

    def gradients(order: FeatureOrder | None) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, w_enc, b_enc, w_dec)]
        pre = (x @ w_enc.T + b_enc).detach()
        indices = pre.topk(3).indices
        values = gather_pre_activations(pre, indices, *leaves[:3], order)
        sparse_decode(indices, values, leaves[3], order).square().sum().backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    alone, shared = gradients(None), gradients(FeatureOrder())
    assert sorts == [11] * 3 and len(alone) == 4
    assert all(torch.equal(one, other) for one, other in zip(alone, shared, strict=True))


def test_dots_feature_by_feature_are_those_token_by_token(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = torch.Generator().manual_seed(5)
    left, rows = torch.randn(9, 6, generator=rng), torch.randn(30, 6, generator=rng)
    indices = torch.randn(9, 30, generator=rng).topk(4).indices
    by_token = sparse.sampled_dots(indices, left, rows)
    monkeypatch.setattr(sparse, "_CACHED", 0)
    assert torch.equal(sparse.sampled_dots(indices, left, rows, FeatureOrder()), by_token)
    torch.testing.assert_close(by_token, (left @ rows.T).gather(1, indices))
