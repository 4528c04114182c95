"""Features on soft tokens against plain loops, and the logit lens against the model's own end."""

from typing import Any

import numpy as np
import pytest
import torch

from vlmscope.activations.capture import mlp_inputs, mlp_inputs_and_logits
from vlmscope.features.readouts import activations_at, image_features, token_lens
from vlmscope.models.batching import make_batch
from vlmscope.models.tiny import tiny_gemma3, tiny_image, tiny_vlm
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set


@pytest.fixture(scope="module")
def bench() -> Any:
    vlm = tiny_gemma3(5)
    transcoders = random_set(vlm.adapter.n_layers, vlm.adapter.d_model, 30, 6, seed=6).requires_grad_(False)
    batch = make_batch(vlm.adapter, [vlm.prepare("what is this planet ?", [tiny_image(i)]) for i in range(9)])
    return Scope(vlm, transcoders), batch


def looped(bench: Any) -> dict[tuple[int, int], tuple[float, float, float]]:
    """Strength, share of prompts and share of soft tokens of every feature that fires."""
    scope, batch = bench
    soft = np.flatnonzero(batch.is_image)
    found = {}
    for layer, x in mlp_inputs(scope.adapter, batch, scope.transcoders.layers).items():
        dense = scope.transcoders[layer].encode(x).dense(30)
        for index in range(30):
            acts = [[float(dense[b, t, index]) for t in soft] for b in range(batch.size)]
            firing = [row for row in acts if any(a > 0 for a in row)]
            if firing:
                strength = sum(map(sum, acts)) / len(acts)
                tokens = sum(sum(a > 0 for a in row) / len(row) for row in firing) / len(firing)
                found[layer, index] = (strength, len(firing) / len(acts), tokens)
    return found


def test_the_strongest_on_soft_tokens_are_chosen_by_the_rule(bench: Any) -> None:
    scope, batch = bench
    every = looped(bench)
    for least, most, per_layer in ((0.0, 1.0, None), (0.5, 0.6, None), (0.3, 0.6, 1)):
        allowed = [(v[0], k) for k, v in every.items() if v[1] >= least and v[2] <= most + 1e-12]
        wanted: list[tuple[int, int]] = []
        for _, key in sorted(allowed, reverse=True):
            if per_layer is None or all(key[0] != other[0] for other in wanted):
                wanted.append(key)
        found = image_features(scope, batch, 5, least, most, per_layer)
        assert [tuple(one.feature) for one in found] == wanted[:5] and found
        for one in found:
            numbers = (one.strength, one.fires, one.tokens)
            assert numbers == pytest.approx(every[tuple(one.feature)], rel=1e-4)
    assert {one.feature.layer for one in found} == set(range(len({one.feature.layer for one in found})))


def test_activations_are_the_encoders(bench: Any) -> None:
    scope, batch = bench
    features = [one.feature for one in image_features(scope, batch, 4)]
    mlp_in, logits = mlp_inputs_and_logits(scope.adapter, batch, scope.transcoders.layers)
    found = activations_at(scope.transcoders, mlp_in, features)
    for feature in features:
        dense = scope.transcoders[feature.layer].encode(mlp_in[feature.layer]).dense(30)[..., feature.index]
        assert torch.equal(found[feature], dense) and found[feature].any()
    with torch.no_grad():
        whole = scope.adapter.forward(batch.tensors, use_cache=False).logits[:, -1]
    assert torch.allclose(logits, whole, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "llava", "qwen3_vl"])
def test_the_lens_ends_where_the_model_does(family: str) -> None:
    """The last state's words are the model's; an earlier one's are those of a model that ends there."""
    vlm = tiny_vlm(family, 5)
    batch = make_batch(vlm.adapter, [vlm.prepare("what is this ?", [tiny_image(i).resize((48, 48))]) for i in range(2)])
    positions = np.append(np.flatnonzero(batch.is_image), batch.length - 1)
    with torch.no_grad():
        logits = vlm.adapter.forward(batch.tensors, use_cache=False).logits[:, torch.from_numpy(positions)].double()
    words = logits[:, -1].argmax(-1).tolist()
    lens = token_lens(vlm.adapter, batch, positions, words, 4)
    assert lens.top.shape == (2, vlm.adapter.n_layers + 1, len(positions), 4)
    probabilities = logits.softmax(-1)
    best = probabilities.topk(4)
    assert np.array_equal(lens.top[:, -1], best.indices.numpy())
    assert lens.probability[:, -1] == pytest.approx(best.values.numpy(), rel=1e-4)
    assert (lens.rank[:, -1, -1] == 0).all()
    for row, word in enumerate(words):
        assert lens.word_probability[row, -1] == pytest.approx(probabilities[row, :, word].numpy(), rel=1e-4)
        mine = logits[row] > logits[row, :, word][:, None]
        assert np.abs(lens.rank[row, -1] - mine.sum(-1).numpy()).max() <= 1  # of equals by rounding
    first, embeddings = lens.first_state(), batch.tensors["inputs_embeds"]
    with torch.no_grad():
        start = vlm.adapter.lm_head()(vlm.adapter.final_norm()(embeddings[:, torch.from_numpy(positions)]))
    assert np.array_equal(lens.top[:, 0, :, 0], start.argmax(-1).numpy())
    for row in range(2):
        hits = [(lens.rank[row, state] == 0).any() for state in range(vlm.adapter.n_layers + 1)]
        assert first[row] == hits.index(True)
