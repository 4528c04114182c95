"""How targets read the soft tokens: the gradient of each target with respect to what a token writes into the stream.

The frozen linear model of `vlmscope.replacement` run forwards from changes of embeddings (and of what DeepStack adds
again after later layers), and back by autograd: a second way to the edges from tokens beside the adjoint, and the only
one to total effects, where active features respond. Legend: B targets, T positions, d width, n injections.
"""

from collections.abc import Callable
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


def target_readers(replacement: ReplacementModel, targets: Targets, *, total: bool) -> Readers:
    """Readers of what a graph explains, whatever it is.

    Args:
        replacement: the frozen model.
        targets: the graph's targets, B of them.
        total: whether active features respond (total effect) or stay (the graph's own edges, direct effect).
    """

    def read(streams: list[Tensor]) -> Tensor:
        x = streams[-1]
        if targets.after_attention:
            x = x + replacement.layers[targets.layer].attend(x, with_bias=False)
        return (targets.vectors * x[targets.positions]).sum(-1)

    return _readers(replacement, targets.layer, read, total)


def feature_readers(replacement: ReplacementModel, layer: int, which: Tensor, *, total: bool) -> Readers:
    """Readers of the pre-activations of some features of one layer.

    Args:
        replacement: the frozen model.
        layer: the layer.
        which: `[B]` int64, numbers among the layer's active features.
        total: as for `target_readers`; features of lower layers respond.
    """
    features = replacement.features[layer]

    def read(streams: list[Tensor]) -> Tensor:
        h = streams[-1] + replacement.layers[layer].attend(streams[-1], with_bias=False)
        mlp_in = replacement.layers[layer].mlp_in_scale * h
        return (features.w_enc[features.index[which]] * mlp_in[features.position[which]]).sum(-1)

    return _readers(replacement, layer, read, total)


def _readers(
    replacement: ReplacementModel, n_layers: int, read: Callable[[list[Tensor]], Tensor], total: bool
) -> Readers:
    """Through the first `n_layers` layers, then `read` of the streams before each layer and after the last."""
    state = replacement.state
    tokens = torch.zeros_like(state.embeddings, requires_grad=True)
    injected = torch.zeros_like(state.injections, requires_grad=True)
    with torch.enable_grad():
        x, streams, changes = tokens, [tokens], []
        for layer in range(n_layers):
            frozen, features = replacement.layers[layer], replacement.features[layer]
            h = x + frozen.attend(x, with_bias=False)
            mlp_in = frozen.mlp_in_scale * h
            changes.append(features.read(mlp_in) if total else torch.zeros_like(features.activation))
            out = written(replacement.features[: layer + 1], changes, mlp_in)
            x = frozen.leave(h + frozen.write_scale * out, with_injection=False)
            x = x + injected[layer] if layer < len(injected) else x
            streams.append(x)
        values = read(streams)
    found = [
        torch.autograd.grad(value, (tokens, injected), retain_graph=True, materialize_grads=True) for value in values
    ]
    return Readers(torch.stack([grads[0] for grads in found]), torch.stack([grads[1] for grads in found]))
