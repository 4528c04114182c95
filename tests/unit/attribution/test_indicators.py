"""Indicators of a graph against their definitions, and that the answer's probability cannot slip in."""

from dataclasses import replace

import numpy as np
import pytest

from vlmscope.attribution.indicators import NAMES, PAPER, graph_indicators
from vlmscope.attribution.influence import prune
from vlmscope.attribution.random_graph import random_graph
from vlmscope.core.graph import NodeKind


@pytest.fixture(scope="module")
def graph():
    plain = random_graph(4, 6, 18, 2, density=0.5, left_out=True, seed=3)
    return replace(plain, is_image=np.array([False, True, True, True, False, False]))


def test_indicators_are_what_they_say(graph) -> None:
    pruned = prune(graph)
    found, nodes = graph_indicators(pruned), graph.nodes
    flow = {i: pruned.influence[i] for i in nodes.of(NodeKind.FEATURE)}
    share = {i: value / sum(flow.values()) for i, value in flow.items()}
    assert found.entropy == pytest.approx(-sum(c * np.log(c) for c in share.values() if c > 0))
    assert found.top1 == pytest.approx(max(share.values()))
    assert found.distance == pytest.approx(sum(c * (5 - nodes.position[i]) for i, c in share.items()))
    ends = sum(pruned.influence[nodes.of(k)].sum() for k in (NodeKind.TOKEN, NodeKind.ERROR, NodeKind.BIAS,
                                                              NodeKind.LEFT_OUT))  # fmt: skip
    image = sum(pruned.influence[i] for i in nodes.of(NodeKind.TOKEN) if nodes.position[i] in (1, 2, 3))
    assert found.image_share == pytest.approx(image / ends) and found.image_share > 0
    assert found.image_share + found.text_share == pytest.approx(pruned.scores.token_share)
    assert (found.replacement, found.error_share) == (pruned.scores.replacement, pruned.scores.error_share)
    assert found.nodes == pruned.n_nodes
    assert set(PAPER) <= set(NAMES) == set(found.values())


def test_they_do_not_depend_on_how_probable_the_answer_is(graph) -> None:
    unsure = replace(graph, logit_probabilities=graph.logit_probabilities * 0.1)
    for name, value in graph_indicators(prune(unsure)).values().items():
        assert value == pytest.approx(graph_indicators(prune(graph)).values()[name]), name


def test_a_graph_of_one_feature_is_not_scattered(graph) -> None:
    pruned = prune(graph)
    features = graph.nodes.of(NodeKind.FEATURE)
    flow = pruned.influence.copy()
    flow[features] = 0
    none = graph_indicators(replace(pruned, influence=flow))
    assert (none.entropy, none.distance, none.top1) == (0, 0, 0)
    flow[features[4]] = 0.3
    one = graph_indicators(replace(pruned, influence=flow))
    assert (one.entropy, one.top1, one.distance) == (0, 1, 5 - graph.nodes.position[features[4]])
