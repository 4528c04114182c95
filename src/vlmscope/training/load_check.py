"""Does a transcoder set suit this model? FVU of every layer on some hundred tokens, from one forward of each input.

A set for another model or at another hook point still loads; its FVU is then mostly above 1, worse than the target's
mean. Orrery's set moved by one layer has 0.91 to 2.08, above 1 in 6 of 8 layers. A wrong nonlinearity shows less: the
same set read with ReLU in place of TopK has 0.08 to 0.45 instead of 0.01 to 0.07, so that no warning comes.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vlmscope.activations.hook_points import target_at
from vlmscope.core.errors import UserError
from vlmscope.metrics.reconstruction import fvu
from vlmscope.scope import Scope
from vlmscope.training.transcoder_data import collect


def check_hooks(scope: Scope) -> None:
    """Refuse transcoders between points that the model does not have or that this project does not read.

    Raises:
        UserError: with the hooks.
    """
    for layer, transcoder in scope.transcoders.transcoders.items():
        hooks = transcoder.config.input_hook, transcoder.config.output_hook
        if hooks not in (("mlp_in", "mlp_out"), ("mlp_in", "mlp_out_post")):
            raise UserError(
                f"the transcoder of layer {layer} maps {hooks[0]} to {hooks[1]}; only mlp_in to mlp_out or "
                "mlp_out_post can be used (docs/formats_transcoders.md)"
            )
        if hooks[1] == "mlp_out_post" and scope.adapter.norms(layer).mlp_out_post is None:
            raise UserError(
                f"the transcoder of layer {layer} imitates mlp_out_post, the norm after the MLP, and this model has "
                "none; choose the set trained on this model"
            )


@torch.no_grad()
def fvu_on_load(scope: Scope, forwards: Sequence[Mapping[str, Tensor]]) -> tuple[dict[int, float], int]:
    """FVU by layer at each transcoder's own hook points, and the number of tokens.

    Args:
        scope: the model and its transcoders.
        forwards: arguments of the model's forward, one batch each (`vlmscope.training.transcoder_data`).
    """
    transcoders = scope.transcoders
    activations = collect(scope.adapter, list(forwards))
    found = {}
    kind = next(transcoders.parameters()).dtype
    inputs = {layer: activations.by_layer[layer][0].to(kind) for layer in transcoders.layers}
    codes = transcoders.encode(inputs)
    for layer, transcoder in transcoders.transcoders.items():
        y = target_at(scope.adapter, layer, transcoder.config.output_hook, activations.by_layer[layer][1])
        reconstruction = transcoders.decode(layer, codes, inputs[layer])
        found[layer] = float(fvu(y.double(), reconstruction.double()))
    return found, activations.n_tokens
