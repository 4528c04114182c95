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


def test_shares_of_every_end_sum_to_one(graph) -> None:
    found = end_sources(graph)
    assert found.tokens.shape == (3, len(graph.tokens))
    total = found.tokens.sum(1) + found.bias + found.error + found.left_out
    np.testing.assert_allclose(total, 1.0, atol=1e-9)
    assert (found.left_out > 0).all()


def test_ends_together_are_the_graphs_own_scores(graph) -> None:
    """Influence is linear in what the ends are worth."""
    worth = np.array([0.2, 0.5, 0.3])
    found, whole = end_sources(graph), scores(replace(graph, target_weights=worth))
    assert worth @ found.tokens.sum(1) == pytest.approx(whole.token_share, abs=1e-9)
    assert worth @ found.error == pytest.approx(whole.error_share, abs=1e-9)


def test_a_word_has_nothing_from_words_after_it(graph) -> None:
    found = end_sources(graph)
    first = graph.nodes.position[graph.nodes.ends()[0]]
    assert found.tokens[0, first + 1 :].sum() == 0
    assert found.tokens[2, first + 1 :].sum() > 0
    groups = np.where(np.arange(len(graph.tokens)) > first, 1, 0)
    np.testing.assert_allclose(found.of_tokens(groups, 2).sum(1), 1.0)
    assert found.of_tokens(groups, 2)[0, 1] == 0
