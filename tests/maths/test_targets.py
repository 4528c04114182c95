"""Every kind of target: its row sums to the model's own number, on every family, in float64."""

import dataclasses

import numpy as np
import pytest
import torch
from tests.maths.maths_cases import TOLERANCE, Case, case_of, config

from vlmscope import activations as model_scores
from vlmscope.activations import HeadSide
from vlmscope.attribution.adjoint import Adjoint
from vlmscope.attribution.heads import HeadSplitter, Place, ScoreParts, query_keys, score_parts
from vlmscope.attribution.targets import Targets, answer_targets, choose_logits, difference_target, feature_target
from vlmscope.attribution.trace import attribute
from vlmscope.core.graph import AttributionGraph, NodeKind
from vlmscope.core.records import FeatureId
from vlmscope.models.attention import Pattern
from vlmscope.models.base import exact_float64
from vlmscope.models.batching import continued, greedy_answer
from vlmscope.replacement import ReplacementModel, build_replacement

# Layer, head, query and key from the end of the prompt: early and late layers, the last position and another.
PLACES = [(0, 0, 1, 3), (1, 3, 1, 1), (2, 1, 2, 4)]


def short_of(graph: AttributionGraph, own: np.ndarray) -> float:
    """How far the rows of what a graph explains are from the model's numbers, of their sums of |edges|."""
    gaps = []
    for node, value in zip(graph.nodes.ends(), own, strict=True):
        _, weights = graph.incoming(int(node))
        gaps.append(max(abs(weights.sum() - value), abs(graph.nodes.target[node] - value)) / np.abs(weights).sum())
        assert graph.residual[node] <= TOLERANCE
    return max(gaps)


def graph_of(case: Case, targets: Targets, replacement: ReplacementModel | None = None) -> AttributionGraph:
    return attribute(replacement or case.replacement, config(), case.vlm.tokenizer, targets=targets)


def test_a_difference_is_that_of_the_models_logits(case: Case) -> None:
    own = case.subject.own_unembedded[-1].numpy()
    first, second = (int(token) for token in np.argsort(-own)[:2])
    graph = graph_of(case, difference_target(case.replacement, first, second, "first - second"))
    assert short_of(graph, np.array([own[first] - own[second]])) <= TOLERANCE
    assert graph.nodes.kind[-1] == NodeKind.TARGET and graph.end_weights.tolist() == [1.0]


def test_an_answer_is_explained_where_its_tokens_are_predicted(case: Case) -> None:
    """Against forwards of the Hugging Face model on ever longer prompts, and against its own generation."""
    adapter, tokenizer = case.vlm.adapter, case.vlm.tokenizer
    answer = greedy_answer(adapter, case.inputs, 3)
    inputs = continued(adapter, case.inputs, answer[:-1], tokenizer)
    replacement = build_replacement(case.subject.scope, inputs)
    targets = answer_targets(replacement, answer)
    own = []
    for count, token in enumerate(answer):
        so_far = continued(adapter, case.inputs, answer[:count], tokenizer)
        with torch.no_grad():
            logits = case.vlm.model(**so_far.tensors).logits[0, -1].double()
        assert int(logits.argmax()) == token  # the KV cache and the whole sequence agree
        wide = _uncapped(logits, adapter.logit_softcap)
        own.append(float(wide[token] - wide.mean()))
    graph = graph_of(case, targets, replacement)
    assert short_of(graph, np.array(own)) <= TOLERANCE
    assert graph.nodes.position[graph.nodes.ends()].tolist() == list(range(len(case.inputs) - 1, len(inputs)))


def _uncapped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    return logits if cap is None else cap * torch.atanh(logits / cap)


