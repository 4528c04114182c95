"""The nodes that a circuit may have, and scores of what each is worth for the logit difference of counterfactual pairs.

A node is a feature, the error of a layer (MLP output minus reconstruction), or what enters the model, each at a
position role: one node stands for all positions of its role, since prompts of one wording share roles. What is the
same on both sides of every pair is no node, as putting its counterfactual value there changes nothing.

With m = l[y] - l[y'], a the value on the clean side (original) and a' on the corrupt one (counterfactual), a node's
score is by

- EAP-IG (Hanna et al., arXiv 2403.17806): `(a - a') dm/da`, summed over the positions of its role, with the gradient
  averaged over inputs between the two sides (`circuits/pairs.py`). For a feature `(a - a') W_dec . dm/d(write)`,
  summed over the layers that it writes to; for errors and embeddings the dot product of the vectors.
- attribution graphs (Ameisen et al. 2025): influence in the pruned graphs of both sides, which explain m (0 if pruned).
  A feature that is active in the counterfactual alone is in no graph of the original, and matters all the same when it
  is put there: hence both sides. Influence has no sign, and says what the answer is made of, not what differs.
- activation change: how far the node moves the stream, whatever the answer.

Legend: B pairs, T positions, d model width, k slots of a code, R roles, F features of a layer, N nodes, G graphs,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.influence import influence, logit_weights, prune
from vlmscope.attribution.targets import difference_target
from vlmscope.attribution.trace import attribute
from vlmscope.circuits.pairs import PairSubject, code_slopes, gap_gradients
from vlmscope.core.graph import AttributionGraph, NodeKind, PrunedGraph
from vlmscope.core.records import FeatureId
from vlmscope.interventions.run import hook_targets, watch_inputs
from vlmscope.models.base import INJECTIONS
from vlmscope.models.batching import InputBatch
from vlmscope.replacement import build_replacement
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import SparseCode, TranscoderSet

# What edges have at their ends besides node numbers: the answer; as sources also what frozen edges do not carry, and
# features that are no targets, OTHER - (layer R + role).
ANSWER, REST, OTHER = -1, -2, -3


class Kind(IntEnum):
    """What a node is."""

    EMBEDDING = 0  # what enters the first layer (with DeepStack: what pictures add later) at a role
    FEATURE = 1
    ERROR = 2


@dataclass(frozen=True)
class Nodes:
    """N nodes, a row each."""

    roles: tuple[str, ...]
    kind: np.ndarray  # [N] int8
    layer: np.ndarray  # [N] int16, -1 for embeddings
    role: np.ndarray  # [N] int8, a number in `roles`
    index: np.ndarray  # [N] int64, of a feature, else -1

    @classmethod
    def from_keys(cls, roles: Sequence[str], keys: Sequence[tuple[int, int, int, int]]) -> Nodes:
        """Nodes from their (kind, layer, role, index)."""
        kind, layer, role, index = np.array(list(keys), dtype=np.int64).reshape(-1, 4).T
        return cls(tuple(roles), kind.astype(np.int8), layer.astype(np.int16), role.astype(np.int8), index)

    def __len__(self) -> int:
        return len(self.kind)

    @property
    def is_feature(self) -> np.ndarray:
        """[N] bool."""
        return self.kind == Kind.FEATURE

    def name(self, row: int) -> str:
        """`L5/123@last`, `error L5@image`, `embedding@image`; for the other ends of edges, what they are."""
        if row < 0:
            return {ANSWER: "answer", REST: "rest"}.get(row, "other features")
        role = self.roles[self.role[row]]
        if self.kind[row] == Kind.FEATURE:
            return f"{self.feature(row)}@{role}"
        return f"error L{self.layer[row]}@{role}" if self.kind[row] == Kind.ERROR else f"embedding@{role}"

    def feature(self, row: int) -> FeatureId:
        """The feature that a row stands for."""
        assert self.kind[row] == Kind.FEATURE, f"node {row} is no feature"
        return FeatureId(int(self.layer[row]), int(self.index[row]))

    def rows(self) -> dict[tuple[int, int, int, int], int]:
        """(kind, layer, role, index) -> row."""
        columns = (self.kind.tolist(), self.layer.tolist(), self.role.tolist(), self.index.tolist())
        return {key: row for row, key in enumerate(zip(*columns, strict=True))}

    def read(self, embeddings: Tensor, layers: Iterable[tuple[int, Tensor, Tensor]]) -> np.ndarray:
        """[.., N] float64: the nodes' entries of tables by role, from embeddings [.., R] and, layer by layer, its
        number, errors [.., R] and features [.., R, F].
        """
        out = np.zeros((*embeddings.shape[:-1], len(self)))
        rows = self.kind == Kind.EMBEDDING
        out[..., rows] = embeddings.double().cpu().numpy()[..., self.role[rows]]
        for layer, errors, features in layers:
            rows = (self.layer == layer) & (self.kind == Kind.ERROR)
            out[..., rows] = errors.double().cpu().numpy()[..., self.role[rows]]
            rows = (self.layer == layer) & self.is_feature
            out[..., rows] = features.double().cpu().numpy()[..., self.role[rows], self.index[rows]]
        return out


@dataclass(frozen=True)
class Side:
    """One side of all pairs, unedited."""

    entering: Tensor  # [B, T, d], what enters the first layer
    injections: Tensor  # [B, n, T, d], what pictures add after the first n layers; n is 0 in most families
    codes: dict[int, SparseCode]  # by layer: features [B, T, k]
    errors: dict[int, Tensor]  # by layer: [B, T, d]
    gaps: np.ndarray  # m [B] float64


@dataclass(frozen=True)
class Sides:
    """Clean (originals) and corrupt (counterfactuals); `role_of` [T] is the number in `roles` of each position."""

    subject: PairSubject
    clean: Side
    corrupt: Side
    roles: tuple[str, ...]
    role_of: Tensor

    def changes(self, transcoders: TranscoderSet, layer: int) -> Tensor:
        """[B, T, F]: clean minus corrupt activation of a layer's features."""
        width = transcoders[layer].config.n_features
        return self.clean.codes[layer].dense(width) - self.corrupt.codes[layer].dense(width)

    def by_role(self, values: Tensor) -> Tensor:
        """[B, R] float64: sums of values [B, T] over the positions of each role."""
        sums = values.new_zeros(len(values), len(self.roles), dtype=torch.float64)
        return sums.index_add_(1, self.role_of, values.double())


