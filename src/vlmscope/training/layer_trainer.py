"""Training of one layer's transcoder: its starting point, its loss, its step in micro-batches, and what stops it.

Loss, in standardised coordinates: FVU of the batch (as in the paper) + aux_coefficient x AuxK + sparsity_coefficient x
the penalty of a nonlinearity that needs one. The loss of a cross-layer set is the sum of its layers' losses, each from
the features of its own layer and of all below (Ameisen et al. 2025).

Starting point, in standardised coordinates: a feature starts as one token of the data, W_enc[f] = x_n / |x_n|,
W_dec[f] = y_n / (k |x_n|). Every feature fires at least near its own token, so few start dead, and the first
reconstruction is an average over similar tokens. In a cross-layer set m + 1 layers write to layer m, and each starts
with its share: W_dec[l -> m][f] = y_m,n / (k |x_n| (m + 1)).

JumpReLU and ReLU do not fix the number of active features, and with thresholds at 0 half of all features would be
active at first. So each feature's threshold (JumpReLU's threshold, the negative of ReLU's bias) starts where the
feature is active at k / F of the starting tokens. JumpReLU's rows are then rescaled (W_enc down, W_dec up: the same
function) until all thresholds are 2: an optimiser that moves every number by about its rate would hardly move a
threshold of 6 in some hundred steps, and L0 would drift away from k.

Measured, before inputs were half whitened (`Standardisation`), on layer 2 of Orrery (d = 128, F = 1024, k = 16, 100
steps of 2,000 tokens at 3e-3), FVU and L0 on other pictures, TopK having an FVU of 0.073: JumpReLU 0.074 and 14.4; with
thresholds of 1, 0.072 and 20.5; not rescaled, 0.090 and 8.4; not rescaled and one threshold for all features, 0.190 and
8.3; ReLU with a coefficient of 0.003, 0.074 and 24 (0.079 and 27 without the scaling of W_dec, `_best_scale`). On one
layer of an Orrery with a trained tower and a random decoder (F = 2048, 300 steps of 2,048 tokens at 3e-3), FVU and dead
features were 0.044 and 9 %; with the paper's start (W_dec = 0, W_enc uniform), 0.054 and 28 %.

A step may be taken in micro-batches. The terms of the loss that are not sums over tokens, which are the FVU's
denominators and the mean that L0's penalty squares, are then computed of the whole step (`Step`) before the first
micro-batch is differentiated, so that values and gradients add up to those of the step.

Shapes: N tokens of a step or a micro-batch, d model width, F features, k slots for the active features of a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from vlmscope.core.errors import UserError
from vlmscope.core.records import generator
from vlmscope.metrics.dictionary import fvu
from vlmscope.training.config import RecipeConfig
from vlmscope.transcoders.config import TranscoderConfig
from vlmscope.transcoders.nonlinearities import JumpReLU, ReLU
from vlmscope.transcoders.transcoder import (
    SparseCode,
    Standardisation,
    Transcoder,
    TranscoderOutput,
    fold,
    gather_pre_activations,
    set_weight,
    sparse_decode,
    written_before,
)

_THRESHOLD = 2.0  # JumpReLU's thresholds at the start, in pre-activations
_LEAST = 1e-2  # lower bound of thresholds before rescaling, which divides by them
_FEATURES_AT_ONCE = 1024
_TOKENS = 2048
_WINDOW = 64  # steps of the running median of the loss
_ENOUGH = 8  # losses before the median means anything
_EXPLOSION = 1e3  # a layer stops when its loss is this many times its running median


@dataclass(frozen=True)
class Step:
    """Figures of a whole step that its micro-batches need; scalars without gradient.

    `tokens` of the step; `deviations`, the FVU's denominator; `residual_deviations`, that of AuxK, nan without dead
    features; `mean_l0`, active features per token, nan unless a penalty needs it.
    """

    tokens: int
    deviations: Tensor
    residual_deviations: Tensor
    mean_l0: Tensor


def squared_deviations(target: Tensor) -> Tensor:
    """The FVU's denominator: squared deviations of [N, d] from the mean, a scalar."""
    return (target - target.mean(0)).square().sum()


