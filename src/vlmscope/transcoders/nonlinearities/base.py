"""What a nonlinearity must offer. N tokens, F features, k slots a token."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

_NEVER = float("-inf")


class Nonlinearity(nn.Module, ABC):
    """A sparse nonlinearity in two steps, so that only the chosen features are ever differentiated."""

    @abstractmethod
    def support(self, pre: Tensor) -> Tensor:
        """Features that may be active: pre-activations [N, F] -> distinct indices [N, k] int64. No gradient."""

    @abstractmethod
    def values(self, pre_at_support: Tensor, indices: Tensor) -> Tensor:
        """Activations >= 0 of those features, differentiable: [N, k], [N, k] int64 -> [N, k]; 0 means inactive."""

    @property
    def thresholds(self) -> Tensor | None:
        """[F], pre-activations above which features are active, for a nonlinearity that has such numbers to store."""
        return None

    def take_thresholds(self, thresholds: Tensor) -> None:
        """Set what `thresholds` gives, [F].

        Raises:
            ValueError: the nonlinearity has no such numbers.
        """
        raise ValueError(f"{type(self).__name__} has no thresholds")


@torch.no_grad()
def chosen(pre: Tensor, wanted: Tensor) -> Tensor:
    """The features of a mask as indices: pre, wanted [N, F] -> [N, m] int64, m the most that any token has (at least
    1).

    A token with fewer is filled up with other features of its own; `values` makes nothing of those.
    """
    most = int(wanted.sum(-1).max()) if len(wanted) else 0
    return pre.masked_fill(~wanted, _NEVER).topk(max(most, 1), dim=-1).indices
