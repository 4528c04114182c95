"""What features read from the residual stream and what they write to it, as directions that layers can compare."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmscope.activations.hook_points import norm_weight_after
from vlmscope.models.base import Adapter
from vlmscope.transcoders.transcoder import TranscoderSet


@torch.no_grad()
def write_directions(adapter: Adapter, transcoders: TranscoderSet) -> dict[int, Tensor]:
    """Layer -> [F, d]: decoder rows, over all layers that they write to, through the norm after each MLP."""
    found = {}
    for layer in transcoders.layers:
        one = transcoders[layer]
        hook, writes = transcoders.config.output_hook, range(layer, layer + one.config.writes)
        found[layer] = one.directions([norm_weight_after(adapter, each, hook, one.b_dec) for each in writes])
    return found


@torch.no_grad()
def read_directions(adapter: Adapter, transcoders: TranscoderSet) -> dict[int, Tensor]:
    """Layer -> [F, d]: encoder rows, through the weights of the norm before each MLP."""
    ones = torch.ones(adapter.d_model, dtype=adapter.dtype, device=adapter.device)
    return {
        layer: transcoders[layer].W_enc
        * adapter.norm_scale(adapter.norms(layer).mlp_in, ones).to(transcoders[layer].W_enc)
        for layer in transcoders.layers
    }
