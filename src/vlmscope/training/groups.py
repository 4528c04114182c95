"""Layers whose losses are taken together: each by itself, or all of a cross-layer set, whose features serve later ones.

The loss of a cross-layer set is the sum of its layers' losses, each from the features of its own layer and of all below
(Ameisen et al. 2025), in each layer's own standardised coordinates.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vlmscope.training.layer_trainer import LayerTrainer
from vlmscope.training.losses.joint import Total
from vlmscope.training.micro_batches import LayerStep, differentiate
from vlmscope.training.transcoder_config import TranscoderTrainingConfig
from vlmscope.transcoders.transcoder import SparseCode, TranscoderOutput, written_before


def group_steps(
    trainers: Mapping[int, LayerTrainer],
    by_layer: Mapping[int, tuple[Tensor, Tensor]],
    config: TranscoderTrainingConfig,
    total: Total | None,
    backward: Callable[[Tensor], None],
) -> dict[int, LayerStep]:
    """Add the gradients of a group's loss to its layers' parameters, from raw activations ([N, d], [N, d]) by layer."""
    if not config.cross_layer:
        return {n: differentiate(one, *by_layer[n], config, total, backward) for n, one in trainers.items()}
    found = cross_layer_losses(trainers, by_layer, config, total)
    backward(torch.stack([loss for loss, _, _ in found.values()]).sum())
    return {
        layer: LayerStep(float(loss.detach()), float(fvu.detach()), trainers[layer].fired(out), len(out.reconstruction))
        for layer, (loss, fvu, out) in found.items()
    }


def cross_layer_losses(
    trainers: Mapping[int, LayerTrainer],
    by_layer: Mapping[int, tuple[Tensor, Tensor]],
    config: TranscoderTrainingConfig,
    total: Total | None,
) -> dict[int, tuple[Tensor, Tensor, TranscoderOutput]]:
    """What `LayerTrainer.loss` gives for each layer, from the codes of its own features and of those below."""
    transcoders = {layer: trainer.transcoder for layer, trainer in trainers.items()}
    codes: dict[int, SparseCode] = {}
    found = {}
    for layer, trainer in sorted(trainers.items()):
        earlier = written_before(transcoders, layer, codes)
        found[layer] = trainer.loss(*by_layer[layer], config, total, earlier)
        codes[layer] = found[layer][2].code
    return found
