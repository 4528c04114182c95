"""What features read from the residual stream and what they write to it, as directions that layers can compare."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmscope.activations.capture import norm_weight_after
from vlmscope.scope import Scope


@torch.no_grad()
def write_directions(scope: Scope) -> dict[int, Tensor]:
    """Layer -> [F, d]: decoder rows, over all layers that they write to, through the norm after each MLP."""
    found = {}
    for layer in scope.transcoders.layers:
        one = scope.transcoders[layer]
        hook, writes = scope.transcoders.config.output_hook, range(layer, layer + one.config.writes)
        found[layer] = one.directions([norm_weight_after(scope.adapter, each, hook, one.b_dec) for each in writes])
    return found


@torch.no_grad()
def read_directions(scope: Scope) -> dict[int, Tensor]:
    """Layer -> [F, d]: encoder rows, through the weights of the norm before each MLP."""
    ones = torch.ones(scope.adapter.d_model, dtype=scope.adapter.dtype, device=scope.adapter.device)
    return {
        layer: scope.transcoders[layer].W_enc
        * scope.adapter.norm_scale(scope.adapter.norms(layer).mlp_in, ones).to(scope.transcoders[layer].W_enc)
        for layer in scope.transcoders.layers
    }
