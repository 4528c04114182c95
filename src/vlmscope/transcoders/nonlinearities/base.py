"""What a nonlinearity must offer. N tokens, F features, k slots a token."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Nonlinearity(nn.Module, ABC):
    """A sparse nonlinearity in two steps, so that only the chosen features are ever differentiated."""

    @abstractmethod
    def support(self, pre: Tensor) -> Tensor:
        """Features that may be active: pre-activations [N, F] -> distinct indices [N, k] int64. No gradient."""

    @abstractmethod
    def values(self, pre_at_support: Tensor, indices: Tensor) -> Tensor:
        """Activations >= 0 of those features, differentiable: [N, k], [N, k] int64 -> [N, k]; 0 means inactive."""
