"""Starting points of a transcoder, in standardised coordinates (`vlmscope.transcoders.init.Standardisation`).

zero_decoder  W_dec = 0, W_enc uniform as kaiming_uniform(a = sqrt 5), biases 0: with means and scales taken out, this
              is the start of the paper (b_dec = mean y, b_enc = -W_enc mean x).
samples       A feature starts as one token of the data: W_enc[f] = x_n / |x_n|, W_dec[f] = y_n / (k |x_n|). Every
              feature fires at least near its own token, so few start dead, and the first reconstruction is an average
              over similar tokens instead of nothing. In a cross-layer set layer m is written to from m + 1 layers,
              each of which starts with its share: W_dec[l -> m][f] = y_m,n / (k |x_n| (m + 1)).

Seen on one layer of an Orrery with a trained tower and a random decoder (d = 128, F = 2048, k = 16, 300 steps of 2,048
tokens, FVU and dead fraction on other pictures): at rate 1e-3 samples 0.054 and 4 %, zero_decoder 0.061 and 27 %; at
3e-3 samples 0.044 and 9 %, zero_decoder 0.054 and 28 %.

Legend: N tokens, d model width, F features.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vlmscope.transcoders.init import set_weight
from vlmscope.transcoders.transcoder import Transcoder


def start(transcoder: Transcoder, x: Tensor, targets: Sequence[Tensor], method: str, rng: np.random.Generator) -> None:
    """Fill the weights.

    Args:
        transcoder: whose weights.
        x: standardised inputs [N, d].
        targets: its share of the standardised targets [N, d] of its own layer and of each later one that it writes to.
        method: "samples" or "zero_decoder".
        rng: chooses the samples.
    """
    assert len(targets) == transcoder.config.writes, (len(targets), transcoder.config.writes)
    f, d = transcoder.config.n_features, transcoder.config.d_model
    if method == "zero_decoder":
        bound = 1 / math.sqrt(d)
        set_weight(transcoder.W_enc, rng.uniform(-bound, bound, (f, d)))
        return
    assert method == "samples", method
    rows = _distinct_rows(x, f, rng)
    noise = torch.as_tensor(rng.standard_normal((f, d)), dtype=x.dtype, device=x.device)
    # A little noise separates features that start from the same token when there are fewer tokens than features.
    inputs = x[rows] + 0.1 * noise
    norms = inputs.norm(dim=1, keepdim=True).clamp_min(1e-6)
    set_weight(transcoder.W_enc, inputs / norms)
    for ahead, y in enumerate(targets):
        set_weight(transcoder.decoder(ahead), y[rows] / (norms * transcoder.config.k))


def _distinct_rows(x: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """`count` row numbers of `x`, different token states first: template tokens repeat in every prompt."""
    rounded = (x * 100).round().cpu().numpy()
    _, first = np.unique(rounded, axis=0, return_index=True)
    first = rng.permutation(first)
    return torch.as_tensor(np.resize(first, count), device=x.device)