@torch.no_grad()
def measure(scope: Scope, subject: PairSubject) -> Sides:
    """Run both sides once, unedited, and keep the values of all nodes."""
    positions = subject.batch.roles.tolist()
    roles = tuple(dict.fromkeys(positions))
    role_of = torch.tensor([roles.index(role) for role in positions], device=scope.adapter.device)
    clean, corrupt = (_side(scope, subject, batch) for batch in (subject.batch, subject.other))
    return Sides(subject, clean, corrupt, roles, role_of.to(clean.entering.device))


def _side(scope: Scope, subject: PairSubject, batch: InputBatch) -> Side:
    outputs: dict[int, Tensor] = {}
    with ExitStack() as stack:
        inputs = watch_inputs(stack, scope.adapter, scope.transcoders.layers)
        hook_targets(stack, scope, scope.transcoders.layers, outputs.__setitem__)
        logits = scope.forward(batch)
    codes = scope.transcoders.encode(inputs)
    errors = {
        layer: out - scope.transcoders.decode(layer, codes, inputs[layer]).to(out) for layer, out in outputs.items()
    }
    gaps, entering = subject.gaps(logits).double().cpu().numpy(), batch.tensors["inputs_embeds"]
    injections = batch.tensors.get(INJECTIONS, entering.new_zeros(batch.size, 0, *entering.shape[1:]))
    return Side(entering, injections, codes, errors, gaps)


def changing_nodes(sides: Sides, transcoders: TranscoderSet) -> Nodes:
    """All nodes whose value differs between the sides of some pair."""
    clean, corrupt = sides.clean, sides.corrupt

    def differing(first: Tensor, second: Tensor) -> list[int]:
        """Roles where two tensors [B, T, ..] differ."""
        moved = (first != second).flatten(2).any(-1).any(0)
        return sides.role_of[moved].unique().tolist()

    added = differing(clean.injections.transpose(1, 2), corrupt.injections.transpose(1, 2))
    entering = sorted({*differing(clean.entering, corrupt.entering), *added})
    keys: list[tuple[int, int, int, int]] = [(Kind.EMBEDDING, -1, role, -1) for role in entering]
    for layer in transcoders.layers:
        moved = (sides.changes(transcoders, layer) != 0).any(0)  # [T, F]
        for role in range(len(sides.roles)):
            indices = torch.nonzero(moved[sides.role_of == role].any(0)).flatten().tolist()
            keys += [(Kind.FEATURE, layer, role, index) for index in indices]
        keys += [(Kind.ERROR, layer, role, -1) for role in differing(clean.errors[layer], corrupt.errors[layer])]
    return Nodes.from_keys(sides.roles, keys)


def order_of(scores: np.ndarray) -> np.ndarray:
    """[N] node numbers by |score|, largest first; equal ones in the order of the nodes."""
    return np.argsort(-np.abs(scores), kind="stable")


@torch.no_grad()
def eap_ig(scope: Scope, sides: Sides, nodes: Nodes, steps: int) -> np.ndarray:
    """[B, N] float64: EAP-IG's score of every node on every pair, in logits; positive where the clean value helps."""
    clean, corrupt, transcoders = sides.clean, sides.corrupt, scope.transcoders
    # These are gradients of -m, so every difference below is corrupt minus clean.
    writes, gradients = gap_gradients(scope, sides.subject, steps, inputs=True)
    at_input = ((corrupt.entering - clean.entering) * gradients["inputs_embeds"]).sum(-1)
    if INJECTIONS in gradients:
        at_input = at_input + ((corrupt.injections - clean.injections) * gradients[INJECTIONS]).sum((1, 3))

    def features(layer: int, code: SparseCode) -> Tensor:
        """[B, R, F]: `a d(-m)/da` summed over the positions of each role."""
        width = transcoders[layer].config.n_features
        effect = code.values * code_slopes(transcoders[layer], code, writes, layer)
        place = sides.role_of[:, None] * width + code.indices
        sums = effect.new_zeros(len(effect), len(sides.roles) * width)
        return sums.scatter_add_(1, place.flatten(1), effect.flatten(1)).view(len(effect), -1, width)

    def tables() -> Iterable[tuple[int, Tensor, Tensor]]:
        for layer in transcoders.layers:
            errors = ((corrupt.errors[layer] - clean.errors[layer]) * writes[layer]).sum(-1)
            effects = features(layer, corrupt.codes[layer]) - features(layer, clean.codes[layer])
            yield layer, sides.by_role(errors), effects

    return nodes.read(sides.by_role(at_input), tables())


