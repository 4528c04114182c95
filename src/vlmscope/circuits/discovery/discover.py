"""From pairs to a circuit: rankings on training pairs, curves on test pairs, the smallest circuit and its checks.

Legend: N nodes, B pairs, K sizes.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vlmscope.attribution.config import AttributionConfig
from vlmscope.circuits.discovery.config import DiscoveryConfig
from vlmscope.circuits.discovery.controls import matched_circuits, random_order
from vlmscope.circuits.discovery.edge_search import discover_edges
from vlmscope.circuits.discovery.graphs import GraphScores, graph_scores
from vlmscope.circuits.discovery.nodes import Nodes, opposite
from vlmscope.circuits.discovery.result import Discovery, FoundCircuit, Stability
from vlmscope.circuits.discovery.scores import activation_change, eap_ig, order_of
from vlmscope.circuits.discovery.search import Runner, greedy_order, prune_members, smallest
from vlmscope.circuits.discovery.sides import CircuitSubject, changes, changing_nodes, measure
from vlmscope.core.errors import UserError
from vlmscope.core.intervention import Rate
from vlmscope.core.records import generator
from vlmscope.metrics.prediction import (
    FaithfulnessCurve,
    faithfulness,
    faithfulness_curve,
    jaccard,
    mean_jaccard,
    sizes,
    spearman,
)
from vlmscope.scope import Scope


def discover(
    scope: Scope,
    train: CircuitSubject,
    test: CircuitSubject,
    settings: DiscoveryConfig,
    graphs: AttributionConfig | None = None,
) -> Discovery:
    """Find the smallest circuit of a question that keeps `settings.keep` of the logit difference.

    Args:
        scope: the model and its transcoders.
        train: pairs that choose.
        test: other pairs of the same question and wording, which judge.
        settings: what is done.
        graphs: of the attribution graphs; their defaults when None.

    Raises:
        UserError: the sides do not differ, or not in the answer; train and test do not align.
    """
    if train.pairs.batch.roles.tolist() != test.pairs.batch.roles.tolist():
        raise UserError(
            f"question {train.pairs.question!r}: training and test prompts differ in length or wording; use the same"
        )
    sides = measure(scope, train)
    if sides.clean.gaps.mean() <= sides.corrupt.gaps.mean():
        raise UserError(
            f"question {train.pairs.question!r}: the logit difference of the answers does not fall from original to "
            "counterfactual, so there is nothing to keep; give pairs that the model answers"
        )
    nodes = changing_nodes(sides, scope.transcoders)
    choosing = Runner(scope, sides, nodes)
    judging = Runner(scope, measure(scope, test), nodes)
    effects = eap_ig(scope, sides, nodes, settings.steps)
    traced = graph_scores(scope, train, nodes, settings.graphs, graphs or AttributionConfig())
    change = activation_change(scope.transcoders, sides, nodes)
    scores, orders = _rankings(choosing, effects, traced, change, settings)
    found = _found(choosing, judging, orders, change, settings)
    seen = (effects.mean(0) != 0) | (traced.nodes.mean(0) != 0)
    return Discovery(
        train.pairs.question,
        nodes,
        scores,
        {mode: _curves(judging, orders, mode, settings) for mode in settings.modes},
        found,
        _stability(judging, effects, traced, found, settings),
        spearman(np.abs(effects.mean(0))[seen], traced.nodes.mean(0)[seen]),
        discover_edges(choosing, judging, effects, traced, settings) if settings.edge_pairs else None,
        _feature_change(choosing),
        train.pairs.size,
        test.pairs.size,
        vars(settings),
    )


def _rankings(
    runner: Runner, effects: np.ndarray, traced: GraphScores, change: np.ndarray, settings: DiscoveryConfig
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Scores [N] and orders [N] by method; EAP-IG's are always there, as other things rest on them."""
    scores = {"eap_ig": effects.mean(0), "graph": traced.nodes.mean(0), "activation": change}
    orders = {name: order_of(found) for name, found in scores.items()}
    # A graph leaves most nodes without a score: these follow in the order of their change.
    orders["graph"] = np.lexsort((-change, -scores["graph"]))
    if "greedy" in settings.methods:
        orders["greedy"] = greedy_order(runner)
        scores["greedy"] = np.empty(len(runner.nodes))
        scores["greedy"][orders["greedy"]] = -np.arange(len(runner.nodes), dtype=float)
    chosen = [name for name in settings.methods if name != "random"]
    if "random" in settings.methods:
        orders["random"] = random_order(runner.nodes, orders["eap_ig"], settings.seed)
    names = {*chosen, "eap_ig"}
    return {name: scores[name] for name in scores if name in names}, {
        name: order for name, order in orders.items() if name in names or name == "random"
    }


def _curves(
    runner: Runner, orders: dict[str, np.ndarray], mode: str, settings: DiscoveryConfig
) -> dict[str, FaithfulnessCurve]:
    """f on test pairs at MIB's sizes by method; the last size is the whole model."""
    clean, corrupt = runner.ends(mode)
    counts = sizes(len(runner.nodes))
    curves = {}
    for name in settings.methods:
        order = orders[name]
        # The whole model also has what training pairs never had.
        values = [runner.run(runner.kept(order[:count]), mode) for count in counts[:-1]] + [clean]
        curves[name] = faithfulness_curve(np.stack(values), clean, corrupt, counts, settings.seed)
    return curves


