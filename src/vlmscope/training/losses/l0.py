"""L0 of JumpReLU, whose number of active features has a gradient to the thresholds (arXiv 2407.14435, section 3).

The penalty is `(L0 / k - 1)^2`, their variant that aims at a number of active features instead of weighing it.
"""

from torch import Tensor

from vlmscope.training.losses.joint import Joint, Part, joint_mean
from vlmscope.transcoders.nonlinearities.jump_relu import JumpReLU


def l0_penalty(activation: JumpReLU, at_support: Tensor, indices: Tensor, k: int, joint: Joint = None) -> Tensor:
    """Scalar from the pre-activations [N, m] at the support's indices [N, m]; k is the number aimed at."""
    mean = joint_mean(activation.steps(at_support, indices).sum(-1), joint)
    if not isinstance(joint, Part):
        return (mean / k - 1).square()
    # The chain rule by hand: the slope of the square at the step's mean, and this part's share of the value.
    excess = joint.mean_l0 / k - 1
    share = len(indices) / joint.tokens
    return excess.square() * share + 2 * excess / k * (mean - mean.detach())