def step_fvu(target: Tensor, reconstruction: Tensor, step: Step | None) -> Tensor:
    """FVU of [N, d], [N, d]; for a micro-batch of `step`, its summand."""
    if step is None:
        return fvu(target, reconstruction)
    return (target - reconstruction).square().sum() / step.deviations


def step_mean(values: Tensor, step: Step | None) -> Tensor:
    """Mean over tokens of one number per token, [N]; for a micro-batch of `step`, its summand."""
    return values.mean() if step is None else values.sum() / step.tokens


def dead_features(silent: Tensor, after_tokens: int) -> Tensor:
    """Indices of the features that were silent for at least `after_tokens`: [F] int64 -> [m] int64."""
    return torch.nonzero(silent >= after_tokens).flatten()


def aux_k(
    transcoder: Transcoder, x: Tensor, residual: Tensor, pre: Tensor, dead: Tensor, count: int, step: Step | None = None
) -> Tensor:
    """AuxK, which trains dead features: FVU of the residual, explained by each token's `count` strongest dead features.

    `residual` [N, d] is target minus reconstruction, `pre` [N, F] all pre-activations, both detached; `dead` [m] int64,
    m > 0. Source: Gao et al. 2024, arXiv 2406.04093, appendix A.2.
    """
    strongest = pre[:, dead].topk(min(count, len(dead)), dim=-1).indices
    indices = dead[strongest]
    values = gather_pre_activations(pre, indices, x, transcoder.W_enc, transcoder.b_enc).relu()
    step = None if step is None else replace(step, deviations=step.residual_deviations)
    return step_fvu(residual, sparse_decode(indices, values, transcoder.W_dec), step)


def l0_penalty(activation: JumpReLU, at_support: Tensor, indices: Tensor, k: int, step: Step | None = None) -> Tensor:
    """`(L0 / k - 1)^2` from the pre-activations [N, m] at the support's indices [N, m], with a gradient to thresholds.

    The variant of arXiv 2407.14435, section 3, that aims at a number k of active features instead of weighing it.
    """
    mean = step_mean(activation.steps(at_support, indices).sum(-1), step)
    if step is None:
        return (mean / k - 1).square()
    # The chain rule by hand: the slope of the square at the step's mean, and this micro-batch's share of the value.
    excess = step.mean_l0 / k - 1
    share = len(indices) / step.tokens
    return excess.square() * share + 2 * excess / k * (mean - mean.detach())


def l1_penalty(values: Tensor, indices: Tensor, norms: Tensor, step: Step | None = None) -> Tensor:
    """Mean over tokens of `sum_f a_f |W_dec[f]|`: values, indices [N, k], norms of decoder rows [F] -> scalar.

    With these weights no rescaling of activations and decoder can lower it (Conerly et al. 2024).
    """
    return step_mean((values * norms[indices]).sum(-1), step)


