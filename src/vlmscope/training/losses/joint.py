"""Means and FVU over the tokens of a whole step, of which a process or a micro-batch may have a part.

Hosts: `total` turns a host's sum into the sum over all hosts, in value; its gradient is that of the host's own part. So
a loss made of totals has the joint value everywhere, and the gradients of the hosts add up to the joint gradient
exactly, also where the loss is not a sum over tokens. None: all tokens are here.

Micro-batches (`Part`): what is no sum over tokens, the FVU's denominators and the mean that L0's penalty squares, is
known before the first of them is differentiated. Then values and gradients of the parts add up to those of the step.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from vlmscope.metrics.dictionary import fvu

Total = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """What a micro-batch must know of the step that it is a part of, over all hosts; scalars without gradient.

    `tokens` in the step; `deviations`: the FVU's denominator; `residual_deviations`: that of AuxK, nan without dead
    features; `mean_l0`: active features a token, nan where nothing asks for it.
    """

    tokens: Tensor
    deviations: Tensor
    residual_deviations: Tensor
    mean_l0: Tensor

    def of_residual(self) -> "Part":
        """The same where a residual is what is to be explained."""
        return Part(self.tokens, self.residual_deviations, self.residual_deviations, self.mean_l0)


Joint = Total | Part | None


def joint_deviations(target: Tensor, total: Total | None) -> Tensor:
    """The FVU's denominator from this host's [N, d]: squared deviations from the joint mean, a scalar."""
    if total is None:
        return (target - target.mean(0)).square().sum()
    mean = total(target.sum(0)) / total(target.new_tensor(float(len(target))))
    return total((target - mean).square().sum())


def joint_fvu(target: Tensor, reconstruction: Tensor, joint: Joint) -> Tensor:
    """FVU of the step's tokens from those at hand, [N, d], [N, d]; of a part, its summand."""
    if joint is None:
        return fvu(target, reconstruction)
    unexplained = (target - reconstruction).square().sum()
    if isinstance(joint, Part):
        return unexplained / joint.deviations
    deviations = joint_deviations(target, joint)
    return joint(unexplained) / deviations


def joint_mean(values: Tensor, joint: Joint) -> Tensor:
    """Mean over the step's tokens of one number a token, [N]; of a part, its summand."""
    if joint is None:
        return values.mean()
    if isinstance(joint, Part):
        return values.sum() / joint.tokens
    return joint(values.sum()) / joint(values.new_tensor(float(len(values))))
