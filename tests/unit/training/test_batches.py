"""Batches of conversations and of a mix follow from seed and number alone, and are their forwards in order."""

import json
from pathlib import Path

import pytest
import torch
from tests.unit.training.helpers import settings

from vlmscope.core.artifacts import read_json
from vlmscope.core.errors import UserError
from vlmscope.core.records import Conversation, Document, Exchange, Sample
from vlmscope.data.config import SourceConfig
from vlmscope.data.mixing import Lane, ShuffledSource, TokenMix, open_source
from vlmscope.data.samples import WHOLE, Share
from vlmscope.models.batching import LOSS_MASK, encode, ends_of_text, text_ids
from vlmscope.models.loading import VLM
from vlmscope.models.tiny import FAMILIES, tiny_image, tiny_vlm
from vlmscope.scope import Scope
from vlmscope.training.batches import (
    EVERY,
    ConversationBatches,
    MixBatches,
    OwnPart,
    SampleEncoder,
    ValidationBatches,
    collect,
    mix_validation,
    stacked,
)
from vlmscope.training.batches import EncodedForward as Forward
from vlmscope.training.evaluation import evaluate_transcoders
from vlmscope.training.transcoder_training import train_transcoders

WEIGHTS = {"text": 2.0, "captions": 2.0, "questions": 1.0}


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return tiny_vlm("smolvlm", 1)


def encoder(vlm: VLM, max_tokens: int | None = None) -> SampleEncoder:
    return SampleEncoder(vlm, 16, max_tokens)


def mix(vlm: VLM, repeat: bool = True, share: Share = WHOLE) -> TokenMix:
    def lane(name: str, weight: float) -> Lane[list[Forward]]:
        source = open_source(name, SourceConfig("orrery", stream=name, limit=30))
        return Lane(weight, ShuffledSource(source, share, buffer=8, repeat=repeat), encoder(vlm))

    return TokenMix({name: lane(name, weight) for name, weight in WEIGHTS.items()})


def batches(vlm: VLM, file: Path, resume: bool = False, tokens: int = 60, settings: str = "these") -> MixBatches:
    return MixBatches(lambda: mix(vlm), tokens, file, settings, resume)


def ids(batch: list[Forward]) -> list[list[int]]:
    return [row.tolist() for one in batch for row in one["input_ids"]]


def test_a_batch_is_a_function_of_its_number(vlm: VLM, tmp_path: Path) -> None:
    made = batches(vlm, tmp_path / "a.json")
    whole = [ids(made(n)) for n in range(40)]
    assert all(sum(map(len, one)) >= 60 for one in whole)
    assert len({str(one) for one in whole}) == 40
    for number in (39, 0, 17, 18, 3, 38):
        assert ids(made(number)) == whole[number]
    assert ids(batches(vlm, tmp_path / "b.json")(11)) == whole[11]


