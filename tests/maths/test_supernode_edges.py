"""Edges between supernodes: sums of the graph's edges, and what changing a supernode does to another directly."""

import dataclasses

import numpy as np
from tests.maths.maths_cases import TOLERANCE, Case, dense, key_of, read_targets

from vlmscope.circuits.circuit import direct_edges, groups_of, passed_on, supernode_mask
from vlmscope.circuits.config import ERRORS, SOFT, TEXT
from vlmscope.core.graph import AttributionGraph, NodeKind
from vlmscope.core.records import Positions
from vlmscope.core.results import CircuitFeature, Supernode


def supernodes(graph: AttributionGraph) -> list[Supernode]:
    """Three of them, which share a feature; the second at the last position alone."""
    nodes = graph.nodes.of(NodeKind.FEATURE)
    found = list(dict.fromkeys(graph.nodes.feature_id(at) for at in nodes.tolist()))
    last = [graph.nodes.feature_id(at) for at in nodes[graph.roles[graph.nodes.position[nodes]] == "last"].tolist()]

    def make(name: str, features: list, positions: Positions | None = None) -> Supernode:
        members = tuple(CircuitFeature(feature, "", 0.0, 0.0) for feature in dict.fromkeys(features))
        return Supernode(name, members, positions)

    late = [feature for feature in found if feature.layer > 0]
    return [make("early", found[:9]), make("last", last, Positions(("last",))), make("late", [found[8], *late[::3]])]


def test_edges_are_the_sums_of_the_graphs(one_case: Case) -> None:
    graph, matrix = one_case.graph, dense(one_case.graph)
    nodes = supernodes(graph)
    masks = {node.name: supernode_mask(graph, node) for node in nodes}
    assert all(mask.any() for mask in masks.values())
    assert (graph.roles[graph.nodes.position[masks["last"]]] == "last").all()
    inside, around, answers = groups_of(graph, nodes, 2)
    sources, targets = inside | around, inside | answers
    edges = {(edge.source, edge.target): edge for edge in direct_edges([graph], nodes, 2)}
    assert len(answers) == 2
    for target, into in targets.items():
        total = np.abs(matrix[into]).sum()
        for source, mask in sources.items():
            expected = matrix[np.ix_(into, mask)].sum()
            if expected == 0:
                assert (source, target) not in edges
                continue
            assert abs(edges[source, target].weight - expected) <= TOLERANCE * total
            assert abs(edges[source, target].share - expected / total) <= TOLERANCE


def test_groups_of_disjoint_supernodes_cover_everything_that_goes_in(one_case: Case) -> None:
    graph = one_case.graph
    nodes = supernodes(graph)[1:2]
    edges = direct_edges([graph], nodes, 1)
    for target, mask in {"last": supernode_mask(graph, nodes[0])}.items():
        into = sum(edge.weight for edge in edges if edge.target == target)
        total = np.abs(dense(graph)[mask]).sum()
        assert abs(into - graph.nodes.target[mask].sum()) <= TOLERANCE * total  # completeness, summed


def test_what_is_passed_on_ends_at_the_first_supernode_or_source(one_case: Case) -> None:
    graph, nodes = one_case.graph, supernodes(one_case.graph)
    inside, around, answers = groups_of(graph, nodes, 1)
    absolute = np.abs(dense(graph)) * (graph.nodes.kind != NodeKind.BIAS)
    steps = absolute / np.maximum(absolute.sum(1, keepdims=True), 1e-300)

    def reached(weights: np.ndarray, steps: np.ndarray) -> np.ndarray:
        return np.linalg.solve(np.eye(len(steps)) - steps.T, steps.T @ weights)

    (end,) = answers.values()
    whole = reached(end.astype(float), steps) + end
    boxed = np.any([*inside.values()], axis=0)
    for name, mask in (inside | answers).items():
        flow = reached(whole * mask, np.where((boxed & ~mask)[:, None], 0.0, steps))
        ends = {key: around[key] for key in (SOFT, ERRORS, TEXT)[: 3 if name == "last" else 2]}
        found = {key: flow[there].sum() for key, there in (inside | ends).items() if key != name}
        shares = {source: share for source, target, share in passed_on(graph, nodes, "last") if target == name}
        assert shares.keys() == found.keys()
        assert max(abs(shares[key] - 100 * part / sum(found.values())) for key, part in found.items()) < 1e-6


def test_changing_a_supernode_moves_another_by_the_edge(one_case: Case) -> None:
    """In the frozen model, nothing else responding: all members' activations times 1.5."""
    graph, replacement = one_case.graph, one_case.replacement
    nodes = supernodes(graph)
    edges = {(edge.source, edge.target): edge.weight for edge in direct_edges([graph], nodes, 3)}
    before = read_targets(graph, replacement.replay())
    inside, _, answers = groups_of(graph, nodes, 3)
    for source, members in inside.items():
        change = {key_of(graph, at): 0.5 * float(graph.nodes.activation[at]) for at in np.flatnonzero(members).tolist()}
        moved = dict(zip(rows(graph), read_targets(graph, replacement.replay(change)) - before, strict=True))
        for target, into in (inside | answers).items():
            found = sum(moved[at] for at in np.flatnonzero(into).tolist())
            total = np.abs(dense(graph)[into]).sum()
            assert abs(found - 0.5 * edges.get((source, target), 0.0)) <= TOLERANCE * total, (source, target)


def rows(graph: AttributionGraph) -> list[int]:
    """The nodes that `read_targets` reads, in its order."""
    from tests.maths.maths_cases import rows_of

    return rows_of(graph).tolist()


def test_means_over_graphs_count_an_absent_target_as_nothing(one_case: Case) -> None:
    graph = one_case.graph
    nodes = supernodes(graph)
    silent = dataclasses.replace(graph, nodes=dataclasses.replace(graph.nodes, index=graph.nodes.index + 10_000))
    one = {(edge.source, edge.target): edge for edge in direct_edges([graph], nodes, 1)}
    both = {(edge.source, edge.target): edge for edge in direct_edges([graph, silent], nodes, 1)}
    edge = both["early", "late"]
    assert edge.graphs == 1 and abs(edge.weight - one["early", "late"].weight / 2) < 1e-12
    assert abs(edge.share - one["early", "late"].share) < 1e-12
