"""Which logits a graph explains, and the vectors that read them.

A logit target is `W_U[t] - mean(W_U)` at the normed last state: the logit minus the mean logit, since a constant
added to all logits changes no probability. Of a model that caps its logits, the target is the logit before the cap,
which is affine in the sources and keeps the order; probabilities are the model's own, after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmscope.core.errors import UserError
from vlmscope.replacement.model import ReplacementModel


@dataclass(frozen=True)
class LogitTargets:
    """The logits to explain, most probable first, then those asked for.

    `token_ids [K]` int64; `probabilities [K]` float64; `vectors [K, d]`; `values [K]`, the centred logits.
    """

    token_ids: np.ndarray
    probabilities: np.ndarray
    vectors: Tensor
    values: Tensor


@torch.no_grad()
def choose_logits(
    replacement: ReplacementModel, logit_mass: float, max_logits: int, token_ids: Sequence[int] = ()
) -> LogitTargets:
    """The smallest set of logits whose probabilities reach `logit_mass`, at most `max_logits`, and `token_ids` besides.

    Raises:
        UserError: when a token id is outside the vocabulary.
    """
    logits = replacement.state.logits[-1]
    for token in token_ids:
        if not 0 <= token < len(logits):
            raise UserError(
                f"attribution.token_ids has {token}, but the vocabulary has {len(logits)} tokens; correct it"
            )
    probabilities = replacement.capped(logits.double()).softmax(-1)
    ordered, order = probabilities.sort(descending=True, stable=True)
    needed = int((ordered.cumsum(0) < logit_mass).sum()) + 1
    chosen = order[: min(needed, max_logits)].tolist()
    chosen += [token for token in dict.fromkeys(token_ids) if token not in chosen]
    unembedding = replacement.unembedding
    mean = unembedding.mean(0, dtype=torch.float64).to(unembedding.dtype)
    wide = logits.double()
    return LogitTargets(
        token_ids=np.array(chosen, dtype=np.int64),
        probabilities=probabilities[chosen].cpu().numpy(),
        vectors=unembedding[chosen] - mean,
        values=wide[chosen] - wide.mean(),
    )
