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

Legend: n instances of target features at positions, S source groups, E edges, K circuits, B pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vlmscope.attribution.adjoint import Adjoint, Columns
from vlmscope.attribution.targets import difference_target
from vlmscope.circuits.config import DiscoveryConfig
from vlmscope.circuits.discovery.nodes import ANSWER, OTHER, REST, GraphScores, Kind, Nodes, Sides, order_of
from vlmscope.circuits.discovery.search import Runner, fewest, finer_sizes
from vlmscope.circuits.pairs import code_slopes, gap_gradients
from vlmscope.core.records import generator
from vlmscope.core.results import Rate
from vlmscope.metrics.prediction import FaithfulnessCurve, faithfulness, faithfulness_curve, sizes, spearman
from vlmscope.replacement import LayerFeatures, ReplacementModel, build_replacement, feature_table
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import SparseCode

Key = tuple[int, int, int, int]  # kind, layer, role, index of a node
Edge = tuple[int, int]  # source, target: node numbers, or one of ANSWER, REST and OTHER


@dataclass(frozen=True)
class PairEdges:
    """All edges of one pair. Instances are ordered by layer, so that sources come before targets; the last one is the
    answer.
    """

    node: np.ndarray  # [n] int64, the node of each instance
    change: np.ndarray  # [n], D of it
    slope: np.ndarray  # [n], mean dm/dt of it; 1 for the answer
    sources: np.ndarray  # [S] int64, source groups whose values are given: nodes, `OTHER` groups, and last `REST`
    given: np.ndarray  # [n, S], J D summed over the group's members; in the last column the rest
    inner: np.ndarray  # [n, n], J_ts D_s between instances, strictly lower triangular
    corrupt: float  # m of the counterfactual's run, before a cap of the logits
    clean: float  # m of the original's run


def pair_edges(
    scope: Scope, sides: Sides, nodes: Nodes, targets: np.ndarray, count: int, steps: int
) -> list[PairEdges]:
    """The edges of the first `count` pairs into the answer and into the feature nodes `targets` [n], with gradients
    taken at `steps` inputs.
    """
    # These are gradients of -m.
    gradients, _ = gap_gradients(scope, sides.subject, steps)
    runner, chosen = Runner(scope, sides, nodes), set(targets.tolist())
    number = {key: row for key, row in nodes.rows().items() if row in chosen}
    return [
        _edges_of_pair(runner, row, number, {layer: -gradient[row] for layer, gradient in gradients.items()})
        for row in range(min(count, sides.subject.size))
    ]


@torch.no_grad()
def _edges_of_pair(runner: Runner, row: int, number: Mapping[Key, int], writes: Mapping[int, Tensor]) -> PairEdges:
    """Edges of one pair into the feature nodes of `number`, with gradients of m [T, d] where each layer writes."""
    scope, sides, nodes, subject = runner.scope, runner.sides, runner.nodes, runner.sides.subject
    dtype = torch.float64 if scope.adapter.dtype == torch.float64 else torch.float32
    clean, corrupt = (build_replacement(scope, inputs[row], dtype) for inputs in (subject.inputs, subject.other_inputs))
    words = int(subject.tokens[row]), int(subject.other_tokens[row])
    ends = [difference_target(side, *words, "gap") for side in (clean, corrupt)]
    values = [float(end.values[0]) for end in ends]
    whole = difference(clean, corrupt)
    adjoint = Adjoint(whole)
    columns, role_of = adjoint.columns, sides.role_of.cpu().numpy()
    layers, instances, node, change, slope = [], [], [], [], []
    for layer, features in enumerate(whole.features):
        places = zip(features.position.tolist(), features.index.tolist(), strict=True)
        mine = [
            (place, number[key])
            for place, (position, index) in enumerate(places)
            if (key := (int(Kind.FEATURE), layer, int(role_of[position]), index)) in number
            and features.activation[place] != 0
        ]
        which = torch.tensor([place for place, _ in mine], dtype=torch.int64, device=features.index.device)
        layers.append(which)
        instances += (columns.features(layer) + which).tolist()
        node += [name for _, name in mine]
        change.append(features.activation[which])
        # Slopes of features at positions, each as the only slot of a code.
        position, transcoder = features.position[which], scope.transcoders[layer]
        local = {layer + ahead: writes[layer + ahead][position] for ahead in range(transcoder.config.writes)}
        code = SparseCode(features.index[which][:, None], features.activation[which][:, None])
        slope.append(code_slopes(transcoder, code, local, layer)[:, 0])
    changes = torch.cat([*change, whole.errors.new_tensor([values[0] - values[1]])]).double().numpy(force=True)
    sources, groups = _groups(whole, columns, nodes, role_of)

    def blocks() -> Iterator[Tensor]:
        """`J_ts D_s` [.., columns] layer by layer, so that no more than a layer's are held, and last of the answer."""
        for layer, which in enumerate(layers):
            if len(which):
                yield adjoint.feature_rows(layer, which)
        position = torch.from_numpy(ends[0].positions).to(ends[0].vectors.device)
        yield adjoint.stream_rows(whole.n_layers, ends[0].vectors, position)

    n, start = len(node) + 1, 0
    inner, given = np.zeros((n, n)), np.zeros((n, len(sources) + 1))
    for block in blocks():
        into = slice(start, start + len(block))
        rows = np.zeros((len(block), columns.total))
        rows[:, : block.shape[1]] = block.numpy(force=True)
        # What a layer adds by itself is the same in both runs.
        rows[:, [columns.bias(layer) for layer in range(columns.n_layers)]] = 0.0
        inner[into, :-1] = rows[:, instances]
        rows[:, instances] = 0.0
        np.add.at(given[into].T, groups, rows.T)
        start = into.stop
    given[:, -1] = changes - given[:, :-1].sum(1) - inner.sum(1)
    return PairEdges(
        np.array([*node, ANSWER], dtype=np.int64),
        changes,
        np.concatenate([torch.cat(slope).double().numpy(force=True), [1.0]]),
        np.append(sources, REST),
        given,
        inner,
        values[1],
        values[0],
    )