def test_a_feature_is_explained_from_below(case: Case) -> None:
    table = case.replacement.feature_activations
    row = len(table) - 1
    feature, position = FeatureId(int(table.layer[row]), int(table.index[row])), int(table.position[row])
    graph = graph_of(case, feature_target(case.replacement, feature, str(position)))
    assert short_of(graph, case.subject.own_pre_activations[[row]]) <= TOLERANCE
    assert (graph.nodes.layer[:-1] <= feature.layer).all()
    assert not (graph.nodes.layer[graph.nodes.of(NodeKind.FEATURE)] >= feature.layer).any()
    # It is the row that the feature has in the graph of the logits.
    whole = case.graph.nodes
    node = int(np.flatnonzero(
        (whole.kind == NodeKind.FEATURE) & (whole.layer == feature.layer) & (whole.position == position)
        & (whole.index == feature.index)
    )[0])  # fmt: skip
    np.testing.assert_allclose(graph.incoming(graph.n_nodes - 1)[1], case.graph.incoming(node)[1], rtol=0, atol=1e-12)


def parts_at(case: Case, at: tuple[int, int, int, int]) -> ScoreParts:
    layer, head, query, key = at
    n_heads, length = case.replacement.state.patterns[0].n_heads, len(case.inputs)
    place = Place(layer, head % n_heads, length - query, length - key)
    return score_parts(case.vlm.adapter, case.replacement, Adjoint(case.replacement), place)


def log_pattern(case: Case, place: Place) -> float:
    """The logarithm of the model's own pattern: the score but for a number that all keys of the query share."""
    pattern = case.replacement.state.patterns[place.layer].row(place.head, place.query)
    return float(pattern[place.key].log())


@pytest.mark.parametrize("at", PLACES)
def test_a_score_is_the_sum_of_its_parts(case: Case, at: tuple[int, int, int, int]) -> None:
    parts = parts_at(case, at)
    query, key = parts.query.sum(1), parts.key.sum(1)
    scale = float(parts.scale * parts.query.abs().sum(1) @ parts.key.abs().sum(1))
    assert abs(float(parts.scale * query @ key) - parts.score) <= TOLERANCE * scale
    # All terms sum to the score. In late layers these are millions of pairs, whose sum is that of the lines above.
    count = 10**9 if parts.query.shape[1] * parts.key.shape[1] < 10**5 else 10
    found = query_keys(parts, case.replacement, Adjoint(case.replacement).columns, count)
    for terms in (found.pairs, found.queries, found.keys) if count > 10 else ():
        assert abs(sum(term for *_, term in terms) - parts.score) <= TOLERANCE * found.sizes
    assert abs(found.total - parts.score) <= TOLERANCE * found.sizes
    graph = graph_of(case, parts.targets)
    assert short_of(graph, np.array([parts.score, parts.score])) <= TOLERANCE


def test_scores_are_those_of_the_models_pattern(case: Case) -> None:
    """Differences of two scores of a query are differences of its log probabilities, where no cap bends them."""
    one, other = parts_at(case, (1, 1, 1, 1)), parts_at(case, (1, 1, 1, 2))
    capped = getattr(case.vlm.model.config.get_text_config(), "attn_logit_softcapping", None)

    def bent(score: float) -> float:
        return score if capped is None else capped * np.tanh(score / capped)

    expected = log_pattern(case, one.place) - log_pattern(case, other.place)
    assert abs(bent(one.score) - bent(other.score) - expected) <= 1e-8 * (1 + abs(expected))


def logits_of(case: Case) -> Targets:
    return choose_logits(case.replacement, 1.0, 5)


