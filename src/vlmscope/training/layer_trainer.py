"""One layer of transcoder training: its loss, its coordinates, its clocks, and what stops it.

Loss, in standardised coordinates: FVU of the batch (as the paper), averaged with those of Matryoshka prefixes where
there are any, + aux_coefficient x AuxK + sparsity_coefficient x the penalty of a nonlinearity that needs one
(`vlmscope.training.losses`).

Legend: N tokens of a batch, d model width, F features.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from vlmscope.core.errors import UserError
from vlmscope.core.seeds import generator
from vlmscope.training.losses.aux_k import aux_k, dead_features
from vlmscope.training.losses.joint import Joint, joint_fvu
from vlmscope.training.losses.l0 import l0_penalty
from vlmscope.training.losses.l1 import l1_penalty
from vlmscope.training.losses.matryoshka import prefix_fvu, prefix_sizes
from vlmscope.training.transcoder_config import TranscoderTrainingConfig
from vlmscope.training.transcoder_start import start
from vlmscope.transcoders.init import Standardisation, fold
from vlmscope.transcoders.nonlinearities.jump_relu import JumpReLU
from vlmscope.transcoders.nonlinearities.relu import ReLU
from vlmscope.transcoders.transcoder import Transcoder, TranscoderConfig, TranscoderOutput

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
        """Set the weights; arguments as those of `vlmscope.training.transcoder_start.start`."""
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
