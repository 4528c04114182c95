"""Starting points of a transcoder, in standardised coordinates (`vlmscope.transcoders.init.Standardisation`).

zero_decoder  W_dec = 0, W_enc uniform as kaiming_uniform(a = sqrt 5), biases 0: with means and scales taken out, this
              is the start of the paper (b_dec = mean y, b_enc = -W_enc mean x).
samples       A feature starts as one token of the data: W_enc[f] = x_n / |x_n|, W_dec[f] = y_n / (k |x_n|). Every
              feature fires at least near its own token, so few start dead, and the first reconstruction is an average
              over similar tokens instead of nothing. In a cross-layer set layer m is written to from m + 1 layers,
              each of which starts with its share: W_dec[l -> m][f] = y_m,n / (k |x_n| (m + 1)).

JumpReLU and ReLU do not fix the number of active features, and with thresholds at 0 half of all features would be
active at first. So each feature's threshold starts where the feature is active at k / F of the starting tokens:
JumpReLU's threshold, the negative of ReLU's bias. JumpReLU's rows are then rescaled (W_enc down, W_dec up: the same
function) until all thresholds are 2: an optimiser that moves every number by about its rate would hardly move one of 6
in some hundred steps, and L0 would drift away from k.

Seen on layer 2 of Orrery (d = 128, F = 1024, k = 16, 100 steps of 2,000 tokens at 3e-3; FVU, L0 on other pictures),
with TopK at 0.073: JumpReLU 0.074, 14.4; with thresholds of 1 0.072, 20.5; not rescaled 0.090, 8.4; one threshold for
all features, not rescaled 0.190, 8.3. ReLU with a coefficient of 0.003 0.074, 24 (0.079, 27 without the factor that
makes up in W_dec for what the bias takes).

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
from vlmscope.transcoders.nonlinearities.jump_relu import JumpReLU
from vlmscope.transcoders.nonlinearities.relu import ReLU
from vlmscope.transcoders.transcoder import Transcoder

_THRESHOLD = 2.0  # of JumpReLU's features at the start, in pre-activations
_LEAST = 1e-2  # a threshold to be rescaled to that, which is no use at 0 or below
_FEATURES_AT_ONCE = 1024
_TOKENS = 2048


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
    _start_weights(transcoder, x, targets, method, rng)
    decoders = [transcoder.decoder(ahead) for ahead in range(len(targets))]
    match transcoder.activation:
        case JumpReLU() as jump:
            thresholds = quantiles(transcoder, x).clamp_min(_LEAST)
            rescaling = (thresholds / _THRESHOLD)[:, None]
            set_weight(transcoder.W_enc, transcoder.W_enc / rescaling)
            for decoder in decoders:
                set_weight(decoder, decoder * rescaling)
            jump.take_thresholds(torch.full_like(thresholds, _THRESHOLD))
        case ReLU():
            set_weight(transcoder.b_enc, -quantiles(transcoder, x))
            scale = _best_scale(transcoder, x[:_TOKENS], targets[0][:_TOKENS])
            for decoder in decoders:
                set_weight(decoder, decoder * scale)
        case _:
            pass


@torch.no_grad()
def quantiles(transcoder: Transcoder, x: Tensor) -> Tensor:
    """For each feature the pre-activation that k / F of the tokens `x` [N, d] exceed: [F], with encoder biases of 0."""
    n, f = len(x), transcoder.config.n_features
    above = min(max(1, round(transcoder.config.k * n / f)), n - 1)
    # Half-way to the next largest: on a token's own value rounding would decide. Some features at once, since [N, F]
    # may not fit.
    parts = [
        (x @ rows.T).topk(above + 1, dim=0).values[-2:].mean(0) for rows in transcoder.W_enc.split(_FEATURES_AT_ONCE)
    ]
    return torch.cat(parts)


@torch.no_grad()
def _best_scale(transcoder: Transcoder, x: Tensor, y: Tensor) -> float:
    """The factor of the reconstruction that explains `y` best: the bias took most of each activation away."""
    found = transcoder(x).reconstruction
    power = float(found.square().sum())
    return float((found * y).sum()) / power if power else 1.0


def _start_weights(
    transcoder: Transcoder, x: Tensor, targets: Sequence[Tensor], method: str, rng: np.random.Generator
) -> None:
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
