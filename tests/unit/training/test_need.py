"""The term that makes answers need MLPs: its means, its priors, and what it asks of which parts."""

import pytest
import torch

from vlmscope.core.records import generator
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.data.orrery.scenes import COMPOSED, KINDS, vocabulary
from vlmscope.models.orrery import OrreryConfig, build_orrery, build_processor
from vlmscope.training.batches import PackedBatch, pack
from vlmscope.training.orrery import Need, answers, averaged, listening, run_packed

SMALL = OrreryConfig(d_model=16, n_layers=2, d_mlp=16, head_dim=4, vision_width=8, vision_layers=1, vision_mlp=8)


@pytest.fixture(scope="module")
def tokenizer():
    return build_processor(vocabulary(COMPOSED), 64, 16).tokenizer


@pytest.fixture
def model(tokenizer):
    return build_orrery(SMALL, len(tokenizer), 0)


def packed(tokenizer, kinds=(*KINDS, *COMPOSED), each: int = 2) -> PackedBatch:
    scenes = [make_scene("train", kind, number) for kind in kinds for number in range(each)]
    return pack(scenes, tokenizer, 16, generator(0, "order"))


def test_tokens_under_the_same_words_share_a_mean(tokenizer) -> None:
    batch, need = packed(tokenizer, each=4), Need(2, 16, len(tokenizer))
    contexts, seen = need.contexts(batch), {}
    alive = batch.segments >= 0
    for row in range(len(batch.kinds)):
        for column in alive[row].nonzero()[:, 0].tolist():
            segment = int(batch.segments[row, column])
            place = int((batch.segments[row, :column] == segment).sum())
            key: tuple = (batch.kinds[row],)
            if segment:
                question = batch.asked[row][segment - 1]
                named = question.group if batch.kinds[row] in COMPOSED else question.question
                key = (question.group.split("_")[0] if batch.kinds[row] == "text" else named,)
                key = ("text",) if batch.kinds[row] == "text" else key
            expected = seen.setdefault((key, segment > 0, place), int(contexts[row, column]))
            assert expected == int(contexts[row, column])
    assert len(set(seen.values())) == len(seen)  # and nobody else's


def test_means_are_those_of_the_steps_so_far(tokenizer, model) -> None:
    mlps = [layer.mlp for layer in model.model.language_model.layers]
    need, batches = Need(2, 16, len(tokenizer)), [packed(tokenizer, (kind,)) for kind in ("planets", "planets")]
    outputs = []
    for batch in batches:
        with torch.no_grad(), listening(mlps) as heard:
            run_packed(model, batch)
        need.follow(heard, need.contexts(batch), batch)
        outputs.append(heard[1])
    first = int(need.contexts(batches[0])[0, 0])
    expected = torch.stack([out[:, 0].mean(0) for out in outputs]).mean(0)
    assert torch.allclose(need.means[1, first], expected, atol=1e-6)
    replaced = averaged(mlps, need.means, need.contexts(batches[0]), batches[0].segments >= 0)
    with torch.no_grad(), replaced, listening(mlps) as heard:
        run_packed(model, batches[0])
    assert torch.equal(heard[1][0, 0], need.means[1, first])


def test_the_term_is_least_at_the_answer_prior(tokenizer) -> None:
    batch, need = packed(tokenizer, ("planets",), each=6), Need(2, 16, len(tokenizer))
    need.follow([torch.zeros(*batch.input_ids.shape, 16)] * 2, need.contexts(batch), batch)
    groups, place, labels = answers(batch)
    counts = torch.zeros(int(groups.max()) + 1, len(tokenizer))
    counts.index_put_((groups, labels), torch.ones(len(labels)), accumulate=True)
    prior = (counts[groups] / counts[groups].sum(-1, keepdim=True)).clamp(min=1e-9).log()
    assert place.sum() == len(labels) == 18  # name, colour and cover; no caption
    assert need.loss(prior, groups) < need.loss(prior + 0.3 * torch.randn(prior.shape), groups)
