"""How targets read the soft tokens: the gradient of each target with respect to what a token writes into the stream.

The frozen linear model of `vlmscope.replacement` run forwards from changes of embeddings (and of what DeepStack adds
again after later layers), and back by autograd: a second way to the edges from tokens beside the adjoint, and the only
one to total effects, where active features respond. Legend: B targets, T positions, d width, n injections.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmscope.attribution.targets import Targets
from vlmscope.replacement.features import written
from vlmscope.replacement.model import ReplacementModel


@dataclass(frozen=True)
class Readers:
    """Gradients of B targets.

    Attributes:
        embeddings: `[B, T, d]`, with respect to what enters the first layer.
        injections: `[B, n, T, d]`, with respect to what pictures add after the first n layers; n is 0 in most families.
    """

    embeddings: Tensor
    injections: Tensor

    def edges(self, embeddings: Tensor, injections: Tensor) -> Tensor:
        """`[B, T]`: each token's edge, from what it writes: `[T, d]` and `[n, T, d]`."""
        return (self.embeddings * embeddings).sum(-1) + (self.injections * injections).sum((1, 3))


def target_readers(replacement: ReplacementModel, targets: Targets, *, total: bool, summed: bool = False) -> Readers:
    """Readers of what a graph explains, whatever it is.

    Args:
        replacement: the frozen model.
        targets: the graph's targets, B of them.
        total: whether active features respond (total effect) or stay (the graph's own edges, direct effect).
        summed: one reader of the sum of all targets, in one backward pass, instead of B.
    """
    state = replacement.state
    tokens = torch.zeros_like(state.embeddings, requires_grad=True)
    injected = torch.zeros_like(state.injections, requires_grad=True)
    with torch.enable_grad():
        x, changes = tokens, []
        for layer in range(targets.layer):
            frozen, features = replacement.layers[layer], replacement.features[layer]
            h = x + frozen.attend(x, with_bias=False)
            mlp_in = frozen.mlp_in_scale * h
            changes.append(features.read(mlp_in) if total else torch.zeros_like(features.activation))
            out = written(replacement.features[: layer + 1], changes, mlp_in)
            x = frozen.leave(h + frozen.write_scale * out, with_injection=False)
            x = x + injected[layer] if layer < len(injected) else x
        if targets.after_attention:
            x = x + replacement.layers[targets.layer].attend(x, with_bias=False)
        values = (targets.vectors * x[targets.positions]).sum(-1)
        values = values.sum(0, keepdim=True) if summed else values
    found = [
        torch.autograd.grad(value, (tokens, injected), retain_graph=True, materialize_grads=True) for value in values
    ]
    return Readers(torch.stack([grads[0] for grads in found]), torch.stack([grads[1] for grads in found]))
