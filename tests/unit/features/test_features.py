"""Top examples and the logit lens against plain loops."""

import pytest
import torch

from vlmscope.activations.capture import mlp_inputs
from vlmscope.core.records import FeatureId
from vlmscope.features.readouts import top_and_bottom_logits
from vlmscope.features.top_examples import StudyItem, top_examples
from vlmscope.models.batching import make_batch
from vlmscope.models.tiny import tiny_gemma3, tiny_image
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set


@pytest.fixture(scope="module")
def bench():
    vlm = tiny_gemma3(5)
    transcoders = random_set(vlm.adapter.n_layers, vlm.adapter.d_model, 30, 6, seed=6).requires_grad_(False)
    prompts = ["what is this planet ?", "what is the other planet in this ?"]
    items = [
        StudyItem(vlm.prepare(prompts[i % 2], [tiny_image(i)] if i % 3 else []), f"item {i}", None) for i in range(14)
    ]
    return Scope(vlm, transcoders), items


def test_top_examples_equal_a_plain_loop(bench) -> None:
    scope, items = bench
    features = [FeatureId(layer, index) for layer in (0, 3) for index in (1, 7, 20)]
    found = top_examples(scope, features, items, count=4, batch_size=3)
    for feature in features:
        peaks = []
        for item in items:
            x = mlp_inputs(scope.adapter, make_batch(scope.adapter, [item.inputs]), [feature.layer])[feature.layer]
            peaks.append(float(scope.transcoders[feature.layer].encode(x).dense(30)[..., feature.index].max()))
        wanted = sorted((p for p in peaks if p > 0), reverse=True)[:4]
        assert [e.activation for e in found[feature]] == pytest.approx(wanted, rel=1e-4)
        for example in found[feature]:
            number = int(example.caption.split()[1])
            assert example.activation == pytest.approx(peaks[number], rel=1e-4)
            assert len(example.patch_activations) == int(items[number].inputs.is_image.sum())
            best = max([*example.patch_activations, *example.token_activations])
            assert best == pytest.approx(example.activation)


def test_logit_lens_ranks_as_the_model_does(bench) -> None:
    """Adding a large multiple of the row to the last residual moves the top word up most."""
    scope, _ = bench
    layer = scope.adapter.n_layers - 1
    feature = FeatureId(layer, 4)
    top, bottom = top_and_bottom_logits(scope, feature, count=3)
    post = scope.adapter.norms(layer).mlp_out_post
    assert post is not None
    row = scope.transcoders[layer].W_dec[4]
    written = post(row.expand(1, 1, -1) * 1000.0)
    logits = scope.adapter.lm_head()(scope.adapter.final_norm()(written * 1000.0))[0, 0]
    order = [scope.vlm.tokenizer.decode([token]) for token in logits.argsort(descending=True).tolist()]
    assert [w for w, _ in top] == order[:3]
    assert [w for w, _ in bottom] == order[::-1][:3]
    assert top[0][1] > bottom[0][1]
    assert torch.isfinite(logits).all()
