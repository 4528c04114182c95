"""How well a sparse reconstruction stands for its target.

Shapes: N tokens, d width, k slots for active features, F features.

FVU = sum ||y - y_hat||^2 / sum ||y - mean(y)||^2, the mean taken over the tokens that are counted. For a subset (image
tokens, say) the deviations are from that subset's own mean, so a reconstruction that only knows the subset's mean has
an FVU of 1 there.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional


def fvu(target: Tensor, reconstruction: Tensor) -> Tensor:
    """Fraction of variance unexplained of [N, d] against [N, d], a scalar; nan when the target does not vary."""
    residual = (target - reconstruction).square().sum()
    return residual / (target - target.mean(0)).square().sum()


@dataclass
class FvuAccumulator:
    """FVU over a stream of batches, in float64, by Chan's parallel update of mean and deviations."""

    count: int = 0
    residual: float = 0.0
    deviations: float = 0.0
    mean: Tensor | None = field(default=None, repr=False)

    def update(self, target: Tensor, reconstruction: Tensor) -> None:
        """Add a batch: [N, d], [N, d]. An empty batch changes nothing."""
        n = target.shape[0]
        if n == 0:
            return
        y = target.double()
        mean = y.mean(0)
        self.residual += float((y - reconstruction.double()).square().sum())
        self.deviations += float((y - mean).square().sum())
        if self.mean is None:
            self.count, self.mean = n, mean
            return
        total = self.count + n
        shift = mean - self.mean
        self.deviations += float(shift.square().sum()) * self.count * n / total
        self.mean = self.mean + shift * (n / total)
        self.count = total

    def compute(self) -> float:
        """The FVU so far; nan without tokens or when the target does not vary."""
        return self.residual / self.deviations if self.deviations > 0 else math.nan


def l0(values: Tensor) -> Tensor:
    """Mean number of active features (value > 0) a token, from activations [N, k] or [N, F]; a scalar."""
    return (values > 0).sum(-1).double().mean()


def firing_counts(indices: Tensor, values: Tensor, n_features: int) -> Tensor:
    """At how many tokens each feature is active: indices [.., k] int64, values [.., k] -> [F] int64."""
    return torch.bincount(indices[values > 0].flatten(), minlength=n_features)


def dead_fraction(counts: Tensor) -> float:
    """Share of features [F] that never fired."""
    return float((counts == 0).double().mean())


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean -log p(label) in nats: logits [N, V], labels [N] int64 -> scalar, computed in float32 or better."""
    return functional.cross_entropy(logits.float() if logits.dtype.itemsize < 4 else logits, labels)


def cross_entropy_delta(logits: Tensor, spliced_logits: Tensor, labels: Tensor) -> Tensor:
    """How much worse the labels are predicted after a change to the model, in nats; [N, V] twice, [N] -> scalar."""
    return cross_entropy(spliced_logits, labels) - cross_entropy(logits, labels)
