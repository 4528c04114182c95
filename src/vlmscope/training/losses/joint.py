"""Means and FVU over tokens that lie on several hosts.

`total` turns a host's sum into the sum over all hosts, in value; its gradient is that of the host's own part. So a loss
made of totals has the joint value everywhere, and the gradients of the hosts add up to the joint gradient exactly, also
where the loss is not a sum over tokens. None: all tokens are here.
"""

from collections.abc import Callable

from torch import Tensor

from vlmscope.metrics.reconstruction import fvu

Total = Callable[[Tensor], Tensor]


def joint_fvu(target: Tensor, reconstruction: Tensor, total: Total | None) -> Tensor:
    """FVU of all hosts' tokens from this host's [N, d], [N, d]: the deviations are from the joint mean."""
    if total is None:
        return fvu(target, reconstruction)
    mean = total(target.sum(0)) / total(target.new_tensor(float(len(target))))
    return total((target - reconstruction).square().sum()) / total((target - mean).square().sum())


def joint_mean(values: Tensor, total: Total | None) -> Tensor:
    """Mean over all hosts' tokens of one number a token, [N]."""
    if total is None:
        return values.mean()
    return total(values.sum()) / total(values.new_tensor(float(len(values))))
