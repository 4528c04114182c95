"""L1 with each activation weighed by its decoder row's norm, which no rescaling of the two can lower (Conerly et al.
2024).
"""

from torch import Tensor

from vlmscope.training.losses.joint import Joint, joint_mean


def l1_penalty(values: Tensor, indices: Tensor, norms: Tensor, joint: Joint = None) -> Tensor:
    """Mean over tokens of `sum_f a_f |W_dec[f]|`: values, indices [N, m], norms of decoder rows [F] -> scalar."""
    return joint_mean((values * norms[indices]).sum(-1), joint)
