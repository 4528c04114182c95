"""The loss of one layer's transcoder: FVU over the tokens of a whole step, AuxK, Matryoshka prefixes, L0 and L1.

A process or a micro-batch may have a part of a step's tokens. What is then asked for is in `Joint`:

None      All tokens are here.
Total     One of several hosts. It turns a host's sum into the sum over all hosts, in value; its gradient is that of the
          host's own part. So a loss made of totals has the joint value everywhere, and the gradients of the hosts add
          up to the joint gradient exactly, also where the loss is not a sum over tokens.
Part      A micro-batch. What is no sum over tokens, the FVU's denominators and the mean that L0's penalty squares, is
          known before the first of them is differentiated. Then values and gradients add up to those of the step.

Shapes: N tokens, d model width, F features, k slots for the active features of a token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmscope.metrics.dictionary import fvu
from vlmscope.transcoders.nonlinearities import JumpReLU
from vlmscope.transcoders.transcoder import SparseCode, Transcoder, gather_pre_activations, sparse_decode

Total = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """What a micro-batch must know of the step that it is a part of, over all hosts; scalars without gradient.

    `tokens` of the step; `deviations`, the FVU's denominator; `residual_deviations`, that of AuxK, nan without dead
    features; `mean_l0`, active features of a token, nan where no penalty asks for it.
    """

    tokens: Tensor
    deviations: Tensor
    residual_deviations: Tensor
    mean_l0: Tensor


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
    """Mean over the step's tokens of one number per token, [N]; of a part, its summand."""
    if joint is None:
        return values.mean()
    if isinstance(joint, Part):
        return values.sum() / joint.tokens
    return joint(values.sum()) / joint(values.new_tensor(float(len(values))))


def dead_features(silent: Tensor, after_tokens: int) -> Tensor:
    """Indices of the features that were silent for so many tokens: [F] int64 -> [m] int64."""
    return torch.nonzero(silent >= after_tokens).flatten()


def aux_k(
    transcoder: Transcoder, x: Tensor, residual: Tensor, pre: Tensor, dead: Tensor, count: int, joint: Joint = None
) -> Tensor:
    """AuxK, by which dead features learn: FVU of the residual when each token's `count` strongest of them explain it.

    `residual` [N, d] is target minus reconstruction, `pre` [N, F] all pre-activations, both detached; `dead` [m] int64,
    m > 0. Source: Gao et al. 2024, arXiv 2406.04093, appendix A.2.
    """
    strongest = pre[:, dead].topk(min(count, len(dead)), dim=-1).indices
    indices = dead[strongest]
    values = gather_pre_activations(pre, indices, x, transcoder.W_enc, transcoder.b_enc).relu()
    joint = replace(joint, deviations=joint.residual_deviations) if isinstance(joint, Part) else joint
    return joint_fvu(residual, sparse_decode(indices, values, transcoder.W_dec), joint)


def prefix_sizes(fractions: Sequence[float], n_features: int) -> list[int]:
    """Numbers of features of each Matryoshka prefix shorter than the whole, ascending."""
    sizes = sorted({max(1, round(fraction * n_features)) for fraction in fractions})
    return [size for size in sizes if size < n_features]


def prefix_fvu(
    transcoder: Transcoder, code: SparseCode, x: Tensor, y: Tensor, sizes: Sequence[int], joint: Joint = None
) -> Tensor:
    """Mean FVU of `y` [N, d] over reconstructions by the first features alone, one for each size, with the same code.

    The first features must do on their own, so that they stay general (Matryoshka SAEs, arXiv 2503.17547).
    """
    terms = []
    for size in sizes:
        values = torch.where(code.indices < size, code.values, 0)
        terms.append(joint_fvu(y, transcoder.decode(replace(code, values=values), x), joint))
    return torch.stack(terms).mean()


def l0_penalty(activation: JumpReLU, at_support: Tensor, indices: Tensor, k: int, joint: Joint = None) -> Tensor:
    """`(L0 / k - 1)^2` from the pre-activations [N, m] at the support's indices [N, m], with a gradient to thresholds.

    The variant of arXiv 2407.14435, section 3, that aims at a number k of active features instead of weighing it.
    """
    mean = joint_mean(activation.steps(at_support, indices).sum(-1), joint)
    if not isinstance(joint, Part):
        return (mean / k - 1).square()
    # The chain rule by hand: the slope of the square at the step's mean, and this part's share of the value.
    excess = joint.mean_l0 / k - 1
    share = len(indices) / joint.tokens
    return excess.square() * share + 2 * excess / k * (mean - mean.detach())


def l1_penalty(values: Tensor, indices: Tensor, norms: Tensor, joint: Joint = None) -> Tensor:
    """Mean over tokens of `sum_f a_f |W_dec[f]|`: values, indices [N, k], norms of decoder rows [F] -> scalar.

    With these weights no rescaling of activations and decoder can lower it (Conerly et al. 2024).
    """
    return joint_mean((values * norms[indices]).sum(-1), joint)