def start(transcoder: Transcoder, x: Tensor, targets: Sequence[Tensor], rng: np.random.Generator) -> None:
    """Set the weights to the starting point above, from standardised inputs [N, d].

    `targets` are the transcoder's shares of the standardised targets [N, d] of its own layer and of each later layer
    that it writes to.
    """
    assert len(targets) == transcoder.config.writes, (len(targets), transcoder.config.writes)
    decoders = [transcoder.decoder(ahead) for ahead in range(len(targets))]
    f, d = transcoder.config.n_features, transcoder.config.d_model
    rows = _distinct_rows(x, f, rng)
    noise = torch.as_tensor(rng.standard_normal((f, d)), dtype=x.dtype, device=x.device)
    # With fewer tokens than features several features start from the same token; the noise separates them.
    inputs = x[rows] + 0.1 * noise
    norms = inputs.norm(dim=1, keepdim=True).clamp_min(1e-6)
    set_weight(transcoder.W_enc, inputs / norms)
    for decoder, y in zip(decoders, targets, strict=True):
        set_weight(decoder, y[rows] / (norms * transcoder.config.k))
    match transcoder.activation:
        case JumpReLU() as jump:
            thresholds = _quantiles(transcoder, x).clamp_min(_LEAST)
            rescaling = (thresholds / _THRESHOLD)[:, None]
            set_weight(transcoder.W_enc, transcoder.W_enc / rescaling)
            for decoder in decoders:
                set_weight(decoder, decoder * rescaling)
            jump.take_thresholds(torch.full_like(thresholds, _THRESHOLD))
        case ReLU():
            set_weight(transcoder.b_enc, -_quantiles(transcoder, x))
            scale = _best_scale(transcoder, x[:_TOKENS], targets[0][:_TOKENS])
            for decoder in decoders:
                set_weight(decoder, decoder * scale)
        case _:
            pass


