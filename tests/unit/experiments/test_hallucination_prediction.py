"""Indicators of a graph are what they say; cases without anything to tell apart are refused."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from tests.random_graphs import random_graph

from vlmscope.attribution.influence import graph_indicators, prune
from vlmscope.core.errors import UserError
from vlmscope.core.graph import NodeKind
from vlmscope.tasks.experiment import own_analysis

experiment = own_analysis("hallucination_prediction")


@pytest.fixture(scope="module")
def graph():
    plain = random_graph(4, 6, 18, 2, density=0.5, left_out=True, seed=3)
    return replace(plain, is_image=np.array([False, True, True, True, False, False]))


def test_indicators_are_what_they_say(graph) -> None:
    pruned = prune(graph)
    found, nodes = graph_indicators(pruned), graph.nodes
    flow = {i: pruned.influence[i] for i in nodes.of(NodeKind.FEATURE)}
    share = {i: value / sum(flow.values()) for i, value in flow.items()}
    assert found["entropy"] == pytest.approx(-sum(c * np.log(c) for c in share.values() if c > 0))
    assert found["top1"] == pytest.approx(max(share.values()))
    assert found["distance"] == pytest.approx(sum(c * (5 - nodes.position[i]) for i, c in share.items()))
    ends = sum(pruned.influence[nodes.of(k)].sum() for k in (NodeKind.TOKEN, NodeKind.ERROR, NodeKind.BIAS,
                                                              NodeKind.LEFT_OUT))  # fmt: skip
    image = sum(pruned.influence[i] for i in nodes.of(NodeKind.TOKEN) if nodes.position[i] in (1, 2, 3))
    assert found["image_share"] == pytest.approx(image / ends) and found["image_share"] > 0
    assert found["image_share"] + found["text_share"] == pytest.approx(pruned.scores.token_share)
    assert (found["replacement"], found["error_share"]) == (pruned.scores.replacement, pruned.scores.error_share)
    assert found["nodes"] == pruned.n_nodes
    assert set(experiment.NAMES) == set(found)


def test_cases_without_anything_to_tell_apart_are_refused() -> None:
    cases = pd.DataFrame({"question": ["name", "name", "cover"], "wrong": [False, False, True]})
    with pytest.raises(UserError, match="no question has right and wrong answers"):
        experiment.check_errors(cases)
    settings = experiment.Settings({"planets": 0, "hands": 4}, [0.0, 0.6], 10, 50)
    with pytest.raises(UserError, match="analysis.scenes asks 1 question"):
        next(experiment.asked_cases(SimpleNamespace(analysis=settings, cfg=SimpleNamespace(seed=0))))
