"""AuxK: dead features learn to explain what is left over (Gao et al. 2024, arXiv 2406.04093, appendix A.2)."""

import torch
from torch import Tensor

from vlmscope.training.losses.joint import Joint, Part, joint_fvu
from vlmscope.transcoders.transcoder import Transcoder, gather_pre_activations, sparse_decode


def aux_k(
    transcoder: Transcoder,
    x: Tensor,
    residual: Tensor,
    pre: Tensor,
    dead: Tensor,
    count: int,
    joint: Joint = None,
) -> Tensor:
    """FVU of the residual [N, d] when the `count` strongest dead features of each token may explain it.

    Args:
        transcoder: the layer's.
        x: inputs [N, d].
        residual: target minus reconstruction [N, d], detached.
        pre: all pre-activations [N, F], detached.
        dead: indices of dead features [m] int64, m > 0.
        count: how many a token.
        joint: the step that the tokens are a part of (`vlmscope.training.losses.joint`).
    """
    strongest = pre[:, dead].topk(min(count, len(dead)), dim=-1).indices
    indices = dead[strongest]
    values = gather_pre_activations(pre, indices, x, transcoder.W_enc, transcoder.b_enc).relu()
    joint = joint.of_residual() if isinstance(joint, Part) else joint
    return joint_fvu(residual, sparse_decode(indices, values, transcoder.W_dec), joint)


def dead_features(silent: Tensor, after_tokens: int) -> Tensor:
    """Indices of the features that were silent for so many tokens: [F] int64 -> [m] int64."""
    return torch.nonzero(silent >= after_tokens).flatten()
