"""Layers whose losses are taken together: each by itself, or all of a cross-layer set, whose features serve later ones.

The loss of a cross-layer set is the sum of its layers' losses, each from the features of its own layer and of all below
(Ameisen et al. 2025), in each layer's own standardised coordinates.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from vlmscope.training.layer_trainer import LayerTrainer
from vlmscope.training.losses.joint import Total
from vlmscope.training.transcoder_config import TranscoderTrainingConfig
from vlmscope.transcoders.transcoder import SparseCode, written_before


class LayerLoss(NamedTuple):
    """A layer's loss and FVU (scalars) with the code of its tokens."""

    loss: Tensor
    fvu: Tensor
    code: SparseCode


def group_losses(
    trainers: Mapping[int, LayerTrainer],
    by_layer: Mapping[int, tuple[Tensor, Tensor]],
    config: TranscoderTrainingConfig,
    total: Total | None,
) -> dict[int, LayerLoss]:
    """Losses of a group of layers, ascending, from raw activations `by_layer[layer]` ([N, d], [N, d])."""
    transcoders = {layer: trainer.transcoder for layer, trainer in trainers.items()}
    codes: dict[int, SparseCode] = {}
    found: dict[int, LayerLoss] = {}
    for layer, trainer in sorted(trainers.items()):
        earlier = written_before(transcoders, layer, codes)
        loss, unexplained, out = trainer.loss(*by_layer[layer], config, total, earlier)
        codes[layer] = out.code
        found[layer] = LayerLoss(loss, unexplained, out.code)
    return found
