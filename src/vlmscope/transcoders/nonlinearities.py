"""Nonlinearities: each chooses the features that may be active, and maps their pre-activations z to activations a.

topk       the k largest of relu(z) of a token (Gao et al., arXiv 2406.04093)
batchtopk  the k N largest of relu(z) of a batch of N tokens (Bussmann et al., arXiv 2412.06410)
jumprelu   a = z H(z - theta), a learned threshold theta >= 0 for each feature (Rajamanoharan et al., arXiv 2407.14435)
relu       every positive z; with an L1 penalty the baseline of the field (Bricken et al. 2023)

Shapes: N tokens, F features, k slots for the active features of a token.
"""

from abc import ABC, abstractmethod
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlmscope.core.errors import UserError
from vlmscope.transcoders.config import ACTIVATIONS, TranscoderConfig

_DECAY = 0.9  # of BatchTopK's running threshold, which falls while features learn: a slower mean would lag behind
Features: TypeAlias = slice | Tensor
_ALL = slice(None)
_UNKNOWN = -1.0  # threshold of a BatchTopK that has seen no batch


class Nonlinearity(nn.Module, ABC):
    """A sparse nonlinearity in two steps: choose features, then compute and differentiate only those."""

    @abstractmethod
    def support(self, pre: Tensor, features: Features = _ALL) -> Tensor:
        """Features that may be active: pre-activations [N, n] -> distinct columns [N, k] int64. No gradient.

        `features` are those of the columns, a slice or indices [N, n].
        """

    @abstractmethod
    def values(self, pre_at_support: Tensor, indices: Tensor) -> Tensor:
        """Activations >= 0 of those features, differentiable: [N, k], [N, k] int64 -> [N, k]; 0 means inactive."""

    @property
    def thresholds(self) -> Tensor | None:
        """Pre-activations above which features are active, [F]; None if the nonlinearity stores no such numbers."""
        return None

    def take_thresholds(self, thresholds: Tensor) -> None:
        """Set `thresholds`, [F]; ValueError if the nonlinearity cannot have these numbers."""
        raise ValueError(f"{type(self).__name__} has no thresholds")


def build_nonlinearity(config: TranscoderConfig) -> Nonlinearity:
    """The nonlinearity named by `config.activation`."""
    match config.activation:
        case "topk":
            return TopK(config.k)
        case "batchtopk":
            return BatchTopK(config.k, config.n_features)
        case "jumprelu":
            return JumpReLU(config.n_features, config.bandwidth)
        case "relu":
            return ReLU()
    choices = ", ".join(ACTIVATIONS)
    raise UserError(f"unknown activation {config.activation!r} of a transcoder; choose one of: {choices}")


@torch.no_grad()
def _masked(pre: Tensor, chosen: Tensor) -> Tensor:
    """The features of a mask as indices: pre, chosen [N, F] -> [N, m] int64, m >= 1 the most that any token has.

    A token with fewer is padded with features outside the mask, which `values` must map to 0.
    """
    most = int(chosen.sum(-1).max()) if len(chosen) else 0
    return pre.masked_fill(~chosen, float("-inf")).topk(max(most, 1), dim=-1).indices