def _distinct_rows(x: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """`count` row numbers of `x`, repeating only after all distinct ones: template tokens recur in every prompt."""
    rounded = (x * 100).round().cpu().numpy()
    _, first = np.unique(rounded, axis=0, return_index=True)
    first = rng.permutation(first)
    return torch.as_tensor(np.resize(first, count), device=x.device)


@torch.no_grad()
def _quantiles(transcoder: Transcoder, x: Tensor) -> Tensor:
    """For each feature the pre-activation that k / F of the tokens `x` [N, d] exceed: [F], with encoder biases of 0."""
    n, f = len(x), transcoder.config.n_features
    above = min(max(1, round(transcoder.config.k * n / f)), n - 1)
    # Half-way to the next largest number, since at a token's own value rounding would decide. In blocks of features,
    # since [N, F] may not fit into memory.
    parts = [
        (x @ rows.T).topk(above + 1, dim=0).values[-2:].mean(0) for rows in transcoder.W_enc.split(_FEATURES_AT_ONCE)
    ]
    return torch.cat(parts)


@torch.no_grad()
def _best_scale(transcoder: Transcoder, x: Tensor, y: Tensor) -> float:
    """The factor with which the reconstruction explains `y` best: ReLU's bias removed most of each activation."""
    reconstruction = transcoder(x).reconstruction
    power = float(reconstruction.square().sum())
    return float((reconstruction * y).sum()) / power if power else 1.0


@dataclass(frozen=True)
class LayerStep:
    """Result of a layer's step: loss, FVU, features that fired [F] int64, tokens."""

    loss: float
    fvu: float
    fired: Tensor
    n_tokens: int


class LayerTrainer(nn.Module):
    """One layer: its transcoder in standardised coordinates, the standardisation, and each feature's silence."""

    x_mean: Tensor
    x_map: Tensor
    y_mean: Tensor
    y_scale: Tensor
    silent: Tensor
    stopped: Tensor
    losses: Tensor

    def __init__(
        self, config: TranscoderConfig, recipe: RecipeConfig | None = None, product_dtype: torch.dtype | None = None
    ) -> None:
        """All weights start at zero. `product_dtype` is that of the encoder's dense product (see `Transcoder`)."""
        super().__init__()
        self.recipe = recipe if recipe is not None else RecipeConfig()
        self.transcoder = Transcoder(config).train()
        self.transcoder.product_dtype = product_dtype
        d, f = config.d_model, config.n_features
        self.register_buffer("x_mean", torch.zeros(d))
        self.register_buffer("x_map", torch.eye(d))
        self.register_buffer("y_mean", torch.zeros(d))
        self.register_buffer("y_scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("silent", torch.zeros(f, dtype=torch.long))  # tokens since the feature last fired
        self.register_buffer("stopped", torch.tensor(-1))  # the step that was refused, -1 while the layer learns
        self.register_buffer("losses", torch.full((_WINDOW,), math.nan, dtype=torch.float64))

    @property
    def standard(self) -> Standardisation:
        """The coordinates of training."""
        return Standardisation(self.x_mean, self.x_map, self.y_mean, float(self.y_scale))

    def standardised(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Raw activations [N, d], [N, d] in the coordinates and the dtype of training."""
        return self.standard.apply(x.to(self.x_mean.dtype), y.to(self.x_mean.dtype))

    def standardise(self, x: Tensor, y: Tensor) -> None:
        """Set the coordinates from raw activations [N, d], [N, d]; UserError unless they are finite."""
        if not (bool(x.isfinite().all()) and bool(y.isfinite().all())):
            raise UserError(
                f"layer {self.transcoder.config.layer}: activations of the first batches are not finite; "
                "look at the data, or give the model another model.dtype"
            )
        standard = Standardisation.fit(x, y)
        self.x_mean.copy_(standard.x_mean)
        self.x_map.copy_(standard.x_map)
        self.y_mean.copy_(standard.y_mean)
        self.y_scale.fill_(standard.y_scale)

    def start(self, x: Tensor, targets: Sequence[Tensor], seed: int) -> None:
        """Set the weights from standardised tokens (the function `start`)."""
        rng = generator(seed, "transcoder_start", self.transcoder.config.layer)
        start(self.transcoder, x, targets, rng)

    def loss(
        self, x: Tensor, y: Tensor, step: Step | None = None, earlier: Tensor | None = None
    ) -> tuple[Tensor, Tensor, TranscoderOutput]:
        """Loss and FVU (scalars) of raw activations [N, d], and the output in standardised coordinates.

        With `step` the activations are a micro-batch of it. `earlier` [N, d] is what features of lower layers write
        here, in standardised coordinates (cross-layer sets).
        """
        recipe, transcoder = self.recipe, self.transcoder
        x, y = self.standardised(x, y)
        out = transcoder(x)
        if earlier is not None:
            out = replace(out, reconstruction=out.reconstruction + earlier)
        unexplained = step_fvu(y, out.reconstruction, step)
        loss = unexplained
        dead = dead_features(self.silent, recipe.dead_after_tokens)
        if len(dead) and recipe.aux_coefficient:
            residual = (y - out.reconstruction).detach()
            loss = loss + recipe.aux_coefficient * aux_k(transcoder, x, residual, out.pre, dead, recipe.aux_k, step)
        weight = recipe.sparsity_weight(transcoder.config.activation)
        match transcoder.activation:
            case JumpReLU() as jump if weight:
                loss = loss + weight * l0_penalty(jump, out.at_support, out.code.indices, transcoder.config.k, step)
            case ReLU() if weight:
                loss = loss + weight * l1_penalty(out.code.values, out.code.indices, transcoder.write_norms(), step)
            case _:
                pass
        return loss, unexplained, out

    def fired(self, out: TranscoderOutput) -> Tensor:
        """Which features are active at some token of an output: [F] int64, 1 or 0."""
        fired = torch.zeros_like(self.silent)
        fired[out.code.indices[out.code.values > 0]] = 1
        return fired

    def note(self, step: LayerStep, number: int) -> None:
        """Add the step's tokens to every feature's silence, reset it for those that fired, and keep the loss."""
        self.silent += step.n_tokens
        self.silent[step.fired > 0] = 0
        self.losses[number % _WINDOW] = step.loss

    @property
    def running(self) -> bool:
        """Whether the layer still learns."""
        return int(self.stopped) < 0

    def trouble(self, loss: float, norm: float) -> str | None:
        """What is wrong with a step's loss or gradient norm, in words; None if nothing is."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"loss {loss:.4g}, gradient norm {norm:.4g}"
        known = self.losses[~self.losses.isnan()]
        median = float(known.median()) if len(known) >= _ENOUGH else math.inf
        if loss > _EXPLOSION * median > 0:
            return f"loss {loss:.4g}, more than {_EXPLOSION:g} times the running median {median:.4g}"
        return None

    def folded(self, later_scales: Sequence[float] = ()) -> Transcoder:
        """The transcoder in the model's own coordinates, without gradients (`later_scales` as in `fold`)."""
        return fold(self.transcoder, self.standard, later_scales).requires_grad_(False).eval()


def differentiate(trainer: LayerTrainer, x: Tensor, y: Tensor, backward: Callable[[Tensor], None]) -> LayerStep:
    """Add the gradients of the loss of raw activations [N, d], [N, d] to the layer's parameters.

    With `micro_tokens`, in parts of that many tokens, which add up to the whole batch exactly although the loss is not
    a mean over tokens (`Step`). Peak memory then holds [micro, F] twice instead of [N, F].
    """
    micro = trainer.recipe.micro_tokens
    if micro is None:
        loss, unexplained, out = trainer.loss(x, y)
        backward(loss)
        return LayerStep(float(loss.detach()), float(unexplained.detach()), trainer.fired(out), len(x))
    parts = list(zip(x.split(micro), y.split(micro), strict=True))
    whole = _step_figures(trainer, parts, y)
    sums = torch.zeros(2, dtype=torch.float64, device=y.device)
    fired = torch.zeros_like(trainer.silent)
    for x_part, y_part in parts:
        loss, unexplained, out = trainer.loss(x_part, y_part, whole)
        backward(loss)
        sums += torch.stack([loss.detach(), unexplained.detach()])
        fired |= trainer.fired(out)
    return LayerStep(float(sums[0]), float(sums[1]), fired, len(x))


@torch.no_grad()
def _step_figures(trainer: LayerTrainer, parts: list[tuple[Tensor, Tensor]], y: Tensor) -> Step:
    """The figures of the step that its micro-batches need.

    The FVU's denominator depends only on the targets. AuxK divides by the residual's deviations, and L0's penalty
    squares a mean: if these are needed, a first pass without gradients encodes every micro-batch and keeps the residual
    [N, d] and the number of active features.
    """
    recipe = trainer.recipe
    target = trainer.standard.apply_target(y.to(trainer.y_mean.dtype))
    unknown = target.new_tensor(math.nan)
    jump = isinstance(trainer.transcoder.activation, JumpReLU) and recipe.sparsity_weight("jumprelu") > 0
    revive = recipe.aux_coefficient > 0 and len(dead_features(trainer.silent, recipe.dead_after_tokens)) > 0
    residuals, active = [target[:0]], target.new_zeros(())
    for x_part, y_part in parts if jump or revive else []:
        inputs, targets = trainer.standardised(x_part, y_part)
        out = trainer.transcoder(inputs)
        residuals.append(targets - out.reconstruction)
        active += out.code.active.sum()
    return Step(
        len(y),
        squared_deviations(target),
        squared_deviations(torch.cat(residuals)) if revive else unknown,
        active / len(y) if jump else unknown,
    )


def cross_layer_losses(
    trainers: Mapping[int, LayerTrainer], by_layer: Mapping[int, tuple[Tensor, Tensor]]
) -> dict[int, tuple[Tensor, Tensor, TranscoderOutput]]:
    """`LayerTrainer.loss` of each layer, from the codes of its own features and of those below."""
    transcoders = {layer: trainer.transcoder for layer, trainer in trainers.items()}
    codes: dict[int, SparseCode] = {}
    losses = {}
    for layer, trainer in sorted(trainers.items()):
        earlier = written_before(transcoders, layer, codes)
        losses[layer] = trainer.loss(*by_layer[layer], earlier=earlier)
        codes[layer] = losses[layer][2].code
    return losses