def difference(clean: ReplacementModel, corrupt: ReplacementModel) -> ReplacementModel:
    """The clean replacement model with every source replaced by its change: rows of its adjoint are `J_ts D_s`."""
    features = [_union(first, second) for first, second in zip(clean.features, corrupt.features, strict=True)]
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


def _union(clean: LayerFeatures, corrupt: LayerFeatures) -> LayerFeatures:
    """Features active on either side, with the change of their activation."""
    width, n_positions = len(clean.w_enc), len(clean.offsets) - 1
    keys = [side.position * width + side.index for side in (clean, corrupt)]
    union = torch.cat(keys).unique()
    activation = clean.activation.new_zeros(len(union))
    activation[torch.searchsorted(union, keys[0])] += clean.activation
    activation[torch.searchsorted(union, keys[1])] -= corrupt.activation
    position = union // width
    counts = torch.bincount(position, minlength=n_positions)
    return replace(
        clean,
        position=position,
        index=union % width,
        activation=activation,
        pre_activation=torch.zeros_like(activation),
        offsets=[0, *np.cumsum(counts.cpu().numpy()).tolist()],
    )


def _groups(
    whole: ReplacementModel, columns: Columns, nodes: Nodes, role_of: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The source groups, nodes or features of a layer and role, and the place among them of each column, int64."""
    rows, n_roles = nodes.rows(), len(nodes.roles)
    # What is the same on both sides is no node, and has no edge: any name will do.
    nothing = OTHER - n_roles * whole.n_layers
    group = np.full(columns.total, nothing, dtype=np.int64)
    group[: columns.n_positions] = [rows.get((Kind.EMBEDDING, -1, role, -1), nothing) for role in role_of.tolist()]
    for layer, features in enumerate(whole.features):
        first = columns.features(layer)
        roles = role_of[features.position.cpu().numpy()]
        group[first : first + len(roles)] = OTHER - (layer * n_roles + roles)
        first = columns.errors(layer)
        errors = [rows.get((Kind.ERROR, layer, role, -1), nothing) for role in role_of.tolist()]
        group[first : first + columns.n_positions] = errors
    place = {name: number for number, name in enumerate(dict.fromkeys([nothing, *group.tolist()]))}
    return np.array(list(place), dtype=np.int64), np.array([place[name] for name in group.tolist()])


@dataclass(frozen=True)
class EdgeTable:
    """E edges between nodes, over all pairs: `source` and `target` [E] int64, and EAP-IG's `score` [B, E] float64."""

    source: np.ndarray
    target: np.ndarray
    score: np.ndarray


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


def _scores(pair: PairEdges) -> dict[Edge, float]:
    table: dict[Edge, float] = {}
    for sources, weights in ((pair.sources, pair.given), (pair.node, pair.inner)):
        rows, columns = np.nonzero(weights)
        values = weights[rows, columns] * pair.slope[rows]
        ends = zip(sources[columns].tolist(), pair.node[rows].tolist(), values.tolist(), strict=True)
        for source, target, value in ends:
            table[source, target] = table.get((source, target), 0.0) + value
    return table


def run_edges(pairs: Sequence[PairEdges], circuits: Sequence[set[Edge] | None]) -> np.ndarray:
    """m [K, B] of circuits of edges; None keeps every edge, also those of no table."""
    return np.stack([_run(pair, circuits) for pair in pairs], axis=1)


def _run(pair: PairEdges, circuits: Sequence[set[Edge] | None]) -> np.ndarray:
    """m [K]: instances in order, each from the values of those before it."""
    out = np.empty(len(circuits))
    n_given = len(pair.sources)
    names, of_node = np.unique(pair.node, return_inverse=True)
    heads, of_source = np.unique(np.concatenate([pair.sources, pair.node]), return_inverse=True)
    for place, edges in enumerate(circuits):
        keep = np.full((len(names), len(heads)), edges is None)
        if edges:
            ends = np.array(sorted(edges), dtype=np.int64)
            ends = ends[np.isin(ends[:, 0], heads) & np.isin(ends[:, 1], names)]
            keep[np.searchsorted(names, ends[:, 1]), np.searchsorted(heads, ends[:, 0])] = True
        mask = keep[of_node][:, of_source]
        reached = (pair.given * mask[:, :n_given]).sum(1)
        inner = pair.inner * mask[:, n_given:]
        # r = d / D of each instance, by forward substitution: d = given + inner r.
        share = np.zeros(len(pair.node))
        for i in range(len(share)):
            share[i] = (reached[i] + inner[i, :i] @ share[:i]) / pair.change[i]
        out[place] = pair.corrupt + share[-1] * pair.change[-1]
    return out


@dataclass(frozen=True)
class EdgeCircuits:
    """Scores of edges, and the circuits that are cut from them."""

    source: np.ndarray  # [E] node numbers, or `REST` and `OTHER` groups
    target: np.ndarray  # [E] node numbers, or `ANSWER`
    score: np.ndarray  # [E], EAP-IG's, mean over training pairs
    influence: np.ndarray  # [E], mean over graphs
    curves: dict[str, FaithfulnessCurve]  # by method: f over the share of edges kept, on test pairs
    smallest: int  # fewest edges by EAP-IG that reach the wanted share on training pairs
    smallest_test: Rate  # their f on test pairs
    correlation: float  # Spearman's between |score| and influence, over edges in which either is not 0
    rest: float  # the rest's share of the change of m between the sides, what frozen edges do not carry


def discover_edges(
    choosing: Runner, judging: Runner, effects: np.ndarray, traced: GraphScores, settings: DiscoveryConfig
) -> EdgeCircuits:
    """Score edges on training pairs (`choosing`) and run circuits of them on test pairs (`judging`); targets are the
    features of most effect by EAP-IG, `effects` [B, N].
    """
    features = np.flatnonzero(choosing.nodes.is_feature)
    targets = features[order_of(effects.mean(0)[features])[: settings.edge_nodes]]
    train, test = (
        pair_edges(runner.scope, runner.sides, runner.nodes, targets, settings.edge_pairs, settings.steps)
        for runner in (choosing, judging)
    )
    table = edge_table(train)
    edges: list[Edge] = list(zip(table.source.tolist(), table.target.tolist(), strict=True))
    score, flow = table.score.mean(0), np.array([traced.edges.get(edge, 0.0) for edge in edges])
    rng = generator(settings.seed, "random edges")
    # What no graph has follows at random.
    orders = {
        "graph": np.lexsort((rng.random(len(edges)), -flow)),
        "eap_ig": order_of(score),
        "random": rng.permutation(len(edges)),
    }

    def first(method: str, count: int) -> set[Edge]:
        return {edges[i] for i in orders[method][:count].tolist()}

    def ends(pairs: list[PairEdges]) -> tuple[np.ndarray, np.ndarray]:
        return np.array([pair.clean for pair in pairs]), np.array([pair.corrupt for pair in pairs])

    counts, (clean, corrupt) = sizes(len(edges)), ends(test)
    curves = {}
    for method in orders:
        m = run_edges(test, [*(first(method, count) for count in counts[:-1]), None])
        curves[method] = faithfulness_curve(m, clean, corrupt, counts, settings.seed)
    train_clean, train_corrupt = (side.mean() for side in ends(train))

    def reaches(count: int) -> bool:
        m = run_edges(train, [first("eap_ig", count)])[0].mean()
        return (m - train_corrupt) / (train_clean - train_corrupt) >= settings.keep

    smallest = fewest(finer_sizes(len(edges)), reaches)
    # m when every edge is kept but those from the rest.
    no_rest = []
    for pair in test:
        sources, into = {*pair.sources.tolist(), *pair.node.tolist()} - {REST}, set(pair.node.tolist())
        no_rest.append(run_edges([pair], [{(source, target) for source in sources for target in into}])[0, 0])
    seen = ((flow != 0) | (score != 0)) & (table.source >= 0)
    return EdgeCircuits(
        table.source,
        table.target,
        score,
        flow,
        curves,
        smallest,
        faithfulness(run_edges(test, [first("eap_ig", smallest)])[0], clean, corrupt, settings.seed),
        spearman(np.abs(score)[seen], flow[seen]),
        1.0 - float(np.mean(np.array(no_rest) - corrupt)) / float(np.mean(clean - corrupt)),
    )
