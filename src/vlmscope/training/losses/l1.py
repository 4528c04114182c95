"""L1 with each activation weighed by its decoder row's norm, which no rescaling of the two can lower (Conerly et al.
2024).
"""

from torch import Tensor

from vlmscope.training.losses.joint import Joint, joint_mean


def l1_penalty(values: Tensor, indices: Tensor, w_dec: Tensor, joint: Joint = None) -> Tensor:
    """Mean over tokens of `sum_f a_f |W_dec[f]|`: values, indices [N, m], w_dec [F, d] -> scalar."""
    return joint_mean((values * w_dec.norm(dim=1)[indices]).sum(-1), joint)
