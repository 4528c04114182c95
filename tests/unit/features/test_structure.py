"""Peaks and embeddings of pictures against plain loops; directions and modality tables."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from vlmscope.core.errors import UserError
from vlmscope.core.study import IMAGE, TEXT
from vlmscope.features.structure import (
    GROUPS,
    modality_parts,
    modality_table,
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


def study(positions: dict[str, int]) -> Any:
    fired = np.array([[0, 90, 0], [60, 0, 30], [60, 0, 30], [40, 40, 0], [1, 0, 0], [0, 0, 0]])
    table = SimpleNamespace(fired=fired, items_fired=np.array([60, 60, 60, 60, 1, 0]))
    drawn = np.array([1, 2, 1, 1, 1, 2, 3, 1, 2, 1, 2, 3])
    return SimpleNamespace(
        path="study",
        info=SimpleNamespace(positions=positions),
        items=SimpleNamespace(ids=np.array([1, 2, 3]), table=pa.table({"n_pictures": [1, 2, 0]})),
        layers=[4],
        layer=lambda _layer: table,
        example_items=lambda _layer, top: (np.repeat(np.arange(4), 3), drawn),
    )


def test_words_are_divided_by_the_prompts_they_are_in() -> None:
    table = modality_table(study({"text": 400, "image": 500, "answer": 100}))
    assert table.group.tolist() == ["image", "words beside a picture", "words in either", "both", "rare", "dead"]
    layers, groups, index, shared = modality_parts(table)
    assert layers == [4] and list(groups) == list(GROUPS) and sum(count for (count,) in groups.values()) == 6
    assert len(index[0]) == 4 and shared == {"at soft tokens": [40 / 130], "at words": [40 / 221]}
    with pytest.raises(UserError, match="study data that have both"):
        modality_table(study({"text": 400, "image": 0, "answer": 100}))
