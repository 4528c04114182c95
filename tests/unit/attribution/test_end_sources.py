"""The sources of each end of a graph by itself."""

from dataclasses import replace

import numpy as np
import pytest

from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.influence import end_sources, scores
from vlmscope.attribution.trace import trace
from vlmscope.models.tiny import tiny_image, tiny_vlm
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set


@pytest.fixture(scope="module")
def graph():
    """A whole answer of three words beside a picture."""
    vlm = tiny_vlm("gemma3", 3)
    transcoders = random_set(vlm.adapter.n_layers, vlm.adapter.d_model, 40, 6, seed=4).requires_grad_(False)
    inputs = vlm.prepare("what is this ?", [tiny_image(0)])
    config = AttributionConfig(answer="the red planet", max_nodes=60)
    return trace(Scope(vlm, transcoders), inputs, config).graph


def test_ends_together_are_the_graphs_own_scores(graph) -> None:
    """Influence is linear in what the ends are worth."""
    worth = np.array([0.2, 0.5, 0.3])
    (tokens, errors), whole = end_sources(graph), scores(replace(graph, target_weights=worth))
    assert tokens.shape == (3, len(graph.tokens))
    assert worth @ tokens.sum(1) == pytest.approx(whole.token_share, abs=1e-9)
    assert worth @ errors == pytest.approx(whole.error_share, abs=1e-9)
    # A word has nothing from words after it.
    first = graph.nodes.position[graph.nodes.ends()[0]]
    assert tokens[0, first + 1 :].sum() == 0 < tokens[2, first + 1 :].sum()
