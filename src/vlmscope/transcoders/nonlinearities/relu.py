"""ReLU: every positive pre-activation is active; with an L1 penalty the baseline of the field (Bricken et al. 2023)."""

from torch import Tensor

from vlmscope.transcoders.nonlinearities.base import Nonlinearity, chosen


class ReLU(Nonlinearity):
    """As many active features as there are positive pre-activations."""

    def support(self, pre: Tensor) -> Tensor:
        return chosen(pre, pre > 0)

    def values(self, pre_at_support: Tensor, indices: Tensor) -> Tensor:
        del indices
        return pre_at_support.relu()
