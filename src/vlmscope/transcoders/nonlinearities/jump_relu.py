"""JumpReLU: `a = z H(z - theta)` with a learned threshold theta >= 0 a feature (Rajamanoharan et al., arXiv
2407.14435).

The step H has no useful derivative in theta, so a kernel of width `bandwidth` around the threshold stands in for it
(their equations 11 and 12): `d a / d theta = -theta / e K((z - theta) / e)` and `d H / d theta = -1 / e K((z - theta) /
e)`, K the rectangle on [-1/2, 1/2].
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlmscope.transcoders.nonlinearities.base import Nonlinearity, chosen


def _kernel(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((pre - threshold).abs() <= bandwidth / 2).to(pre.dtype) / bandwidth


class _Jump(torch.autograd.Function):
    """`z H(z - theta)`, elementwise."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre > threshold, pre, 0)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        pre, threshold = ctx.saved_tensors
        return grad * (pre > threshold), -grad * threshold * _kernel(pre, threshold, ctx.bandwidth), None


class _Step(torch.autograd.Function):
    """`H(z - theta)`, elementwise; no gradient to z."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        pre, threshold = ctx.saved_tensors
        return None, -grad * _kernel(pre, threshold, ctx.bandwidth), None


class JumpReLU(Nonlinearity):
    """As many active features as there are pre-activations above their threshold.

    Attributes:
        threshold: [F]; below 0 it counts as 0.
        bandwidth: width of the kernel, in the units of pre-activations.
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
    def support(self, pre: Tensor) -> Tensor:
        # In training, features just below their threshold pull at it too.
        reach = self.bandwidth / 2 if self.training else 0.0
        return chosen(pre, pre > self.thresholds - reach)

    def values(self, pre_at_support: Tensor, indices: Tensor) -> Tensor:
        found = _Jump.apply(pre_at_support, self.thresholds[indices], self.bandwidth)
        assert isinstance(found, Tensor)
        return found

    def steps(self, pre_at_support: Tensor, indices: Tensor) -> Tensor:
        """1 where a feature is active, 0 elsewhere, with the kernel's gradient to the thresholds: [N, k] -> [N, k]."""
        found = _Step.apply(pre_at_support, self.thresholds[indices], self.bandwidth)
        assert isinstance(found, Tensor)
        return found

    def extra_repr(self) -> str:
        return f"bandwidth={self.bandwidth}"
