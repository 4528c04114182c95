"""Edges between nodes in the frozen local replacement model: EAP-IG scores, and circuits of edges run exactly.

At a pair's original the replacement model is affine. With a, a' the values of a source s in the two runs, `J_ts` the
direct effect of s on the pre-activation of t with patterns and norm scales of the original, and `D_s = a_s - a'_s`,

    D_t = sum over s of J_ts D_s + rest_t

`rest_t` is what edges do not carry: the change of patterns, norm scales and supports between the two runs. It is an
edge of its own, from "rest" into t, so that nothing is hidden. EAP-IG's score of an edge (Hanna et al., arXiv
2403.17806) is `J_ts D_s dm/dt`, with the gradient of m averaged over inputs between the sides in the real model; the
scores of the edges into t add up to the score of t as a node.

*Running a circuit E of edges.* A target receives the clean value of a source along an edge in E and the corrupt one
along any other; a source that is a target itself has the value that its own edges in E give it:

    d_t = sum over s with (s, t) in E of J_ts d_s + [(rest, t) in E] rest_t,   m(E) = m(corrupt) + d_answer

with d_s = D_s for embeddings, errors and features that are no targets (their values are given). The empty circuit is
the counterfactual's run and the full one the original's, both exactly; between them the model is linear.

Legend: n instances of candidate features at positions, S source groups, K circuits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vlmscope.attribution.adjoint import Adjoint
from vlmscope.attribution.targets import difference_target
from vlmscope.circuits.discovery.graphs import ANSWER
from vlmscope.circuits.discovery.nodes import Kind, Nodes, role_numbers
from vlmscope.circuits.discovery.scores import mean_gradients
from vlmscope.circuits.discovery.sides import Sides
from vlmscope.models.base import Adapter
from vlmscope.replacement.features import LayerFeatures, feature_table
from vlmscope.replacement.model import ReplacementModel, build_replacement
from vlmscope.transcoders.transcoder import TranscoderSet

REST = -2  # the source of what edges do not carry
OTHER = -3  # features that are no targets: OTHER - (layer R + role)


@dataclass(frozen=True)
class PairEdges:
    """All edges of one pair. Instances are ordered by layer, so that sources come before targets.

    Attributes:
        node: [n] int64, the node of each instance.
        change: [n], D of it.
        slope: [n], mean dm/dt of it; 1 for the answer, which is the last instance, with node `ANSWER`.
        sources: [S] int64, source groups whose values are given: nodes, `OTHER` groups, and last `REST`.
        given: [n, S], J D summed over the group's members; in the last column the rest.
        inner: [n, n], J_ts D_s between instances, strictly lower triangular.
        corrupt: m of the counterfactual's run, before a cap of the logits.
        clean: m of the original's run.
    """

    node: np.ndarray
    change: np.ndarray
    slope: np.ndarray
    sources: np.ndarray
    given: np.ndarray
    inner: np.ndarray
    corrupt: float
    clean: float


@dataclass(frozen=True)
class EdgeTable:
    """E edges between nodes, over all pairs.

    Attributes:
        source: [E] int64, node numbers, `REST`, or `OTHER` groups.
        target: [E] int64, node numbers or `ANSWER`.
        score: [B, E] float64, EAP-IG's score on each pair.
    """

    source: np.ndarray
    target: np.ndarray
    score: np.ndarray

    def __len__(self) -> int:
        return len(self.source)


def pair_edges(
    adapter: Adapter,
    transcoders: TranscoderSet,
    sides: Sides,
    nodes: Nodes,
    targets: np.ndarray,
    count: int,
    steps: int,
) -> list[PairEdges]:
    """The edges of the first `count` pairs.

    Args:
        adapter: the model.
        transcoders: its transcoders; one for every layer.
        sides: the pairs.
        nodes: the nodes.
        targets: [n] numbers of the feature nodes that get incoming edges.
        count: pairs.
        steps: inputs at which gradients are taken.
    """
    gradients = mean_gradients(adapter, transcoders, sides, steps)
    number = {key: row for key, row in nodes.rows().items() if key[0] == Kind.FEATURE}
    wanted = set(targets.tolist())
    number = {key: row for key, row in number.items() if row in wanted}
    found = []
    for row in range(min(count, sides.subject.pairs.size)):
        writes = {layer: gradient[row] for layer, gradient in gradients.writes.items()}
        found.append(_one(adapter, transcoders, sides, nodes, number, row, writes))
    return found


def edge_table(pairs: Sequence[PairEdges]) -> EdgeTable:
    """All edges that any pair has, with their scores."""
    tables = [_scores(pair) for pair in pairs]
    keys = sorted({key for table in tables for key in table})
    place = {key: number for number, key in enumerate(keys)}
    score = np.zeros((len(tables), len(keys)))
    for row, table in enumerate(tables):
        score[row, [place[key] for key in table]] = list(table.values())
    source, target = np.array(keys, dtype=np.int64).reshape(-1, 2).T
    return EdgeTable(source, target, score)


def run_edges(pairs: Sequence[PairEdges], circuits: Sequence[set[tuple[int, int]] | None]) -> np.ndarray:
    """m [K, B] of circuits of edges, sets of (source, target); None keeps every edge, also those of no table."""
    return np.stack([_run(pair, circuits) for pair in pairs], axis=1)


def _run(pair: PairEdges, circuits: Sequence[set[tuple[int, int]] | None]) -> np.ndarray:
    """m [K]: instances in order, each from what was found for those before it."""
    sources = np.concatenate([pair.sources, pair.node])
    out = np.empty(len(circuits))
    names, of_node = np.unique(pair.node, return_inverse=True)
    heads, of_source = np.unique(sources, return_inverse=True)
    for place, edges in enumerate(circuits):
        keep = np.full((len(names), len(heads)), edges is None)
        if edges:
            pairs = np.array(sorted(edges), dtype=np.int64)
            known = np.isin(pairs[:, 0], heads) & np.isin(pairs[:, 1], names)
            pairs = pairs[known]
            keep[np.searchsorted(names, pairs[:, 1]), np.searchsorted(heads, pairs[:, 0])] = True
        mask = keep[of_node][:, of_source]
        n_given = len(pair.sources)
        reached = (pair.given * mask[:, :n_given]).sum(1)
        inner = pair.inner * mask[:, n_given:]
        # r = d / D of each instance, by forward substitution: d = given + inner r.
        share = np.zeros(len(pair.node))
        for i in range(len(share)):
            share[i] = (reached[i] + inner[i, :i] @ share[:i]) / pair.change[i]
        out[place] = pair.corrupt + share[-1] * pair.change[-1]
    return out


def _scores(pair: PairEdges) -> dict[tuple[int, int], float]:
    table: dict[tuple[int, int], float] = {}
    for sources, weights in ((pair.sources, pair.given), (pair.node, pair.inner)):
        rows, columns = np.nonzero(weights)
        values = weights[rows, columns] * pair.slope[rows]
        for source, target, value in zip(
            sources[columns].tolist(), pair.node[rows].tolist(), values.tolist(), strict=True
        ):
            table[source, target] = table.get((source, target), 0.0) + value
    return table


@torch.no_grad()
def _one(
    adapter: Adapter,
    transcoders: TranscoderSet,
    sides: Sides,
    nodes: Nodes,
    number: dict[tuple[int, int, int, int], int],
    row: int,
    writes: dict[int, Tensor],
) -> PairEdges:
    subject = sides.subject
    dtype = torch.float64 if adapter.dtype == torch.float64 else torch.float32
    clean, corrupt = (
        build_replacement(adapter, transcoders, inputs[row], dtype) for inputs in (subject.originals, subject.others)
    )
    words = int(subject.pairs.tokens[row]), int(subject.pairs.other_tokens[row])
    ends = [difference_target(side, *words, "gap") for side in (clean, corrupt)]
    whole = difference(clean, corrupt)
    adjoint = Adjoint(whole)
    columns = adjoint.columns
    role_of = role_numbers(nodes.roles, subject.originals[row].roles)
    layers, instances, node, change, slope = [], [], [], [], []
    for layer, features in enumerate(whole.features):
        position, index = features.position.tolist(), features.index.tolist()
        mine = [
            (place, number[key])
            for place, (p, i) in enumerate(zip(position, index, strict=True))
            if (key := (int(Kind.FEATURE), layer, int(role_of[p]), i)) in number and features.activation[place] != 0
        ]
        which = torch.tensor([place for place, _ in mine], dtype=torch.int64)
        layers.append(which)
        instances += (columns.features(layer) + which).tolist()
        node += [name for _, name in mine]
        change.append(features.activation[which])
        slope.append(_slopes(transcoders, writes, features, layer, which))
    n = len(instances) + 1
    rows = torch.zeros(n, columns.total, dtype=whole.errors.dtype)
    start = 0
    for layer, which in enumerate(layers):
        if len(which):
            found = adjoint.feature_rows(layer, which)
            rows[start : start + len(which), : found.shape[1]] = found
        start += len(which)
    position = torch.from_numpy(ends[0].positions)
    rows[-1:] = adjoint.stream_rows(whole.n_layers, ends[0].vectors, position)
    values = [float(end.values[0]) for end in ends]
    changes = torch.cat([*change, torch.tensor([values[0] - values[1]], dtype=whole.errors.dtype)]).double().numpy()
    table = rows.double().numpy()
    # What a layer adds by itself is the same in both runs.
    table[:, [columns.bias(layer) for layer in range(whole.n_layers)]] = 0.0
    sources, groups = _groups(whole, nodes, role_of, columns.total)
    inner = np.concatenate([table[:, instances], np.zeros((n, 1))], 1)
    table[:, instances] = 0.0
    given = np.zeros((n, len(sources) + 1))
    np.add.at(given.T, groups, table.T)
    given[:, -1] = changes - given[:, :-1].sum(1) - inner.sum(1)
    return PairEdges(
        np.array([*node, ANSWER], dtype=np.int64),
        changes,
        np.concatenate([torch.cat(slope).double().numpy(), [1.0]]),
        np.concatenate([sources, [REST]]),
        given,
        inner,
        values[1],
        values[0],
    )


def difference(clean: ReplacementModel, corrupt: ReplacementModel) -> ReplacementModel:
    """The clean replacement model with every source replaced by its change: rows of its adjoint are `J_ts D_s`."""
    features = [_union(one, other) for one, other in zip(clean.features, corrupt.features, strict=True)]
    state = replace(
        clean.state,
        embeddings=clean.state.embeddings - corrupt.state.embeddings,
        injections=clean.state.injections - corrupt.state.injections,
    )
    layers = [
        frozen if frozen.injection is None else replace(frozen, injection=state.injections[number])
        for number, frozen in enumerate(clean.layers)
    ]
    return replace(
        clean,
        state=state,
        layers=layers,
        features=features,
        errors=clean.errors - corrupt.errors,
        feature_activations=feature_table(features),
    )


def _union(one: LayerFeatures, other: LayerFeatures) -> LayerFeatures:
    """Features active on either side, with the change of their activation."""
    width, n_positions = len(one.w_enc), len(one.offsets) - 1
    keys = [side.position * width + side.index for side in (one, other)]
    union = torch.cat(keys).unique()
    activation = one.activation.new_zeros(len(union))
    activation[torch.searchsorted(union, keys[0])] += one.activation
    activation[torch.searchsorted(union, keys[1])] -= other.activation
    position = union // width
    counts = torch.bincount(position, minlength=n_positions)
    return replace(
        one,
        position=position,
        index=union % width,
        activation=activation,
        pre_activation=torch.zeros_like(activation),
        offsets=[0, *np.cumsum(counts.cpu().numpy()).tolist()],
    )


def _slopes(
    transcoders: TranscoderSet, writes: dict[int, Tensor], features: LayerFeatures, layer: int, which: Tensor
) -> Tensor:
    """[n], dm/da of some features of a layer: the gradient where they write, read by their decoders."""
    position, index = features.position[which], features.index[which]
    transcoder = transcoders[layer]
    parts = [
        (writes[layer + ahead][position].to(transcoder.W_dec.dtype) * transcoder.decoder(ahead)[index]).sum(-1)
        for ahead in range(transcoder.config.writes)
    ]
    return torch.stack(parts).sum(0)


def _groups(whole: ReplacementModel, nodes: Nodes, role_of: np.ndarray, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Names of the given source groups, and the group of each column, [columns] int64."""
    n_roles, n_layers = len(nodes.roles), whole.n_layers
    number = nodes.rows()
    names: list[int] = []
    place: dict[int, int] = {}

    def group(name: int) -> int:
        if name not in place:
            place[name] = len(names)
            names.append(name)
        return place[name]

    def node(kind: Kind, layer: int, role: int) -> int:
        # What is the same on both sides is no node, and has no edge: any name will do.
        return number.get((kind, layer, role, -1), OTHER - n_roles * n_layers)

    columns = Adjoint(whole).columns
    of = np.full(total, group(OTHER - n_roles * n_layers), dtype=np.int64)
    of[: columns.n_positions] = [group(node(Kind.EMBEDDING, -1, int(role))) for role in role_of]
    for layer, features in enumerate(whole.features):
        roles = role_of[features.position.cpu().numpy()]
        first = columns.features(layer)
        of[first : first + len(roles)] = [group(OTHER - (layer * n_roles + int(role))) for role in roles]
        first = columns.errors(layer)
        of[first : first + columns.n_positions] = [group(node(Kind.ERROR, layer, int(role))) for role in role_of]
    return np.array(names, dtype=np.int64), of
