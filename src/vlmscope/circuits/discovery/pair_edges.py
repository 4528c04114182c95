"""The edges of a pair of runs, from the adjoint of what changes between them (equations in `edges.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from vlmscope.attribution.adjoint import Adjoint, Columns
from vlmscope.attribution.targets import Targets, difference_target
from vlmscope.circuits.discovery.edges import OTHER, REST, PairEdges
from vlmscope.circuits.discovery.graphs import ANSWER
from vlmscope.circuits.discovery.nodes import Kind, Nodes, role_numbers
from vlmscope.circuits.discovery.scores import mean_gradients
from vlmscope.circuits.discovery.sides import Sides
from vlmscope.replacement.model import LayerFeatures, ReplacementModel, build_replacement, feature_table
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import TranscoderSet


def pair_edges(
    scope: Scope,
    sides: Sides,
    nodes: Nodes,
    targets: np.ndarray,
    count: int,
    steps: int,
) -> list[PairEdges]:
    """The edges of the first `count` pairs.

    Args:
        scope: the model and its transcoders.
        sides: the pairs.
        nodes: the nodes.
        targets: [n] numbers of the feature nodes that get incoming edges.
        count: pairs.
        steps: inputs at which gradients are taken.
    """
    gradients = mean_gradients(scope, sides, steps)
    number = {key: row for key, row in nodes.rows().items() if key[0] == Kind.FEATURE}
    wanted = set(targets.tolist())
    number = {key: row for key, row in number.items() if row in wanted}
    found = []
    for row in range(min(count, sides.subject.pairs.size)):
        writes = {layer: gradient[row] for layer, gradient in gradients.writes.items()}
        found.append(_one(scope, sides, nodes, number, row, writes))
    return found


@torch.no_grad()
def _one(
    scope: Scope,
    sides: Sides,
    nodes: Nodes,
    number: dict[tuple[int, int, int, int], int],
    row: int,
    writes: dict[int, Tensor],
) -> PairEdges:
    subject = sides.subject
    dtype = torch.float64 if scope.adapter.dtype == torch.float64 else torch.float32
    clean, corrupt = (build_replacement(scope, inputs[row], dtype) for inputs in (subject.originals, subject.others))
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
        which = torch.tensor([place for place, _ in mine], dtype=torch.int64, device=features.index.device)
        layers.append(which)
        instances += (columns.features(layer) + which).tolist()
        node += [name for _, name in mine]
        change.append(features.activation[which])
        slope.append(_slopes(scope.transcoders, writes, features, layer, which))
    values = [float(end.values[0]) for end in ends]
    changes = torch.cat([*change, whole.errors.new_tensor([values[0] - values[1]])]).double().numpy(force=True)
    sources, groups = _groups(whole, columns, nodes, role_of)
    inner, given = _folded(_rows(adjoint, whole, layers, ends[0]), columns, instances, groups, len(sources))
    given[:, -1] = changes - given[:, :-1].sum(1) - inner.sum(1)
    return PairEdges(
        np.array([*node, ANSWER], dtype=np.int64),
        changes,
        np.concatenate([torch.cat(slope).double().numpy(force=True), [1.0]]),
        np.concatenate([sources, [REST]]),
        given,
        inner,
        values[1],
        values[0],
    )


def _folded(
    blocks: Iterator[np.ndarray], columns: Columns, instances: list[int], groups: np.ndarray, n_groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """The columns of rows that are `instances`, [n, n], and sums of the others by group, [n, n_groups + 1], whose last
    column is left at 0. Rows come in blocks, so that no more than a layer's are held at full width.
    """
    n = len(instances) + 1
    inner, given = np.zeros((n, n)), np.zeros((n, n_groups + 1))
    start = 0
    for rows in blocks:
        block = slice(start, start + len(rows))
        # What a layer adds by itself is the same in both runs.
        rows[:, [columns.bias(layer) for layer in range(columns.n_layers)]] = 0.0
        inner[block, :-1] = rows[:, instances]
        rows[:, instances] = 0.0
        np.add.at(given[block].T, groups, rows.T)
        start = block.stop
    return inner, given


def _rows(adjoint: Adjoint, whole: ReplacementModel, layers: Sequence[Tensor], end: Targets) -> Iterator[np.ndarray]:
    """`J_ts D_s`, [n, columns] float64, into some features of each layer in turn, and last [1, columns] into the
    answer.
    """
    for layer, which in enumerate(layers):
        if len(which):
            found = adjoint.feature_rows(layer, which)
            rows = np.zeros((len(which), adjoint.columns.total))
            rows[:, : found.shape[1]] = found.numpy(force=True)
            yield rows
    position = torch.from_numpy(end.positions).to(end.vectors.device)
    yield adjoint.stream_rows(whole.n_layers, end.vectors, position).double().numpy(force=True)


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


def _groups(
    whole: ReplacementModel, columns: Columns, nodes: Nodes, role_of: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
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

    of = np.full(columns.total, group(OTHER - n_roles * n_layers), dtype=np.int64)
    of[: columns.n_positions] = [group(node(Kind.EMBEDDING, -1, int(role))) for role in role_of]
    for layer, features in enumerate(whole.features):
        roles = role_of[features.position.cpu().numpy()]
        first = columns.features(layer)
        of[first : first + len(roles)] = [group(OTHER - (layer * n_roles + int(role))) for role in roles]
        first = columns.errors(layer)
        of[first : first + columns.n_positions] = [group(node(Kind.ERROR, layer, int(role))) for role in role_of]
    return np.array(names, dtype=np.int64), of
