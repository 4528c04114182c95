"""Batches of conversations: a function of seed and number, of about the size asked for, joined forward by forward."""

import pytest
import torch

from vlmscope.core.errors import UserError
from vlmscope.core.records import Conversation, Document, Exchange, Sample
from vlmscope.models.conversations import LOSS_MASK, encode
from vlmscope.models.loading import VLM
from vlmscope.models.tiny import FAMILIES, tiny_image, tiny_vlm
from vlmscope.scope import Scope
from vlmscope.training.batches import ConversationBatches, ValidationBatches, collect, stacked
from vlmscope.training.config import TranscoderTrainingConfig
from vlmscope.training.evaluation import evaluate_transcoders
from vlmscope.training.transcoder_training import train_transcoders

SIZES = ((16, 16), (40, 24), (24, 60))
CONFIG = TranscoderTrainingConfig(
    expansion_factor=2, k=4, max_steps=30, warmup=2, init_batches=2, pool_batches=2, steps_per_batch=1, lr=5e-3,
    checkpoint_every=0, val_every=0,
)  # fmt: skip


def samples() -> list[Sample]:
    found: list[Sample] = []
    for number in range(9):
        picture = tiny_image(number).resize(SIZES[number % 3])
        answer = ("red", "blue planet", "the other one")[number % 3]
        found.append(Conversation((picture,), (Exchange("what is this ?", answer),), f"line {number}"))
    return [*found, Document("the red planet and the other one")]


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return tiny_vlm("smolvlm", 1)


def batches(vlm: VLM, tokens: int, seed: int = 0) -> ConversationBatches:
    return ConversationBatches(samples(), lambda sample: encode(vlm, sample), tokens, seed)


def ids(batch: list[dict[str, torch.Tensor]]) -> list[list[int]]:
    return [row.tolist() for one in batch for row in one["input_ids"]]


def test_a_batch_follows_from_seed_and_number(vlm: VLM) -> None:
    first, again = batches(vlm, 90), batches(vlm, 90)
    whole = [ids(first(n)) for n in range(6)]
    assert [ids(again(n)) for n in (4, 1)] == [whole[4], whole[1]]
    assert ids(batches(vlm, 90, seed=1)(0)) != whole[0]
    sizes = [sum(map(len, batch)) for batch in whole]
    assert 60 < sum(sizes) / len(sizes) < 120
    assert ids(batches(vlm, 1)(0))[0] in ids(first(0))
    with pytest.raises(UserError, match="task.tokens_per_batch=0"):
        batches(vlm, 0)


@pytest.mark.parametrize("family", ["smolvlm", "qwen2_5_vl", "llava_onevision", "gemma3"])
def test_a_batch_is_its_forwards_one_after_the_other(family: str) -> None:
    vlm = tiny_vlm(family, 1)
    forwards = [one for sample in samples() for one in encode(vlm, sample)]
    together = collect(vlm.adapter, forwards)
    parts = [collect(vlm.adapter, one) for one in reversed(forwards)][::-1]  # no forward remembers another
    assert together.n_tokens == sum(len(one["input_ids"][0]) for one in forwards)
    for layer in range(vlm.adapter.n_layers):
        assert torch.equal(together.by_layer[layer][1], torch.cat([part.by_layer[layer][1] for part in parts]))
    soft = sum(int((one["input_ids"] == vlm.adapter.soft_token_id()).sum()) for one in forwards)
    assert int(together.is_image.sum()) == soft > 0


@pytest.mark.parametrize("family", ["gemma3", "gemma3_text", *FAMILIES])
def test_stacked_forwards_compute_what_each_does(family: str) -> None:
    vlm = tiny_vlm(family, 1)
    asked = (Exchange("what is this ?", "red planet"),)
    given = [(tiny_image(n).resize(SIZES[n % 2]),) if vlm.adapter.has_vision else () for n in range(4)]
    forwards = [encode(vlm, Conversation(images, asked))[0] for images in given]
    groups = stacked(forwards)
    by_size = [[0, 2], [1, 3]] if len(groups) == 2 else [[0, 1, 2, 3]]
    assert len(groups) == len(by_size)
    for group, members in zip(groups, by_size, strict=True):
        together, alone = collect(vlm.adapter, group), collect(vlm.adapter, [forwards[n] for n in members])
        assert torch.equal(together.is_image, alone.is_image)
        for layer in range(vlm.adapter.n_layers):
            found, expected = together.by_layer[layer][1], alone.by_layer[layer][1]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
        assert torch.equal(group[LOSS_MASK], torch.cat([forwards[n][LOSS_MASK] for n in members]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transcoders_are_float32_and_learn_whatever_the_models_dtype(dtype: torch.dtype, tmp_path) -> None:
    vlm = tiny_vlm("smolvlm", 1, dtype=dtype)
    val = ValidationBatches(samples()[:4], lambda sample: encode(vlm, sample))
    assert len(val) == 4 and len(list(val)) == len(list(val)) == 4
    start, _ = train_transcoders(vlm, batches(vlm, 90), [], _short(1), tmp_path / "a")
    before = evaluate_transcoders(Scope(vlm, start), val)
    found, after = train_transcoders(vlm, batches(vlm, 90), val, CONFIG, tmp_path / "b")
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert after["val/fvu"] < 0.8 * before["val/fvu"]
    assert {"val/fvu_text", "val/fvu_image", "val/l0", "val/dead_frac", "val/ce", "val/ce_delta"} <= after.keys()
    tokens = sum(len(one["input_ids"][0]) for batch in val for one in batch)
    answers = sum(int(one["loss_mask"].sum()) for batch in val for one in batch)
    assert 0 < answers < tokens


def _short(steps: int) -> TranscoderTrainingConfig:
    from dataclasses import replace

    return replace(CONFIG, max_steps=steps, lr=1e-9)
