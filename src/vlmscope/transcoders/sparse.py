"""Sparse encoder gather and sparse decoder, with sparse gradients.

Shapes: N tokens, k active features a token, F features, d model width.

A token has k of F features, and k/F is below 1 %. Dense products would spend 99 % of their work on zeros, and a plain
gather stores [N, k, d]. Both passes here are weighted bags of rows instead:

    y[n]     = sum_j v[n, j] W[i[n, j]]                   a bag of decoder rows for each token
    dv[n, j] = g[n] . W[i[n, j]]                          sampled dot products
    dW[f]    = sum over (n, j) with i[n, j] = f of v[n, j] g[n]    a bag of gradient rows for each feature

No [N, k, d] and, in backward, no [N, F] is ever stored. Measured on one thread with N = 2048, d = 128, F = 2048, k = 16
(forward / dv / dW in ms): bags 0.6 / 1.6 / 2.8; gather + einsum 15 / 13 / -; dense products 33 / 32 / 39; CSR products
1.0 / 1.1 / 3.9; `index_add_` - / - / 4.1. With N = 1024, d = 640, F = 10240, k = 32, where the weights leave the cache:
bags 5.7 / 6.2 / 5.3, dv token by token 14, and the dense encoder product 152.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

_CACHED = 4 << 20  # bytes of rows that a core's cache may hold


def weighted_bags(indices: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """`out[n] = sum_j weights[n, j] rows[indices[n, j]]`: indices, weights [N, k], rows [R, d] -> [N, d]."""
    if indices.shape[0] == 0:
        return rows.new_zeros(0, rows.shape[1])
    return functional.embedding_bag(indices, rows, per_sample_weights=weights, mode="sum")


@dataclass(frozen=True)
class _ByFeature:
    """The entries (n, j) of indices [N, k] sorted by feature: `entry` [N k], `token` [N k]; `starts` [F] of each."""

    entry: Tensor
    token: Tensor
    starts: Tensor


def _by_feature(indices: Tensor, n_features: int) -> _ByFeature:
    """A stable sort, so the order of summation never varies."""
    # int32 keys sort twice as fast as int64.
    features, entry = torch.sort(indices.flatten().int(), stable=True)
    starts = torch.searchsorted(features, torch.arange(n_features, device=indices.device, dtype=torch.int32))
    return _ByFeature(entry, torch.div(entry, indices.shape[1], rounding_mode="floor"), starts)


class FeatureOrder:
    """The order of one support's entries by feature, sorted once and only if a gradient asks for it.

    The gradients of encoder and decoder, and those of Matryoshka prefixes, sum over the same entries.
    """

    def __init__(self) -> None:
        self._known: tuple[Tensor, int, _ByFeature] | None = None

    def of(self, indices: Tensor, n_features: int) -> _ByFeature:
        """The order of `indices` [N, k]; others than those of the last call are sorted anew."""
        known = self._known
        if known is None or known[1] != n_features or not _same(known[0], indices):
            self._known = known = (indices, n_features, _by_feature(indices, n_features))
        return known[2]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


def sampled_dots(indices: Tensor, left: Tensor, rows: Tensor, order: FeatureOrder | None = None) -> Tensor:
    """`out[n, j] = left[n] . rows[indices[n, j]]`; indices [N, k] int64, left [N, d], rows [R, d] -> [N, k]."""
    n, k = indices.shape
    if n == 0:
        return left.new_zeros(0, k)
    offsets = torch.arange(0, n * k, k, device=indices.device)
    if rows.device.type == "cpu" and rows.nbytes > _CACHED:
        # Feature by feature: each row is read once, in order, and what is read at random is the smaller `left`.
        by = (order if order is not None else FeatureOrder()).of(indices, rows.shape[0])
        dots = left.new_empty(n * k)
        dots[by.entry] = _dots(left, rows, indices.flatten()[by.entry], offsets, by.token)
    else:
        bag_of = torch.arange(n, device=indices.device).repeat_interleave(k)
        dots = _dots(left, rows, indices.flatten(), offsets, bag_of)
    return dots.view(n, k)


def _dots(left: Tensor, rows: Tensor, row_of: Tensor, offsets: Tensor, left_of: Tensor) -> Tensor:
    """`left[left_of[i]] . rows[row_of[i]]`, [m]."""
    # This is the kernel that autograd itself runs for `embedding_bag`; mode 0 is "sum", -1 is "no padding row".
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left.contiguous(), rows, row_of, offsets, left_of, 0, -1
    )


def transposed_bags(
    indices: Tensor, weights: Tensor, rows: Tensor, n_out: int, order: FeatureOrder | None = None
) -> Tensor:
    """`out[f] = sum over (n, j) with indices[n, j] = f of weights[n, j] rows[n]`; rows [N, d] -> [n_out, d]."""
    if indices.shape[0] == 0:
        return rows.new_zeros(n_out, rows.shape[1])
    by = (order if order is not None else FeatureOrder()).of(indices, n_out)
    return functional.embedding_bag(
        by.token, rows.contiguous(), by.starts, per_sample_weights=weights.flatten()[by.entry], mode="sum"
    )


class _Gather(torch.autograd.Function):
    """Pre-activations at chosen features, as a function of input, encoder rows and encoder bias."""

    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, indices: Tensor, x: Tensor, w_enc: Tensor, b_enc: Tensor, order: FeatureOrder | None
    ) -> Tensor:
        ctx.save_for_backward(indices, x, w_enc)
        ctx.order = order
        if pre.dtype == w_enc.dtype:
            return pre.gather(1, indices)
        # Half precision is good enough to choose by; what is chosen is k/F of the product, and worth having exactly.
        return sampled_dots(indices, x, w_enc, order) + b_enc[indices]

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        indices, x, w_enc = ctx.saved_tensors
        grad_x = grad_w = grad_b = None
        if ctx.needs_input_grad[2]:
            grad_x = weighted_bags(indices, grad, w_enc)
        if ctx.needs_input_grad[3]:
            grad_w = transposed_bags(indices, grad, x, w_enc.shape[0], ctx.order)
        if ctx.needs_input_grad[4]:
            grad_b = grad.new_zeros(w_enc.shape[0]).index_add_(0, indices.flatten(), grad.flatten())
        return None, None, grad_x, grad_w, grad_b, None


class _Decode(torch.autograd.Function):
    """Weighted sum of decoder rows."""

    @staticmethod
    def forward(ctx: Any, indices: Tensor, values: Tensor, w_dec: Tensor, order: FeatureOrder | None) -> Tensor:
        ctx.save_for_backward(indices, values, w_dec)
        ctx.order = order
        return weighted_bags(indices, values, w_dec)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        indices, values, w_dec = ctx.saved_tensors
        grad_values = grad_w = None
        if ctx.needs_input_grad[1]:
            grad_values = sampled_dots(indices, grad, w_dec, ctx.order)
        if ctx.needs_input_grad[2]:
            grad_w = transposed_bags(indices, values, grad, w_dec.shape[0], ctx.order)
        return None, grad_values, grad_w, None


def gather_pre_activations(
    pre: Tensor, indices: Tensor, x: Tensor, w_enc: Tensor, b_enc: Tensor, order: FeatureOrder | None = None
) -> Tensor:
    """Values of `pre = x @ w_enc.T + b_enc` at `indices`, with sparse gradients to `x`, `w_enc` and `b_enc`.

    `pre` [N, F] is the product computed beforehand without a gradient; indices [N, k] int64, x [N, d], w_enc [F, d],
    b_enc [F] -> [N, k] in the dtype of `w_enc`: where `pre` is of another one, the values are computed anew. `order` is
    shared by what has the same indices.
    """
    return _Gather.apply(pre, indices, x, w_enc, b_enc, order)  # pyright: ignore[reportReturnType]


def sparse_decode(indices: Tensor, values: Tensor, w_dec: Tensor, order: FeatureOrder | None = None) -> Tensor:
    """`sum_j values[n, j] w_dec[indices[n, j]]`; indices [N, k] int64, values [N, k], w_dec [F, d] -> [N, d]."""
    return _Decode.apply(indices, values, w_dec, order)  # pyright: ignore[reportReturnType]