class TopK(Nonlinearity):
    """ReLU, then the k largest. A token with fewer than k positive pre-activations has fewer active features."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def support(self, pre: Tensor, features: Features = _ALL) -> Tensor:
        return largest(pre, min(self.k, pre.shape[1]))  # ReLU keeps the order, so it need not be applied first

    def values(self, pre_at_support: Tensor, indices: Tensor) -> Tensor:
        return pre_at_support.relu()


class BatchTopK(Nonlinearity):
    """The k N largest of a batch in training mode, so that a token may have more or fewer than k.

    In evaluation mode no token may depend on the others of its batch, so a feature is active above one threshold: the
    running mean, over training batches, of the smallest activation that was kept.
    """

    threshold: Tensor

    def __init__(self, k: int, n_features: int) -> None:
        super().__init__()
        self.k, self.n_features = k, n_features
        self.threshold = nn.Buffer(torch.tensor(_UNKNOWN))

    @property
    def thresholds(self) -> Tensor:
        return self.threshold.clamp_min(0).expand(self.n_features)

    @torch.no_grad()
    def take_thresholds(self, thresholds: Tensor) -> None:
        if not bool((thresholds == thresholds[0]).all()):
            raise ValueError("BatchTopK has one threshold for all features, but they differ")
        self.threshold.copy_(thresholds[0])

    @torch.no_grad()
    def support(self, pre: Tensor, features: Features = _ALL) -> Tensor:
        if not self.training:
            return _masked(pre, pre > self.threshold.clamp_min(0))
        smallest = self._smallest(pre)
        now = smallest.to(self.threshold)
        self.threshold.copy_(torch.where(self.threshold < 0, now, _DECAY * self.threshold + (1 - _DECAY) * now))
        return _masked(pre, (pre >= smallest) & (pre > 0))

    def values(self, pre_at_support: Tensor, indices: Tensor) -> Tensor:
        if not self.training:
            return torch.where(pre_at_support > self.threshold.clamp_min(0), pre_at_support, 0)
        # The support contains all chosen entries, so its k N largest are those of the batch; the rest is padding.
        return torch.where(pre_at_support >= self._smallest(pre_at_support.detach()), pre_at_support, 0).relu()

    def _smallest(self, pre: Tensor) -> Tensor:
        """The smallest of the k N largest numbers, at least 0: [N, any] -> scalar."""
        kept = min(self.k * pre.shape[0], pre.numel())
        return pre.flatten().topk(kept).values[-1].clamp_min(0) if kept else pre.new_zeros(())


class ReLU(Nonlinearity):
    """As many active features as there are positive pre-activations."""

    def support(self, pre: Tensor, features: Features = _ALL) -> Tensor:
        return _masked(pre, pre > 0)

    def values(self, pre_at_support: Tensor, indices: Tensor) -> Tensor:
        return pre_at_support.relu()


class _Step(torch.autograd.Function):
    """`H(z - theta)`, elementwise; with `scaled`, times z, which then has a gradient too.

    H has no useful derivative in theta, so a kernel around the threshold stands in for it (arXiv 2407.14435, equations
    11 and 12): `d a / d theta = -theta K`, `d H / d theta = -K`, with K = 1 / e where |z - theta| <= e / 2, else 0.
    """

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float, scaled: bool) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.scaled = bandwidth, scaled
        return torch.where(pre > threshold, pre, 0) if scaled else (pre > threshold).to(pre.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        pre, threshold = ctx.saved_tensors
        kernel = ((pre - threshold).abs() <= ctx.bandwidth / 2).to(pre.dtype) / ctx.bandwidth
        if ctx.scaled:
            return grad * (pre > threshold), -grad * threshold * kernel, None, None
        return None, -grad * kernel, None, None


class JumpReLU(Nonlinearity):
    """As many active features as there are pre-activations above their threshold.

    `threshold` [F] counts as 0 below 0; `bandwidth` is that of the kernel, in the units of pre-activations.
    """

    def __init__(self, n_features: int, bandwidth: float) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.zeros(n_features))
        self.bandwidth = bandwidth

    @property
    def thresholds(self) -> Tensor:
        return self.threshold.clamp_min(0)

    @torch.no_grad()
    def take_thresholds(self, thresholds: Tensor) -> None:
        self.threshold.copy_(thresholds)

    @torch.no_grad()
    def support(self, pre: Tensor, features: Features = _ALL) -> Tensor:
        # In training, features just below their threshold contribute to its gradient too.
        reach = self.bandwidth / 2 if self.training else 0.0
        return _masked(pre, pre > self.thresholds[features] - reach)

    def values(self, pre_at_support: Tensor, indices: Tensor) -> Tensor:
        return self._apply_step(pre_at_support, indices, scaled=True)

    def steps(self, pre_at_support: Tensor, indices: Tensor) -> Tensor:
        """1 where a feature is active, 0 elsewhere, with the kernel's gradient to the thresholds: [N, k] -> [N, k]."""
        return self._apply_step(pre_at_support, indices, scaled=False)

    def _apply_step(self, pre: Tensor, indices: Tensor, scaled: bool) -> Tensor:
        return _Step.apply(pre, self.thresholds[indices], self.bandwidth, scaled)  # pyright: ignore[reportReturnType]


