"""Batches of a mix follow from the number alone, whatever was asked before, and from a state on the disk."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from vlmscope.core.artifacts import read_json
from vlmscope.core.errors import UserError
from vlmscope.data.config import SourceConfig
from vlmscope.data.mixing import Lane, ShuffledSource, TokenMix, open_source
from vlmscope.data.packing import TokenPacker
from vlmscope.data.samples import WHOLE, Share
from vlmscope.models.conversations import LOSS_MASK, encode, ends_of_text, sequence_forward, text_ids
from vlmscope.models.loading import VLM
from vlmscope.models.tiny import tiny_image, tiny_vlm
from vlmscope.training.batches import EVERY, MixBatches, MixValidation, OwnPart, SampleEncoder
from vlmscope.training.batches import EncodedForward as Forward

WEIGHTS = {"text": 2.0, "captions": 2.0, "questions": 1.0}


@pytest.fixture(scope="module")
def vlm() -> VLM:
    return tiny_vlm("smolvlm", 1)


def encoder(vlm: VLM) -> SampleEncoder:
    eos, bos = ends_of_text(vlm.tokenizer)
    return SampleEncoder(
        lambda sample: encode(vlm, sample),
        lambda text: text_ids(vlm, text),
        lambda ids: sequence_forward(vlm, ids),
        TokenPacker(eos, 16, bos),
    )


def mix(vlm: VLM, repeat: bool = True, share: Share = WHOLE) -> TokenMix[list[Forward]]:
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


def test_figures_are_those_of_all_processes(vlm: VLM, tmp_path: Path) -> None:
    asked: list[list[float]] = []
    made = MixBatches(lambda: mix(vlm), 60, tmp_path / "a.json", "", False, Share(0, 2), lambda own: _plus(asked, own))
    made(0)
    figures = made.figures()
    tokens = [made.mix.tokens[name] + 10 for name in WEIGHTS]
    assert [figures[f"data/{name}/tokens_share"] for name in WEIGHTS] == [count / sum(tokens) for count in tokens]
    assert [figures[f"data/{name}/skipped"] for name in WEIGHTS] == [10.0] * 3 and figures["data/bad_shards"] == 10
    assert len(asked) == 1


def _plus(asked: list[list[float]], own: Sequence[float]) -> list[float]:
    asked.append(list(own))
    return [value + 10 for value in own]


def test_shares_are_those_of_tokens(vlm: VLM, tmp_path: Path) -> None:
    made = batches(vlm, tmp_path / "a.json")
    tokens: dict[str, int] = {}
    stream = mix(vlm)
    for number in range(60):
        made(number)
    while sum(tokens.values()) < sum(made.mix.tokens.values()):
        drawn = next(stream)
        counted = sum(one["attention_mask"].sum().item() for one in drawn.item)
        assert counted == drawn.tokens
        tokens[drawn.source] = tokens.get(drawn.source, 0) + drawn.tokens
    total = sum(tokens.values())
    for name, weight in WEIGHTS.items():
        assert made.figures()[f"data/{name}/tokens_share"] == tokens[name] / total
        assert tokens[name] / total == pytest.approx(weight / 5, abs=0.03)


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


def test_the_end_of_all_sources_is_told(vlm: VLM, tmp_path: Path) -> None:
    made = MixBatches(lambda: mix(vlm, repeat=False), 100_000, tmp_path / "a.json", "", False)
    made(0)
    with pytest.raises(UserError, match="all sources have ended before batch 1: add data.sources.NAME.repeat=true"):
        made(1)


def test_validation_takes_as_many_of_every_source(vlm: VLM) -> None:
    def stream(name: str, share: float) -> ShuffledSource:
        source = open_source(name, SourceConfig("orrery", stream=name, limit=30))
        return ShuffledSource(source, buffer=1, keep=lambda _sample: share > 0)

    held = MixValidation({name: (stream(name, 1), encoder(vlm)) for name in WEIGHTS}, 9)
    assert len(held) == 9
    pictures = [any("pixel_values" in one for one in held[n]) for n in range(9)]
    assert pictures == [False] * 3 + [True] * 6
    assert [ids(one) for one in held] == [ids(one) for one in held]
    with pytest.raises(UserError, match="its 30 samples all fall on the same side of data.val_share"):
        MixValidation({"text": (stream("text", 0), encoder(vlm))}, 9)
    long = encoder(vlm)
    long.encode = lambda sample: encode(vlm, sample, 8)
    with (
        pytest.warns(UserWarning),
        pytest.raises(UserError, match="for validation can be used, the first: .*max_tokens"),
    ):
        MixValidation({"captions": (stream("captions", 1), long)}, 9)


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
