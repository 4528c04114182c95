"""Top examples, logit lenses and features on soft tokens against plain loops and the model's own end."""

from typing import Any

import numpy as np
import pytest
import torch

from vlmscope.core.records import FeatureId
from vlmscope.features.readouts import token_lens, top_and_bottom_logits
from vlmscope.features.study import CaptionedPrompt, top_examples
from vlmscope.models.batching import make_batch
from vlmscope.models.tiny import tiny_gemma3, tiny_image, tiny_vlm
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set


@pytest.fixture(scope="module")
def scope() -> Scope:
    vlm = tiny_gemma3(5)
    return Scope(vlm, random_set(vlm.adapter.n_layers, vlm.adapter.d_model, 30, 6, seed=6).requires_grad_(False))


@pytest.fixture(scope="module")
def batch(scope: Scope) -> Any:
    return make_batch(scope.adapter, [scope.vlm.prepare("what is this planet ?", [tiny_image(i)]) for i in range(9)])


def test_top_examples_equal_a_plain_loop(scope: Scope) -> None:
    prompts = ["what is this planet ?", "what is the other planet in this ?"]
    inputs = [scope.inputs(prompts[i % 2], [tiny_image(i)] if i % 3 else []) for i in range(14)]
    items = [CaptionedPrompt(own, str(i), None) for i, own in enumerate(inputs)]
    features = [FeatureId(layer, index) for layer in (0, 3) for index in (1, 7, 20)]
    found = top_examples(scope, features, items, count=4, forward_tokens=30)
    for feature in features:
        peaks = []
        for item in items:
            x = scope.capture(scope.batch([item.inputs]), [feature.layer])[feature.layer]
            peaks.append(float(scope.transcoders[feature.layer].encode(x).dense(30)[..., feature.index].max()))
        wanted = sorted((p for p in peaks if p > 0), reverse=True)[:4]
        assert [e.activation for e in found[feature]] == pytest.approx(wanted, rel=1e-4)
        for example in found[feature]:
            number = int(example.caption)
            assert example.activation == pytest.approx(peaks[number], rel=1e-4)
            assert len(example.patch_activations) == int(items[number].inputs.is_image.sum())
            best = max([*example.patch_activations, *example.token_activations])
            assert best == pytest.approx(example.activation)


def test_logit_lens_ranks_as_the_model_does(scope: Scope) -> None:
    """Adding a large multiple of the row to the last residual moves the top word up most."""
    layer = scope.adapter.n_layers - 1
    top, bottom = top_and_bottom_logits(scope, FeatureId(layer, 4), count=3)
    post = scope.adapter.norms(layer).mlp_out_post
    assert post is not None
    written = post(scope.transcoders[layer].W_dec[4].expand(1, 1, -1) * 1000.0)
    logits = scope.adapter.lm_head()(scope.adapter.final_norm()(written * 1000.0))[0, 0]
    assert torch.isfinite(logits).all() and top[0][1] > bottom[0][1]
    order = [scope.vlm.tokenizer.decode([token]) for token in logits.argsort(descending=True).tolist()]
    assert [w for w, _ in top] == order[:3] and [w for w, _ in bottom] == order[::-1][:3]


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "llava", "qwen3_vl"])
def test_the_lens_ends_where_the_model_does(family: str) -> None:
    """Ranks in the last state are the model's; in an earlier one those of a model that ends there."""
    vlm = tiny_vlm(family, 5)
    batch = make_batch(vlm.adapter, [vlm.prepare("what is this ?", [tiny_image(i).resize((48, 48))]) for i in range(2)])
    positions = np.append(np.flatnonzero(batch.is_image), batch.length - 1)
    with torch.no_grad():
        logits = vlm.adapter.forward(batch.tensors, use_cache=False).logits[:, torch.from_numpy(positions)].double()
        embeddings = batch.tensors["inputs_embeds"][:, torch.from_numpy(positions)]
        start = vlm.adapter.lm_head()(vlm.adapter.final_norm()(embeddings))
    words = logits[:, -1].argmax(-1).tolist()
    ranks = token_lens(vlm.adapter, batch, positions, words)
    assert ranks.shape == (2, vlm.adapter.n_layers + 1, len(positions))
    assert (ranks[:, -1, -1] == 0).all()
    for row, word in enumerate(words):
        for state, said in ((0, start[row]), (-1, logits[row])):
            mine = (said > said[:, word][:, None]).sum(-1).numpy()
            assert np.abs(ranks[row, state] - mine).max() <= 1  # of equals by rounding
