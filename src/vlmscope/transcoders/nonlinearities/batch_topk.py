"""BatchTopK: the k N largest rectified pre-activations of a batch of N tokens (Bussmann et al., arXiv 2412.06410).

A token may have more or fewer than k. At inference, where no token may depend on its neighbours in the batch, a feature
is active above one threshold: the mean, over training batches, of the smallest activation that was kept.
"""

import torch
from torch import Tensor, nn

from vlmscope.transcoders.nonlinearities.base import Nonlinearity, chosen

_DECAY = 0.9  # of the running mean of the threshold, which falls while features learn: slower ones lag behind
_UNKNOWN = -1.0


class BatchTopK(Nonlinearity):
    """Chooses among the batch in training mode, by the threshold in evaluation mode.

    Attributes:
        threshold: scalar, -1 as long as no batch was seen.
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
    def support(self, pre: Tensor) -> Tensor:
        if not self.training:
            return chosen(pre, pre > self.threshold.clamp_min(0))
        smallest = self._smallest(pre)
        now = smallest.to(self.threshold)
        self.threshold.copy_(torch.where(self.threshold < 0, now, _DECAY * self.threshold + (1 - _DECAY) * now))
        return chosen(pre, (pre >= smallest) & (pre > 0))

    def values(self, pre_at_support: Tensor, indices: Tensor) -> Tensor:
        del indices
        if not self.training:
            return torch.where(pre_at_support > self.threshold.clamp_min(0), pre_at_support, 0)
        # The support holds all that was chosen, so its k N largest are the batch's; the rest fills tokens up.
        return torch.where(pre_at_support >= self._smallest(pre_at_support.detach()), pre_at_support, 0).relu()

    def _smallest(self, pre: Tensor) -> Tensor:
        """The smallest of the k N largest, at least 0: [N, any] -> scalar."""
        kept = min(self.k * pre.shape[0], pre.numel())
        return pre.flatten().topk(kept).values[-1].clamp_min(0) if kept else pre.new_zeros(())

    def extra_repr(self) -> str:
        return f"k={self.k}, threshold={float(self.threshold):.4g}"
