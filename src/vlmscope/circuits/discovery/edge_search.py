"""Circuits of edges: ranked by EAP-IG, by graphs and at random, and run in the frozen replacement model."""

from __future__ import annotations

import numpy as np

from vlmscope.circuits.discovery.config import DiscoveryConfig
from vlmscope.circuits.discovery.edges import REST, PairEdges, edge_table, run_edges
from vlmscope.circuits.discovery.graphs import GraphScores
from vlmscope.circuits.discovery.pair_edges import pair_edges
from vlmscope.circuits.discovery.result import EdgesFound
from vlmscope.circuits.discovery.scores import order_of
from vlmscope.circuits.discovery.search import FINER, Runner
from vlmscope.core.records import generator
from vlmscope.metrics.prediction import faithfulness, faithfulness_curve, sizes, spearman

Edge = tuple[int, int]


def discover_edges(
    choosing: Runner, judging: Runner, effects: np.ndarray, traced: GraphScores, settings: DiscoveryConfig
) -> EdgesFound:
    """Score edges on training pairs and run circuits of them on test pairs.

    Args:
        choosing: training pairs.
        judging: test pairs.
        effects: [B, N], EAP-IG's scores of nodes.
        traced: what graphs say.
        settings: `edge_nodes`, `edge_pairs`, `steps`, `keep`, `seed`.
    """
    features = np.flatnonzero(choosing.nodes.is_feature)
    targets = features[order_of(effects.mean(0)[features])[: settings.edge_nodes]]
    train, test = (_pairs(runner, targets, settings) for runner in (choosing, judging))
    table = edge_table(train)
    names: list[Edge] = list(zip(table.source.tolist(), table.target.tolist(), strict=True))
    score = table.score.mean(0)
    flow = np.array([traced.edges.get(name, 0.0) for name in names])
    rng = generator(settings.seed, "random edges")
    # What no graph has follows at random.
    orders = {
        "graph": np.lexsort((rng.random(len(names)), -flow)),
        "eap_ig": order_of(score),
        "random": rng.permutation(len(names)),
    }
    counts = sizes(len(names))
    clean, corrupt = _ends(test)
    curves = {}
    for name, order in orders.items():
        circuits: list[set[Edge] | None] = [{names[i] for i in order[:count].tolist()} for count in counts[:-1]]
        curves[name] = faithfulness_curve(run_edges(test, [*circuits, None]), clean, corrupt, counts, settings.seed)
    count = _smallest(train, names, orders["eap_ig"], settings.keep)
    chosen = {names[i] for i in orders["eap_ig"][:count].tolist()}
    seen = ((flow != 0) | (score != 0)) & (table.source >= 0)
    total = float(np.mean(clean - corrupt))
    return EdgesFound(
        table.source,
        table.target,
        score,
        flow,
        curves,
        count,
        faithfulness(run_edges(test, [chosen])[0], clean, corrupt, settings.seed),
        spearman(np.abs(score)[seen], flow[seen]),
        1.0 - float(np.mean(_without_rest(test) - corrupt)) / total,
    )


def _pairs(runner: Runner, targets: np.ndarray, settings: DiscoveryConfig) -> list[PairEdges]:
    count = settings.edge_pairs
    return pair_edges(runner.scope, runner.sides, runner.nodes, targets, count, settings.steps)


def _ends(pairs: list[PairEdges]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([pair.clean for pair in pairs]), np.array([pair.corrupt for pair in pairs])


def _without_rest(pairs: list[PairEdges]) -> np.ndarray:
    """m [B] when every edge is kept but those from the rest."""
    found = []
    for pair in pairs:
        # A node has an instance at each of its positions, but is one source and one target.
        sources = np.unique(np.concatenate([pair.sources, pair.node])).tolist()
        targets = np.unique(pair.node).tolist()
        every = {(source, target) for source in sources for target in targets if source != REST}
        found.append(run_edges([pair], [every])[0, 0])
    return np.array(found)


def _smallest(pairs: list[PairEdges], names: list[Edge], order: np.ndarray, wanted: float) -> int:
    """The fewest first edges whose f reaches `wanted`, of sizes 10 % apart; all if none does."""
    clean, corrupt = _ends(pairs)
    grid = [1]
    while grid[-1] < len(names):
        grid.append(min(len(names), max(grid[-1] + 1, int(grid[-1] * FINER))))
    low, high = 0, len(grid) - 1
    while low < high:
        middle = (low + high) // 2
        m = run_edges(pairs, [{names[i] for i in order[: grid[middle]].tolist()}])[0]
        reached = (m.mean() - corrupt.mean()) / (clean.mean() - corrupt.mean()) >= wanted
        low, high = (low, middle) if reached else (middle + 1, high)
    return grid[low]