@pytest.mark.parametrize("name", ["one_image_skip_biases", "qwen3_vl", "gemma4", "cross_layer"])
def test_heads_are_those_of_models_without_the_other_heads(name: str, cases: dict[str, Case]) -> None:
    """Last head h of layer l: what h alone adds to the edge of a model with no heads above l and no others in l.

    Without any head there is what stays; without skip paths too, the stream.
    """
    with exact_float64():
        case = case_of(name, cases)
        graph, replacement = case.graph, case.replacement
        target = int(graph.nodes.ends()[0])
        sources, weights = graph.incoming(target)
        scale = np.abs(weights).sum()
        wanted = sources[np.isin(graph.nodes.kind[sources], (NodeKind.TOKEN, NodeKind.BIAS))]
        wanted = wanted[[0, len(case.inputs) // 2, len(case.inputs) - 1, -1]]  # two soft tokens, the last word, a bias
        splitter = HeadSplitter(replacement, graph.nodes, logits_of(case))
        found = splitter.split(wanted.astype(int), np.full(len(wanted), target), 3)

        bias = Adjoint(replacement).columns.bias(int(graph.nodes.layer[wanted[-1]]))
        columns = [*graph.nodes.position[wanted[:-1]].tolist(), bias]

        def edges(model: ReplacementModel) -> np.ndarray:
            """From the same sources."""
            return Adjoint(model).target_rows(logits_of(case), slice(1))[0, columns].numpy()

        for layer in range(replacement.n_layers):
            none = edges(with_heads(replacement, layer, set(), range(layer + 1, 9)))
            for head in (0, 2):
                alone = edges(with_heads(replacement, layer, {head}, range(layer + 1, 9)))
                assert np.abs(alone - none - found.heads[:, layer, head]).max() <= TOLERANCE * scale
        headless = with_heads(replacement, 0, set(), range(9))
        assert np.abs(edges(headless) - found.stream - found.skip).max() <= TOLERANCE * scale
        plain = dataclasses.replace(headless, features=[dataclasses.replace(f, w_skip=None) for f in headless.features])
        assert np.abs(edges(plain) - found.stream).max() <= TOLERANCE * scale
        assert np.abs(found.heads).max() > 1e-3 * scale and np.abs(found.skip).max() > 1e-3 * scale


def with_heads(replacement: ReplacementModel, layer: int, kept: set[int], silent: range) -> ReplacementModel:
    """The same with no heads in the layers `silent`, and in `layer` only those `kept`."""
    layers = []
    for number, frozen in enumerate(replacement.layers):
        pattern = frozen.pattern.whole()
        for head in range(len(pattern)):
            if number in silent or (number == layer and head not in kept):
                pattern[head] = 0
        layers.append(dataclasses.replace(frozen, pattern=Pattern.of(pattern)))
    return dataclasses.replace(replacement, layers=layers)


@pytest.mark.parametrize("fault", ["rotation", "norm", "scale"])
@pytest.mark.parametrize("name", ["one_image_skip_biases", "qwen3_vl", "gemma4"])
def test_a_forgotten_part_of_a_score_is_found(
    name: str, fault: str, cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    with exact_float64():
        case = case_of(name, cases)
        right = parts_at(case, PLACES[2])
        adapter = case.vlm.adapter
        if fault == "scale":  # the stream read without the scale of the norm before the attention
            ones = torch.ones_like(case.replacement.layers[0].attn_in_scale)
            layers = [dataclasses.replace(old, attn_in_scale=ones) for old in case.replacement.layers]
            wrong_model = dataclasses.replace(case.replacement, layers=layers)
            wrong = score_parts(case.vlm.adapter, wrong_model, Adjoint(wrong_model), right.place)
        elif fault == "norm":  # norms of queries and keys taken for 1
            monkeypatch.setattr(type(adapter), "norm_scale", lambda _self, _norm, x: torch.ones_like(x))
            wrong = parts_at(case, PLACES[2])
        else:  # the key read at another position's angle
            right_side = model_scores._side
            monkeypatch.setattr(model_scores, "_side", lambda *given: turned(right_side(*given)))
            wrong = parts_at(case, PLACES[2])
        found = query_keys(wrong, case.replacement, Adjoint(case.replacement).columns, 1)
        assert abs(found.total - right.score) > 1e3 * TOLERANCE * found.sizes


def turned(side: HeadSide) -> HeadSide:
    return dataclasses.replace(side, weight=side.weight.roll(1, 0))