def _found(
    choosing: Runner, judging: Runner, orders: dict[str, np.ndarray], change: np.ndarray, settings: DiscoveryConfig
) -> FoundCircuit:
    """Cut the best ranking where it reaches the wanted share, prune members, and judge the rest on test pairs."""
    names = [settings.by] if settings.by else [name for name in orders if name != "random"]
    cuts = {name: smallest(choosing, orders[name], settings.keep) for name in names}
    by = min(cuts, key=lambda name: cuts[name])
    pruned = prune_members(choosing, orders[by][: cuts[by]], settings.keep, settings.minimality, settings.threshold)
    members, nodes = pruned.members, choosing.nodes
    clean, corrupt = choosing.ends()
    alike = matched_circuits(nodes, members, change, settings.seed, settings.draws)
    features = members[nodes.is_feature[members]]
    test, ablated = {}, {}
    for mode in settings.modes:
        ends = judging.ends(mode)

        def rate(
            rows: np.ndarray,
            mode: str = mode,
            ends: tuple[np.ndarray, np.ndarray] = ends,
            without: bool = False,
        ) -> Rate:
            kept = judging.kept(rows)
            return faithfulness(judging.run(opposite(kept) if without else kept, mode), *ends, settings.seed)

        controls = [rate(rows).value for rows in alike]
        left = [rate(rows[nodes.is_feature[rows]], without=True).value for rows in alike]
        test[mode] = replace(rate(members), control=float(np.mean(controls)) if alike else None)
        ablated[mode] = replace(rate(features, without=True), control=float(np.mean(left)) if alike else None)
    return FoundCircuit(
        by,
        members,
        cuts[by],
        faithfulness(choosing.run(choosing.kept(members)), clean, corrupt, settings.seed),
        test,
        ablated,
        pruned.losses,
        _group_losses(judging, members),
    )


def _group_losses(runner: Runner, members: np.ndarray) -> dict[tuple[int, str], float]:
    """Loss of f when the circuit's nodes of one layer and role are dropped; layer -1 is the embeddings."""
    nodes, share = runner.nodes, runner.share(members)
    groups = sorted({(int(nodes.layer[row]), int(nodes.role[row])) for row in members.tolist()})
    losses = {}
    for layer, role in groups:
        mine = (nodes.layer[members] == layer) & (nodes.role[members] == role)
        losses[layer, nodes.roles[role]] = share - runner.share(members[~mine])
    return losses


def _stability(
    judging: Runner, effects: np.ndarray, traced: GraphScores, found: FoundCircuit, settings: DiscoveryConfig
) -> Stability:
    """Features chosen again from resampled pairs, as many as the circuit has."""
    nodes = judging.nodes
    rows = np.flatnonzero(nodes.is_feature)
    count = max(1, int(nodes.is_feature[found.members].sum()))

    def top(scores: np.ndarray) -> list[int]:
        return rows[order_of(scores[rows])[:count]].tolist()

    def resampled(table: np.ndarray, name: str) -> list[list[int]]:
        rng = generator(settings.seed, "stability", name)
        draws = rng.integers(0, len(table), (settings.resamples, len(table)))
        return [top(table[draw].mean(0)) for draw in draws]

    choices = resampled(effects, "eap_ig")
    # Two graphs, of both sides, belong to one pair.
    by_pair = traced.nodes.reshape(-1, 2, len(nodes)).mean(1)
    other = eap_ig(judging.scope, judging.sides, nodes, settings.steps).mean(0)
    rng = generator(settings.seed, "stability", "chance")
    random = [rng.choice(rows, count, replace=False).tolist() for _ in range(settings.resamples)]
    return Stability(
        {"eap_ig": mean_jaccard(choices), "graph": mean_jaccard(resampled(by_pair, "graph"))},
        jaccard(top(effects.mean(0)), top(other)),
        mean_jaccard(random),
        np.bincount(np.concatenate(choices), minlength=len(nodes)) / settings.resamples,
    )


def _feature_change(runner: Runner) -> np.ndarray:
    """[N], mean change of activation of features, summed over the positions of their role."""
    nodes, out = runner.nodes, np.zeros(len(runner.nodes))
    role_of = runner.whole().role_of
    for layer in runner.scope.transcoders.layers:
        change = changes(runner.sides, runner.scope.transcoders, layer).mean(0)
        table = change.new_zeros(len(nodes.roles), change.shape[1]).index_add_(0, role_of, change)
        mine = nodes.is_feature & (nodes.layer == layer)
        out[mine] = table.double().cpu().numpy()[nodes.role[mine], nodes.index[mine]]
    return out


def node_name(nodes: Nodes, row: int) -> str:
    """A node's name, or what stands for the answer and for what is no node in an edge."""
    if row >= 0:
        return nodes.name(row)
    return {-1: "answer", -2: "rest"}.get(row, "other features")
