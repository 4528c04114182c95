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
from vlmscope.training.losses.joint import Total, joint_fvu
from vlmscope.training.losses.l0 import l0_penalty
from vlmscope.training.losses.l1 import l1_penalty
from vlmscope.training.losses.matryoshka import prefix_fvu, prefix_sizes
from vlmscope.training.transcoder_config import TranscoderTrainingConfig
from vlmscope.training.transcoder_start import start
from vlmscope.transcoders.init import Standardisation, fold
from vlmscope.transcoders.nonlinearities.jump_relu import JumpReLU
from vlmscope.transcoders.nonlinearities.relu import ReLU
from vlmscope.transcoders.transcoder import SparseCode, Transcoder, TranscoderConfig, TranscoderOutput

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

    def __init__(self, config: TranscoderConfig) -> None:
        super().__init__()
        self.transcoder = Transcoder(config).train()
        d, f = config.d_model, config.n_features
        self.register_buffer("x_mean", torch.zeros(d))
        self.register_buffer("y_mean", torch.zeros(d))
        self.register_buffer("scales", torch.ones(2, dtype=torch.float64))
        self.register_buffer("silent", torch.zeros(f, dtype=torch.long))  # tokens since the feature last fired
        self.register_buffer("stopped", torch.tensor(-1))  # the step that was not taken, -1 while all is well
        self.register_buffer("losses", torch.full((_WINDOW,), math.nan, dtype=torch.float64))

    @property
    def standard(self) -> Standardisation:
        """The coordinates of training."""
        return Standardisation(self.x_mean, float(self.scales[0]), self.y_mean, float(self.scales[1]))

    def standardise(self, x: Tensor, y: Tensor) -> None:
        """Take means and scales from raw activations [N, d], [N, d]."""
        layer = self.transcoder.config.layer
        if not (bool(x.isfinite().all()) and bool(y.isfinite().all())):
            raise UserError(
                f"layer {layer}: activations of the first batches are not finite; "
                "look at the data, or give the model another model.dtype"
            )
        standard = Standardisation.fit(x, y)
        self.x_mean.copy_(standard.x_mean)
        self.y_mean.copy_(standard.y_mean)
        self.scales.copy_(torch.tensor([standard.x_scale, standard.y_scale]))

    def start(self, x: Tensor, targets: Sequence[Tensor], method: str, seed: int) -> None:
        """Set the weights; arguments as those of `vlmscope.training.transcoder_start.start`."""
        rng = generator(seed, "transcoder_start", self.transcoder.config.layer)
        start(self.transcoder, x, targets, method, rng)

    def loss(
        self,
        x: Tensor,
        y: Tensor,
        config: TranscoderTrainingConfig,
        total: Total | None = None,
        earlier: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, TranscoderOutput]:
        """Loss and FVU (scalars) of raw activations [N, d], and the output in standardised coordinates.

        With `total` (`vlmscope.training.losses.joint`) the activations are a host's part of a batch. `earlier` [N, d]
        is what features of lower layers write here, in standardised coordinates (cross-layer sets).
        """
        x, y = self.standard.apply(x.float(), y.float())
        one = self.transcoder
        out = one(x)
        if earlier is not None:
            out = replace(out, reconstruction=out.reconstruction + earlier)
        unexplained = joint_fvu(y, out.reconstruction, total)
        loss = unexplained
        sizes = prefix_sizes(config.matryoshka, one.config.n_features)
        if sizes:
            prefixes = prefix_fvu(one, out.code, x, y, sizes, total)
            loss = (loss + len(sizes) * prefixes) / (1 + len(sizes))
        dead = dead_features(self.silent, config.dead_after_tokens)
        if len(dead) and config.aux_coefficient:
            residual = (y - out.reconstruction).detach()
            loss = loss + config.aux_coefficient * aux_k(one, x, residual, out.pre, dead, config.aux_k, total)
        if config.sparsity_coefficient:
            penalty = self._penalty(out, total)
            loss = loss if penalty is None else loss + config.sparsity_coefficient * penalty
        return loss, unexplained, out

    def _penalty(self, out: TranscoderOutput, total: Total | None) -> Tensor | None:
        """What keeps the number of active features low, where the nonlinearity does not."""
        match self.transcoder.activation:
            case JumpReLU() as jump:
                return l0_penalty(jump, out.at_support, out.code.indices, self.transcoder.config.k, total)
            case ReLU():
                return l1_penalty(out.code.values, out.code.indices, self.transcoder.write_norms(), total)
            case _:
                return None

    def note_fired(self, code: SparseCode, add_up: Callable[[Sequence[Tensor]], None] | None = None) -> None:
        """Advance the clock of every feature by the batch's tokens and set it back where a feature fired.

        `add_up` adds tensors over hosts, where the batch is divided among them.
        """
        fired = torch.zeros_like(self.silent)
        fired[code.indices[code.active]] = 1
        tokens = fired.new_tensor(code.values.shape[0])
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
