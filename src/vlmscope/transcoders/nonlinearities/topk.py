"""TopK: `a = TopK_k(ReLU(pre))`, the k largest rectified pre-activations of a token (arXiv 2406.04093, 2602.20330)."""

from torch import Tensor

from vlmscope.transcoders.nonlinearities.base import Nonlinearity
from vlmscope.transcoders.nonlinearities.select import largest


class TopK(Nonlinearity):
    """ReLU, then the k largest. A token with fewer than k positive pre-activations has fewer active features."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def support(self, pre: Tensor) -> Tensor:
        # ReLU keeps the order, so the largest before it are the largest after it.
        return largest(pre, self.k)

    def values(self, pre_at_support: Tensor, indices: Tensor) -> Tensor:
        del indices
        return pre_at_support.relu()

    def extra_repr(self) -> str:
        return f"k={self.k}"
