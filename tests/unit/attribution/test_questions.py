"""What the user may ask a graph to explain, and the lines that mistakes get."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.export import load_graph, save_graph
from vlmscope.attribution.trace import Trace, trace
from vlmscope.core.artifacts import load_tensors, save_tensors
from vlmscope.core.errors import UserError
from vlmscope.core.graph import NodeKind
from vlmscope.models.base import exact_float64
from vlmscope.models.loading import VLM
from vlmscope.models.tiny import tiny_gemma3, tiny_image
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

PROMPT = "what is this planet ?"


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return tiny_gemma3(3, dtype=torch.float64)


def traced(vlm: VLM, **settings: object) -> Trace:
    adapter = vlm.adapter
    transcoders = random_set(adapter.n_layers, adapter.d_model, 40, 5, seed=4, dtype=torch.float64)
    with exact_float64():
        config = AttributionConfig(dtype="float64", **settings)
        return trace(Scope(vlm, transcoders), vlm.prepare(PROMPT, [tiny_image(0)]), config)


@pytest.fixture(scope="module")
def whole(vlm: VLM) -> Trace:
    return traced(vlm)


@pytest.fixture(params=["tokens", "difference", "answer", "answer_tokens", "feature", "attention", "auto"])
def asked(request: pytest.FixtureRequest, vlm: VLM, whole: Trace) -> Iterator[Trace]:
    table = whole.replacement.feature_activations
    row = int(np.argmax(table.layer >= 2))
    settings = {
        "tokens": {"tokens": ["red", "id:7"], "weights": "uniform"},
        "difference": {"difference": ["red", "blue"]},
        "answer": {"answer": "red and blue", "weights": "surprise"},
        "answer_tokens": {"answer_tokens": 3},
        "feature": {"feature": f"L{table.layer[row]}/{table.index[row]}@{table.position[row]}"},
        "attention": {"attention": "L2H1@last:max"},
        "auto": {"attention": "auto"},
    }
    yield traced(vlm, **settings[request.param])


def test_every_question_has_a_complete_graph_that_reloads_exactly(asked: Trace, tmp_path: Path) -> None:
    graph = asked.graph
    assert graph.residual.max() < 1e-12
    assert graph.end_weights.sum() == pytest.approx(1.0)
    assert asked.pruned.node_mask[graph.nodes.ends()].all() and asked.pruned.n_edges > 0
    save_graph(tmp_path / "graph.safetensors", asked.pruned)
    again = load_graph(tmp_path / "graph.safetensors").graph
    for name in ("weights", "indices", "indptr", "logit_probabilities", "end_weights"):
        np.testing.assert_array_equal(getattr(again, name), getattr(graph, name))
    assert again.logit_tokens == graph.logit_tokens and again.meta == graph.meta


def test_graphs_of_older_layouts_are_still_read(whole: Trace, tmp_path: Path) -> None:
    path = tmp_path / "graph.safetensors"
    save_graph(path, whole.pruned)
    arrays, metadata = load_tensors(path)
    arrays.pop("target_weights")
    metadata.pop("bias")
    scores = json.loads(metadata["scores"])
    older = {name: scores[name] for name in scores if name != "image_share" and not name.endswith("_no_bias")}
    save_tensors(path, arrays, {**metadata, "scores": json.dumps(older), "version": "1"})
    again = load_graph(path)
    np.testing.assert_array_equal(again.graph.end_weights, whole.graph.logit_probabilities)
    assert again.bias == "node" and again.scores == whole.pruned.scores


def test_a_cut_off_graph_keeps_only_features_below(vlm: VLM, whole: Trace) -> None:
    table = whole.replacement.feature_activations
    row = len(table) - 1
    cut = traced(vlm, feature=f"L{table.layer[row]}/{table.index[row]}", max_nodes=20).graph
    assert len(cut.nodes.of(NodeKind.FEATURE)) == 20
    assert cut.residual.max() < 1e-12
    assert cut.meta["n_left_out_features"] == (table.layer < table.layer[row]).sum() - 20


def test_a_feature_where_it_is_silent_names_where_it_is_not(vlm: VLM, whole: Trace) -> None:
    table = whole.replacement.feature_activations
    feature = f"L{table.layer[0]}/{table.index[0]}"
    active = set(table.position[(table.layer == table.layer[0]) & (table.index == table.index[0])].tolist())
    silent = next(at for at in range(whole.replacement.n_positions) if at not in active)
    with pytest.raises(UserError, match=rf"not active at position {silent} .*, but at {min(active)}"):
        traced(vlm, feature=f"{feature}@{silent}")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tokens": ["rad"]}, "the nearest is 'red'"),
        ({"tokens": ["id:99999"]}, "has 99999, but the vocabulary"),
        ({"difference": ["red"]}, "takes two"),
        ({"difference": ["red", "red"]}, "twice"),
        ({"tokens": ["red"], "answer": "red"}, "leave one out"),
        ({"tokens": ["red"], "token_ids": [3]}, "id:NUMBER"),
        ({"tokens": ["red"], "weights": "odd"}, "uniform"),
        ({"feature": "5/3"}, "L5/123@max"),
        ({"feature": "L99/3"}, "layers 0 to 3"),
        ({"feature": "L1/99999"}, "features 0 to 39"),
        ({"feature": "L1/3@999"}, "positions 0 to"),
        ({"attention": "head 3"}, "L5H2@last:max"),
        ({"attention": "L9H0"}, "layers 0 to 3 with heads 0 to 3"),
        ({"attention": "L1H0@2:last"}, "cannot see"),
        ({"answer_tokens": -1}, "at least 0"),
    ],
)
def test_mistakes_are_one_line(vlm: VLM, whole: Trace, settings: dict[str, object], words: str) -> None:
    if settings.get("feature") == "L1/3@999":
        found = whole.replacement.features[1]
        settings = {"feature": f"L1/{int(found.index[0])}@999"}
    with pytest.raises(UserError, match=words) as caught:
        traced(vlm, **settings)
    assert "\n" not in str(caught.value)
