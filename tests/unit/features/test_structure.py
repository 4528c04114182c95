"""Peaks and embeddings of pictures against plain loops; directions and modality tables."""

import numpy as np
import pytest
import torch

from vlmscope.core.study import IMAGE, TEXT
from vlmscope.features.structure import (
    pictures_seen,
    read_directions,
    write_directions,
)
from vlmscope.features.study import StudyInput
from vlmscope.models.batching import by_shape
from vlmscope.models.tiny import tiny_gemma3, tiny_image
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import random_set

F = 30


@pytest.fixture(scope="module")
def bench():
    vlm = tiny_gemma3(5)
    transcoders = random_set(vlm.adapter.n_layers, vlm.adapter.d_model, F, 6, seed=6).requires_grad_(False)
    prompts = ["what is this planet ?", "what is the other planet in this ?"]
    prepared = [vlm.prepare(prompts[i % 2], [tiny_image(i)] if i % 3 else []) for i in range(9)]
    kinds = [np.where(one.is_image, IMAGE, TEXT) for one in prepared]
    return Scope(vlm, transcoders), prepared, [StudyInput(i, prepared[i].tensors, kinds[i], {}) for i in range(9)]


@pytest.mark.parametrize("forward_tokens", [1, 10_000])
def test_peaks_and_embeddings_are_those_of_a_plain_loop(bench, forward_tokens: int) -> None:
    scope, prepared, items = bench
    found, embeddings = pictures_seen(scope, items, forward_tokens)
    peaks, means = [], []
    for i in (i for i in sum(by_shape([item.tensors for item in items]), []) if i % 3):
        batch = scope.batch([prepared[i]])
        dense = [scope.transcoders[n].encode(x[0]).dense(F) for n, x in scope.capture(batch).items()]
        peaks.append(torch.cat(dense, -1).numpy().max(0))
        means.append(batch.tensors["inputs_embeds"][0, batch.is_image].mean(0).numpy())
    np.testing.assert_allclose(embeddings, means, atol=1e-5)
    np.testing.assert_allclose(found.toarray(), peaks, rtol=1e-3, atol=1e-4)


def test_directions_are_what_norms_let_through(bench) -> None:
    scope, *_ = bench
    x = torch.randn(3, scope.adapter.d_model, generator=torch.Generator().manual_seed(0), dtype=scope.adapter.dtype)
    norm = scope.adapter.norms(1).mlp_in
    plain = x / x.square().mean(-1, keepdim=True).sqrt()
    read = read_directions(scope)[1]
    torch.testing.assert_close(plain @ read.T, norm(x) @ scope.transcoders[1].W_enc.T, rtol=1e-3, atol=1e-4)
    post = scope.adapter.norms(1).mlp_out_post
    row = scope.transcoders[1].W_dec[4]
    through = post(row[None, None])[0, 0] if post is not None else row
    cosine = torch.nn.functional.cosine_similarity(through, write_directions(scope)[1][4], dim=0)
    assert float(cosine) == pytest.approx(1.0, abs=1e-5)