def test_resuming_starts_from_the_file_and_not_from_the_beginning(
    vlm: VLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = batches(vlm, tmp_path / "states.json")
    whole = [ids(first(n)) for n in range(40)]
    figures = first.figures()
    assert list(read_json(tmp_path / "states.json")["states"]) == [str(n) for n in range(0, 40, EVERY)]
    second = batches(vlm, tmp_path / "states.json", resume=True)
    made: list[int] = []
    original = MixBatches._next
    monkeypatch.setattr(MixBatches, "_next", lambda self: made.append(self.number) or original(self))
    assert [ids(second(n)) for n in (35, 36, 37, 38, 39)] == whole[35:]
    assert min(made) == 32
    assert second.figures() == figures
    assert ids(batches(vlm, tmp_path / "states.json", resume=True, settings="others")(35)) == whole[35]
    assert min(made) == 0  # states of other settings are not taken
    (tmp_path / "states.json").unlink()
    assert ids(batches(vlm, tmp_path / "states.json", resume=True)(35)) == whole[35]


def test_processes_read_every_row_once_and_each_goes_on_with_its_own_states(vlm: VLM, tmp_path: Path) -> None:
    def part(index: int, resume: bool = False, tokens: int = 100) -> MixBatches:
        share, file = Share(index, 3), tmp_path / "states.json"
        return MixBatches(lambda: mix(vlm, False, share), tokens, file, "these", resume, share)

    def given(batch: list[Forward]) -> list[str]:
        """Conversations, which the packing does not cut, by their tokens and pictures."""
        pictures = [one for one in batch if "pixel_values" in one]
        return [f"{row.tolist()} {pixels.sum():.4f}" for one in pictures
                for row, pixels in zip(one["input_ids"], one["pixel_values"], strict=True)]  # fmt: skip

    parts = [part(index) for index in range(3)]
    made = [[one(number) for number in range(60)] for one in parts]
    assert all(isinstance(batch, OwnPart) for batches in made for batch in batches)
    assert [batches[-1] for batches in made] == [[], [], []]  # the end of one's share is told when all have ended
    whole = MixBatches(lambda: mix(vlm, False), 10**9, tmp_path / "whole.json", "", False)(0)
    drawn = [sample for batches in made for batch in batches for sample in given(batch)]
    assert sorted(drawn) == sorted(given(whole)) and len(drawn) >= 60

    assert {path.name for path in tmp_path.glob("states*")} == {f"states_{index}_of_3.json" for index in range(3)}
    first = next(number for number, batch in enumerate(made[1]) if number > EVERY and batch)
    again = part(1, resume=True)
    assert max(again.states) >= EVERY  # not from the beginning
    assert ids(again(first)) == ids(made[1][first])
    longest = max(row.shape[-1] for batch in made[0] for one in batch for row in one["input_ids"])
    for index in range(3):  # each gives a third, and the rest of the item with which it is full
        tokens = sum(map(len, ids(part(index, tokens=900)(0))))
        assert 300 <= tokens < 300 + 2 * longest


def test_texts_are_joined_by_eos_into_whole_sequences(vlm: VLM) -> None:
    source = open_source("text", SourceConfig("orrery", stream="text", limit=5))
    stream = TokenMix({"text": Lane(1.0, ShuffledSource(source, buffer=1), encoder(vlm))})
    items = [drawn.item[0] for drawn in stream]
    eos, bos = ends_of_text(vlm.tokenizer)
    assert [one["input_ids"].shape[1] for one in items[:-1]] == [16] * (len(items) - 1)
    head = 0 if bos is None else 1
    joined = [token for one in items for token in one["input_ids"][0, head:].tolist()]
    texts = [row().text for row in source.open(stream.lanes["text"].samples.share)]
    assert joined == [token for text in texts for token in [*text_ids(vlm, text), eos]]
    for one in items:
        mask = one[LOSS_MASK]
        assert not mask[0, 0] and mask[0, 1:].all()
        assert torch.equal(one["attention_mask"], torch.ones_like(one["input_ids"]))


def test_validation_takes_as_many_of_every_source(vlm: VLM) -> None:
    def stream(name: str, share: float) -> ShuffledSource:
        source = open_source(name, SourceConfig("orrery", stream=name, limit=30))
        return ShuffledSource(source, buffer=1, keep=lambda _sample: share > 0)

    held = mix_validation({name: (stream(name, 1), encoder(vlm)) for name in WEIGHTS}, 9)
    assert len(held) == 9
    pictures = [any("pixel_values" in one for one in held[n]) for n in range(9)]
    assert pictures == [False] * 3 + [True] * 6
    assert [ids(one) for one in held] == [ids(one) for one in held]
    with pytest.raises(UserError, match="its 30 samples all fall on the same side of data.val_share"):
        mix_validation({"text": (stream("text", 0), encoder(vlm))}, 9)
    with (
        pytest.warns(UserWarning),
        pytest.raises(UserError, match="for validation can be used, the first: .*max_tokens"),
    ):
        mix_validation({"captions": (stream("captions", 1), encoder(vlm, 8))}, 9)


def test_what_the_processor_refuses_is_left_out_and_counted(tmp_path: Path) -> None:
    vlm = tiny_vlm("qwen2_5_vl", 1)
    tiny_image(0).save(tmp_path / "a.png")
    tiny_image(0).resize((401, 2)).save(tmp_path / "strip.png")
    answers = ["red", "blue <|video_pad|>", "one", "a \ud800", "two", "planet"]
    rows = [{"images": ["a.png"], "texts": [{"user": "what ?", "assistant": answer}]} for answer in answers]
    rows += [{"images": ["strip.png"], "text": "red"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source("mine", SourceConfig("folder", str(tmp_path)))
    samples = ShuffledSource(source, WHOLE, buffer=1, repeat=False)
    made = MixBatches(
        lambda: TokenMix({"mine": Lane(1.0, samples, encoder(vlm))}), 10**6, tmp_path / "s.json", "", False
    )
    with pytest.warns(UserWarning, match=r"line 2: .*<\|video_pad\|>.*; such samples of mine are left out and counted"):
        assert sum(len(one["input_ids"]) for one in made(0)) == 4
    assert made.figures()["data/mine/skipped"] == 3


# -- conversations

SIZES = ((16, 16), (40, 24), (24, 60))
SHORT = settings(
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


def conversations(vlm: VLM, tokens: int, seed: int = 0) -> ConversationBatches:
    return ConversationBatches(samples(), lambda sample: encode(vlm, sample), tokens, seed)


def test_a_batch_follows_from_seed_and_number(vlm: VLM) -> None:
    first, again = conversations(vlm, 90), conversations(vlm, 90)
    whole = [ids(first(n)) for n in range(6)]
    assert [ids(again(n)) for n in (4, 1)] == [whole[4], whole[1]]
    assert ids(conversations(vlm, 90, seed=1)(0)) != whole[0]
    sizes = [sum(map(len, batch)) for batch in whole]
    assert 60 < sum(sizes) / len(sizes) < 120
    assert ids(conversations(vlm, 1)(0))[0] in ids(first(0))


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
    start, _ = train_transcoders(vlm, conversations(vlm, 90), [], settings(SHORT, max_steps=1, lr=1e-9), tmp_path / "a")
    before = evaluate_transcoders(Scope(vlm, start), val)
    trained, after = train_transcoders(vlm, conversations(vlm, 90), val, SHORT, tmp_path / "b")
    assert {p.dtype for p in trained.parameters()} == {torch.float32}
    assert after["val/fvu"] < 0.8 * before["val/fvu"]
    assert {"val/fvu_text", "val/fvu_image", "val/l0", "val/dead_frac", "val/ce", "val/ce_delta"} <= after.keys()
