"""A layer's loss differentiated in micro-batches that add up to the whole batch exactly.

The loss is no mean over tokens: the FVU divides by deviations from the batch's mean, AuxK by those of the residual, and
L0's penalty squares a mean. The first depends on the targets alone; for the other two a first pass without gradients
encodes every micro-batch and keeps the residual [N, d] and the number of active features. What is left adds up
(`vlmscope.training.losses.joint.Part`). The gradient is clipped once, by the caller. Peak memory holds [micro, F] twice
instead of [N, F]; the first pass costs one forward more, where it is needed.

Legend: N tokens of this host's part of a step, d model width, F features.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmscope.training.layer_trainer import LayerTrainer
from vlmscope.training.losses.aux_k import dead_features
from vlmscope.training.losses.joint import Part, Total, joint_deviations
from vlmscope.training.transcoder_config import TranscoderTrainingConfig
from vlmscope.transcoders.nonlinearities.jump_relu import JumpReLU


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
