"""The training of one layer's transcoder: its start, its step, and micro-batches.

Starting points of a transcoder, in standardised coordinates (`vlmscope.transcoders.transcoder.Standardisation`).

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

One layer of transcoder training: its loss, its coordinates, its clocks, and what stops it.

Loss, in standardised coordinates: FVU of the batch (as the paper), averaged with those of Matryoshka prefixes where
there are any, + aux_coefficient x AuxK + sparsity_coefficient x the penalty of a nonlinearity that needs one
(`vlmscope.training.losses`).

Legend: N tokens of a batch, d model width, F features.

A layer's loss differentiated in micro-batches that add up to the whole batch exactly.

The loss is no mean over tokens: the FVU divides by deviations from the batch's mean, AuxK by those of the residual, and
L0's penalty squares a mean. The first depends on the targets alone; for the other two a first pass without gradients
encodes every micro-batch and keeps the residual [N, d] and the number of active features. What is left adds up
(`vlmscope.training.losses.joint.Part`). The gradient is clipped once, by the caller. Peak memory holds [micro, F] twice
instead of [N, F]; the first pass costs one forward more, where it is needed.

Legend: N tokens of this host's part of a step, d model width, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from vlmscope.core.errors import UserError
from vlmscope.core.records import generator
from vlmscope.training.config import TranscoderTrainingConfig
from vlmscope.training.losses.aux_k import aux_k, dead_features
from vlmscope.training.losses.joint import Joint, Part, Total, joint_deviations, joint_fvu
from vlmscope.training.losses.l0 import l0_penalty
from vlmscope.training.losses.l1 import l1_penalty
from vlmscope.training.losses.matryoshka import prefix_fvu, prefix_sizes
from vlmscope.transcoders.nonlinearities.jump_relu import JumpReLU
from vlmscope.transcoders.nonlinearities.relu import ReLU
from vlmscope.transcoders.transcoder import (
    Standardisation,
    Transcoder,
    TranscoderConfig,
    TranscoderOutput,
    fold,
    set_weight,
)

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


_WINDOW = 64  # steps of the running median of the loss
_ENOUGH = 8  # losses before the median means anything


class LayerTrainer(nn.Module):
    """One layer: its transcoder in standardised coordinates, the standardisation, and when each feature last fired."""

    x_mean: Tensor
    y_mean: Tensor
    scales: Tensor
    silent: Tensor
    stopped: Tensor
    losses: Tensor
    norm_limits: Tensor
    left_out: Tensor

    def __init__(
        self, config: TranscoderConfig, max_norm_ratio: float | None = None, product_dtype: torch.dtype | None = None
    ) -> None:
        """Weights of zero.

        Args:
            config: of the transcoder.
            max_norm_ratio: tokens whose input or target norm is so many times the median's do not count.
            product_dtype: that of the encoder's dense product (`vlmscope.transcoders.transcoder.Transcoder`).
        """
        super().__init__()
        self.max_norm_ratio = max_norm_ratio
        self.transcoder = Transcoder(config).train()
        self.transcoder.product_dtype = product_dtype
        d, f = config.d_model, config.n_features
        self.register_buffer("x_mean", torch.zeros(d))
        self.register_buffer("y_mean", torch.zeros(d))
        self.register_buffer("scales", torch.ones(2, dtype=torch.float64))
        self.register_buffer("silent", torch.zeros(f, dtype=torch.long))  # tokens since the feature last fired
        self.register_buffer("stopped", torch.tensor(-1))  # the step that was not taken, -1 while all is well
        if max_norm_ratio is not None:
            self.register_buffer("norm_limits", torch.full((2,), math.inf, dtype=torch.float64))  # of input and target
            self.register_buffer("left_out", torch.zeros(2, dtype=torch.long))  # tokens left out, tokens seen
        self.register_buffer("losses", torch.full((_WINDOW,), math.nan, dtype=torch.float64))

    @property
    def standard(self) -> Standardisation:
        """The coordinates of training."""
        return Standardisation(self.x_mean, float(self.scales[0]), self.y_mean, float(self.scales[1]))

    def standardised(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Raw activations [N, d], [N, d] in the coordinates and the dtype of training."""
        own = self.x_mean.dtype
        return self.standard.apply(x.to(own), y.to(own))

    def within_limits(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of raw activations [N, d], [N, d] whose norms are not far above the median: [M, d], [M, d].

        A few tokens of a language model, the first above all, have norms a hundred times larger and would rule means,
        scales and loss. Source: dictionary_learning leaves out what exceeds ten medians.
        """
        if self.max_norm_ratio is None:
            return x, y
        kept = (x.double().norm(dim=1) <= self.norm_limits[0]) & (y.double().norm(dim=1) <= self.norm_limits[1])
        return x[kept], y[kept]

    def note_left_out(self, n_out: int, n_seen: int, add_up: Callable[[Sequence[Tensor]], None] | None = None) -> None:
        """Count the tokens of a step that were left out for their norm; `add_up` as for `note_fired`."""
        if self.max_norm_ratio is None:
            return
        counts = self.left_out.new_tensor([n_out, n_seen])
        if add_up is not None:
            add_up([counts])
        self.left_out += counts

    def standardise(self, x: Tensor, y: Tensor) -> None:
        """Take means and scales from raw activations [N, d], [N, d]."""
        layer = self.transcoder.config.layer
        if not (bool(x.isfinite().all()) and bool(y.isfinite().all())):
            raise UserError(
                f"layer {layer}: activations of the first batches are not finite; "
                "look at the data, or give the model another model.dtype"
            )
        if self.max_norm_ratio is not None:
            medians = torch.stack([one.double().norm(dim=1).median() for one in (x, y)])
            self.norm_limits.copy_(self.max_norm_ratio * medians)
            x, y = self.within_limits(x, y)
        standard = Standardisation.fit(x, y)
        self.x_mean.copy_(standard.x_mean)
        self.y_mean.copy_(standard.y_mean)
        self.scales.copy_(torch.tensor([standard.x_scale, standard.y_scale], dtype=torch.float64))

    def start(self, x: Tensor, targets: Sequence[Tensor], method: str, seed: int) -> None:
        """Set the weights; arguments as those of `vlmscope.training.layer_trainer.start`."""
        rng = generator(seed, "transcoder_start", self.transcoder.config.layer)
        start(self.transcoder, x, targets, method, rng)

    def loss(
        self,
        x: Tensor,
        y: Tensor,
        config: TranscoderTrainingConfig,
        joint: Joint = None,
        earlier: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, TranscoderOutput]:
        """Loss and FVU (scalars) of raw activations [N, d], and the output in standardised coordinates.

        With `joint` (`vlmscope.training.losses.joint`) the activations are a host's or a micro-batch's part of a step.
        `earlier` [N, d] is what features of lower layers write here, in standardised coordinates (cross-layer sets).
        """
        x, y = self.standardised(x, y)
        one = self.transcoder
        out = one(x)
        if earlier is not None:
            out = replace(out, reconstruction=out.reconstruction + earlier)
        unexplained = joint_fvu(y, out.reconstruction, joint)
        loss = unexplained
        sizes = prefix_sizes(config.matryoshka, one.config.n_features)
        if sizes:
            prefixes = prefix_fvu(one, out.code, x, y, sizes, joint)
            loss = (loss + len(sizes) * prefixes) / (1 + len(sizes))
        dead = dead_features(self.silent, config.dead_after_tokens)
        if len(dead) and config.aux_coefficient:
            residual = (y - out.reconstruction).detach()
            loss = loss + config.aux_coefficient * aux_k(one, x, residual, out.pre, dead, config.aux_k, joint)
        if config.sparsity_coefficient:
            penalty = self._penalty(out, joint)
            loss = loss if penalty is None else loss + config.sparsity_coefficient * penalty
        return loss, unexplained, out

    def _penalty(self, out: TranscoderOutput, joint: Joint) -> Tensor | None:
        """What keeps the number of active features low, where the nonlinearity does not."""
        match self.transcoder.activation:
            case JumpReLU() as jump:
                return l0_penalty(jump, out.at_support, out.code.indices, self.transcoder.config.k, joint)
            case ReLU():
                return l1_penalty(out.code.values, out.code.indices, self.transcoder.write_norms(), joint)
            case _:
                return None

    def fired(self, out: TranscoderOutput) -> Tensor:
        """Which features an output has active somewhere: [F] int64, 1 or 0."""
        fired = torch.zeros_like(self.silent)
        fired[out.code.indices[out.code.values > 0]] = 1
        return fired

    def note_fired(
        self, fired: Tensor, n_tokens: int, add_up: Callable[[Sequence[Tensor]], None] | None = None
    ) -> None:
        """Advance the clock of every feature by the step's tokens and set it back where a feature fired, [F] int64.

        `add_up` adds tensors over hosts, where the batch is divided among them.
        """
        tokens = fired.new_tensor(n_tokens)
        if add_up is not None:
            add_up([fired, tokens])
        self.silent += tokens
        self.silent[fired > 0] = 0

    @property
    def running(self) -> bool:
        """Whether the layer still learns."""
        return int(self.stopped) < 0

    def trouble(self, loss: float, norm: float, config: TranscoderTrainingConfig) -> str | None:
        """What is wrong with a step's loss and gradient norm, in words; None when nothing is."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"loss {loss:.4g}, gradient norm {norm:.4g}"
        known = self.losses[~self.losses.isnan()]
        if config.explosion and len(known) >= _ENOUGH:
            median = float(known.median())
            if loss > config.explosion * median > 0:
                return f"loss {loss:.4g}, more than {config.explosion:g} times the running median {median:.4g}"
        return None

    def note_loss(self, loss: float, step: int) -> None:
        """Remember the loss of a step for the running median."""
        self.losses[step % _WINDOW] = loss

    def folded(self, later_scales: Sequence[float] = ()) -> Transcoder:
        """The transcoder in the model's own coordinates, detached from training.

        `later_scales` are the target scales of the later layers that it writes to, in order.
        """
        return fold(self.transcoder, self.standard, later_scales).requires_grad_(False).eval()


@dataclass(frozen=True)
class LayerStep:
    """What a step of a layer gave: loss and FVU over all hosts; features that fired here [F] int64, tokens here.

    `n_left_out` more tokens were left out for their norm.
    """

    loss: float
    fvu: float
    fired: Tensor
    n_tokens: int
    n_left_out: int = 0


def differentiate(
    trainer: LayerTrainer,
    x: Tensor,
    y: Tensor,
    config: TranscoderTrainingConfig,
    total: Total | None,
    backward: Callable[[Tensor], None],
) -> LayerStep:
    """Add the gradients of the loss of raw activations [N, d], [N, d] to the layer's parameters.

    With `config.micro_tokens`, so many tokens at a time. `total`: sums over hosts (`vlmscope.training.losses.joint`),
    which may have different numbers of micro-batches: nothing is sent between them while these are gone through.
    """
    given = len(x)
    x, y = trainer.within_limits(x, y)
    left_out = given - len(x)
    if config.micro_tokens is None:
        loss, unexplained, out = trainer.loss(x, y, config, total)
        backward(loss)
        return LayerStep(float(loss.detach()), float(unexplained.detach()), trainer.fired(out), len(x), left_out)
    parts = list(zip(x.split(config.micro_tokens), y.split(config.micro_tokens), strict=True))
    whole = _known_before(trainer, parts, y, config, total)
    sums = torch.zeros(2, dtype=torch.float64, device=y.device)
    fired = torch.zeros_like(trainer.silent)
    for x_part, y_part in parts:
        loss, unexplained, out = trainer.loss(x_part, y_part, config, whole)
        backward(loss)
        sums += torch.stack([loss.detach(), unexplained.detach()])
        fired |= trainer.fired(out)
    loss, unexplained = (total(sums) if total is not None else sums).tolist()
    return LayerStep(loss, unexplained, fired, len(x), left_out)


@torch.no_grad()
def _known_before(
    trainer: LayerTrainer,
    parts: list[tuple[Tensor, Tensor]],
    y: Tensor,
    config: TranscoderTrainingConfig,
    total: Total | None,
) -> Part:
    """What micro-batches must know of the step."""
    target = trainer.standardised(y, y)[1]
    tokens = target.new_tensor(float(len(y)))
    unknown = target.new_tensor(math.nan)
    jump = isinstance(trainer.transcoder.activation, JumpReLU) and config.sparsity_coefficient > 0
    revive = config.aux_coefficient > 0 and len(dead_features(trainer.silent, config.dead_after_tokens)) > 0
    residuals, active = [target[:0]], target.new_zeros(())
    for x_part, y_part in parts if jump or revive else []:
        inputs, wanted = trainer.standardised(x_part, y_part)
        out = trainer.transcoder(inputs)
        residuals.append(wanted - out.reconstruction)
        active += out.code.active.sum()
    everywhere = total if total is not None else _here
    tokens = everywhere(tokens)
    return Part(
        tokens,
        joint_deviations(target, total),
        joint_deviations(torch.cat(residuals), total) if revive else unknown,
        everywhere(active) / tokens if jump else unknown,
    )


def _here(value: Tensor) -> Tensor:
    return value