def activation_change(transcoders: TranscoderSet, sides: Sides, nodes: Nodes) -> np.ndarray:
    """[N] float64, how far each node moves the stream: the norm of the change of what it writes, summed over positions,
    mean over pairs.
    """
    clean, corrupt, size = sides.clean, sides.corrupt, sides.subject.size

    def tables() -> Iterable[tuple[int, Tensor, Tensor]]:
        for layer in transcoders.layers:
            errors = sides.by_role((clean.errors[layer] - corrupt.errors[layer]).norm(dim=-1)).mean(0)
            change = sides.changes(transcoders, layer).abs().sum(0) * transcoders[layer].write_norms()
            sums = change.new_zeros(len(sides.roles), change.shape[1]).index_add_(0, sides.role_of, change)
            yield layer, errors, sums / size

    return nodes.read(sides.by_role((clean.entering - corrupt.entering).norm(dim=-1)).mean(0), tables())


@dataclass(frozen=True)
class GraphScores:
    """Influence in attribution graphs."""

    nodes: np.ndarray  # [G, N] float64
    edges: dict[tuple[int, int], float]  # by source and target (which may be `ANSWER`): mean over graphs


def graph_scores(
    scope: Scope, subject: PairSubject, nodes: Nodes, count: int, config: AttributionConfig
) -> GraphScores:
    """Trace both sides of the first `count` pairs; what is the same on both sides of all pairs gets no score."""
    table: list[np.ndarray] = []
    edges: dict[tuple[int, int], float] = {}
    rows = nodes.rows()
    pairs = list(enumerate(zip(subject.inputs, subject.other_inputs, strict=True)))[:count]
    sides = [(row, inputs) for row, both in pairs for inputs in both]
    for row, inputs in sides:
        replacement = build_replacement(scope, inputs)
        words = int(subject.tokens[row]), int(subject.other_tokens[row])
        targets = difference_target(replacement, *words, "original - counterfactual")
        graph = attribute(replacement, config, None, targets=targets)
        pruned = prune(graph, config.node_threshold, config.edge_threshold, bias=config.bias)
        number = _numbers(graph, nodes, rows)
        kept = pruned.node_mask & (number >= 0)
        table.append(np.bincount(number[kept], weights=pruned.influence[kept], minlength=len(nodes)))
        for pair, flow in _edge_flow(pruned, number).items():
            edges[pair] = edges.get(pair, 0.0) + flow / len(sides)
    return GraphScores(np.stack(table), edges)


def _numbers(graph: AttributionGraph, nodes: Nodes, rows: dict[tuple[int, int, int, int], int]) -> np.ndarray:
    """[graph nodes] int64: the number of each node, `ANSWER` for ends, `REST` for what is no node."""
    kinds = {NodeKind.TOKEN: Kind.EMBEDDING, NodeKind.FEATURE: Kind.FEATURE, NodeKind.ERROR: Kind.ERROR}
    table, role_of = graph.nodes, [nodes.roles.index(role) for role in graph.roles.tolist()]
    out = np.full(len(table), REST, dtype=np.int64)
    out[table.ends()] = ANSWER
    for kind, node_kind in kinds.items():
        for place in table.of(kind).tolist():
            index = int(table.index[place]) if node_kind == Kind.FEATURE else -1
            key = (int(node_kind), int(table.layer[place]), role_of[table.position[place]], index)
            out[place] = rows.get(key, REST)
    return out


def _edge_flow(pruned: PrunedGraph, number: np.ndarray) -> dict[tuple[int, int], float]:
    """The influence that flows through each kept edge, `|A_ts| (I_t + w_t) / sum of |edges of t|`, by node numbers."""
    graph = pruned.graph
    flow = influence(graph, logit_weights(graph), pruned.node_mask)
    kept = np.flatnonzero(pruned.edge_mask)
    target = graph.targets_of(kept)
    ends = np.stack([number[graph.indices[kept]], number[target]])
    known = (ends[0] >= 0) & (ends[1] >= ANSWER)
    values = np.abs(graph.weights[kept]).astype(np.float64) * flow.per_edge[target]
    names, place = np.unique(ends[:, known], axis=1, return_inverse=True)
    return dict(zip(map(tuple, names.T.tolist()), np.bincount(place.ravel(), values[known]).tolist(), strict=True))
