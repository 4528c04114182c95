"""Scores of nodes: what each is worth for the logit difference, pair by pair.

*EAP-IG* (Hanna et al., arXiv 2403.17806), for a node with clean value a and corrupt value a':

    e = (a - a') dm/da,   summed over the positions of its role,

the gradient of m averaged over inputs that go from the corrupt to the clean one (`circuits/pair_effects.py`). For a
feature `(a - a') W_dec . dm/d(write)`, summed over the layers that it writes to; for errors and embeddings the vectors'
dot product.

Legend: B pairs, T positions, k slots of a code, F features of a layer, R roles, N nodes, d model width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vlmscope.circuits.discovery.nodes import Kind, Nodes
from vlmscope.circuits.discovery.sides import Sides, changes
from vlmscope.circuits.pairs import GapGradients, code_slopes, gap_gradients
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import SparseCode, Transcoder, TranscoderSet


def eap_ig(scope: Scope, sides: Sides, nodes: Nodes, steps: int) -> np.ndarray:
    """[B, N] float64, e of every node on every pair, in logits; positive when the clean value helps the answer."""
    return node_effects(scope.transcoders, sides, nodes, mean_gradients(scope, sides, steps))


def mean_gradients(scope: Scope, sides: Sides, steps: int) -> GapGradients:
    """Gradients of m, mean over the way between the sides."""
    found = gap_gradients(scope, sides.subject.pairs, steps, inputs=True)
    # m is the original's answer minus the counterfactual's, the other way round than in `pair_effects`.
    entering, injections = (None if one is None else -one for one in (found.entering, found.injections))
    return GapGradients({layer: -one for layer, one in found.writes.items()}, entering, injections)


@torch.no_grad()
def node_effects(transcoders: TranscoderSet, sides: Sides, nodes: Nodes, gradients: GapGradients) -> np.ndarray:
    """[B, N] float64, `(a - a') dm/da` of every node from gradients of m."""
    clean, corrupt = sides.clean, sides.corrupt
    out = np.zeros((sides.subject.pairs.size, len(nodes)))
    role_of = _role_of(sides, nodes)
    n_roles = len(nodes.roles)
    assert gradients.entering is not None, "embeddings are nodes: their gradient is needed"
    at_input = ((clean.entering - corrupt.entering) * gradients.entering).sum(-1)
    if gradients.injections is not None and clean.injections is not None and corrupt.injections is not None:
        at_input = at_input + ((clean.injections - corrupt.injections) * gradients.injections).sum((1, 3))
    mine = nodes.kind == Kind.EMBEDDING
    out[:, mine] = _by_role(at_input, role_of, n_roles)[:, nodes.role[mine]]
    for layer in transcoders.layers:
        here = nodes.layer == layer
        mine = here & (nodes.kind == Kind.ERROR)
        change = ((clean.errors[layer] - corrupt.errors[layer]) * gradients.writes[layer]).sum(-1)
        out[:, mine] = _by_role(change, role_of, n_roles)[:, nodes.role[mine]]
        mine = here & (nodes.kind == Kind.FEATURE)
        table = _feature_effects(transcoders[layer], clean.codes[layer], gradients, layer, role_of, n_roles)
        table = table - _feature_effects(transcoders[layer], corrupt.codes[layer], gradients, layer, role_of, n_roles)
        out[:, mine] = table[:, nodes.role[mine], nodes.index[mine]].double().cpu().numpy()
    return out


def activation_change(transcoders: TranscoderSet, sides: Sides, nodes: Nodes) -> np.ndarray:
    """[N] float64, how far each node moves the stream: the norm of the change of what it writes, summed over positions,
    mean over pairs. It says nothing of the answer.
    """
    out = np.zeros(len(nodes))
    clean, corrupt, role_of = sides.clean, sides.corrupt, _role_of(sides, nodes)
    n_roles, size = len(nodes.roles), sides.subject.pairs.size
    mine = nodes.kind == Kind.EMBEDDING
    out[mine] = _by_role((clean.entering - corrupt.entering).norm(dim=-1), role_of, n_roles).mean(0)[nodes.role[mine]]
    for layer in transcoders.layers:
        here = nodes.layer == layer
        mine = here & (nodes.kind == Kind.ERROR)
        moved = (clean.errors[layer] - corrupt.errors[layer]).norm(dim=-1)
        out[mine] = _by_role(moved, role_of, n_roles).mean(0)[nodes.role[mine]]
        mine = here & (nodes.kind == Kind.FEATURE)
        change = changes(sides, transcoders, layer).abs().sum(0) * transcoders[layer].write_norms()
        table = change.new_zeros(n_roles, change.shape[1]).index_add_(0, role_of, change) / size
        out[mine] = table[nodes.role[mine], nodes.index[mine]].double().cpu().numpy()
    return out


def order_of(scores: np.ndarray) -> np.ndarray:
    """[N] node numbers by |score|, largest first; equal ones in the order of the nodes."""
    return np.argsort(-np.abs(scores), kind="stable")


def _role_of(sides: Sides, nodes: Nodes) -> Tensor:
    numbers = {role: number for number, role in enumerate(nodes.roles)}
    device = sides.clean.entering.device
    return torch.tensor([numbers[role] for role in sides.subject.pairs.batch.roles.tolist()], device=device)


def _by_role(values: Tensor, role_of: Tensor, n_roles: int) -> np.ndarray:
    """Sums [B, R] of values [B, T] over the positions of each role, float64."""
    return values.double().new_zeros(len(values), n_roles).index_add_(1, role_of, values.double()).cpu().numpy()


def _feature_effects(
    transcoder: Transcoder, code: SparseCode, gradients: GapGradients, layer: int, role_of: Tensor, n_roles: int
) -> Tensor:
    """[B, R, F]: `a dm/da` summed over the positions of each role."""
    size = len(code.indices)
    width = transcoder.config.n_features
    effect = code.values * code_slopes(transcoder, code, gradients.writes, layer)
    place = role_of[:, None] * width + code.indices
    out = effect.new_zeros(size, n_roles * width)
    return out.scatter_add_(1, place.flatten(1), effect.flatten(1)).view(size, n_roles, width)