# The k largest of each row. `torch.topk` copies every row into pairs (value, index) before it selects, at about 3 ns
# per number: longer than the encoder product of a narrow model. But the k largest numbers lie in the k blocks with the
# largest maxima, and the smallest of those maxima is a lower bound of the k-th largest number:
#
#     maxima [N, G] of G blocks of B numbers of a row     one pass over the row, vectorised
#     floor [N] = k-th largest of the row's maxima
#     candidates = numbers >= floor in blocks whose maximum is >= floor     k to about k (1 + k / 2G) of a row
#     the k largest of the candidates
#
# This is exact for all numbers. Measured on one thread, this and `torch.topk`: 6.8 and 13.9 ms for N = 2048, F = 2048,
# k = 16; 11 and 26 ms for N = 1024, F = 10240, k = 32. In bfloat16 5.9 and 8.7, 12.6 and 15.9, and for N = 1024,
# F = 1920, k = 64 4.8 and 15.3. Numbers in bfloat16 are often equal, so as float32 they get their column in the bits
# that bfloat16 lacks. Infinite ones become NaN by this; a step with such numbers is refused anyway.
_NARROWEST = 4  # numbers of a block; then there are at least 2 k blocks in a row
_SMALLEST = 1 << 18  # numbers in total; below, the dozen calls cost more than they save
_THREADS = 4  # numpy selects on one thread, so with more threads topk is as fast
_ODD = 8  # if more than one row in this many needs topk, all rows use it
_CROWD = 4  # candidates per k above which padding costs more than topk


@torch.no_grad()
def largest(pre: Tensor, k: int) -> Tensor:
    """Indices of the k largest numbers of each row, largest first: [N, F] -> [N, k] int64.

    As with `torch.topk`, the choice among equal numbers is undefined.
    """
    n, f = pre.shape
    size = _block_size(f, k)
    large = size >= _NARROWEST and n * f >= _SMALLEST and pre.is_contiguous()
    if (
        large
        and pre.device.type == "cpu"
        and torch.get_num_threads() <= _THREADS
        and (single := _single(pre)) is not None
    ):
        indices = _by_blocks(single, k, size)
        if indices is not None:
            return indices
    return pre.topk(k, dim=-1).indices


def _single(pre: Tensor) -> Tensor | None:
    """The numbers in float32, those of bfloat16 with their column in the lower bits; None for other types."""
    if pre.dtype == torch.bfloat16 and pre.shape[1] <= 1 << 16:
        single = pre.float()
        single.view(torch.int32).bitwise_or_(torch.arange(pre.shape[1], dtype=torch.int32))
        return single
    return pre if pre.dtype == torch.float32 else None


def _block_size(f: int, k: int) -> int:
    """B, a power of two that divides F, near the one with fewest numbers to look at: F / B maxima, k B in blocks."""
    size = 1
    while f % (2 * size) == 0 and (2 * size) ** 2 * k <= 2 * f:
        size *= 2
    return size


def _by_blocks(pre: Tensor, k: int, size: int) -> Tensor | None:
    """`largest` by maxima of blocks; None for rows to which it does not apply."""
    n, f = pre.shape
    groups = f // size
    # Block g has the numbers g, g + G, g + 2G, ..: maxima over a middle dimension are vectorised, over the last not.
    blocks = pre.view(n, size, groups)
    maxima = blocks.amax(1).numpy()
    floor = np.partition(maxima, groups - k, axis=1)[:, groups - k, None]
    chosen = maxima >= floor
    odd = np.flatnonzero(chosen.sum(1) != k)  # rows with equal maxima at the floor, or NaN
    if len(odd) * _ODD > n:
        return None
    chosen[odd], floor[odd] = np.arange(groups) < k, np.inf  # any k blocks without candidates: topk below handles them
    block = (np.flatnonzero(chosen) % groups).reshape(n, 1, k)
    values = blocks.gather(2, torch.from_numpy(block).expand(n, size, k)).numpy().reshape(n, size * k)
    kept = np.flatnonzero(values >= floor)
    row, place = np.divmod(kept, size * k)
    member, slot = np.divmod(place, k)
    counts = np.bincount(row, minlength=n)
    most = int(counts.max())
    if most > _CROWD * k:
        return None
    # Candidates are sorted by row, so a candidate's column is its position since the row began.
    column = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    keys = np.full((n, most), np.inf, dtype=np.float32)
    keys[row, column] = -values.reshape(-1)[kept]
    features = np.zeros((n, most), dtype=np.int64)
    features[row, column] = block[row, 0, slot] + member * groups
    order = np.argsort(keys, axis=1)[:, :k]
    indices = torch.from_numpy(np.take_along_axis(features, order, axis=1))
    if len(odd):
        indices[odd] = pre[odd].topk(k, dim=-1).indices
    return indices
