"""The mix keeps its proportions, splits without loss or repeat, and goes on from its state with the very next item."""

import json
from collections import Counter
from collections.abc import Callable
from itertools import islice, product
from typing import Any

import pytest

from vlmscope.core.errors import UserError
from vlmscope.data.mixing import PATIENCE, Lane, ShuffledSource, TokenMix
from vlmscope.data.samples import WHOLE, RawSample, Share, Source, indexed
from vlmscope.training.batches import TokenPacker


def numbered(name: str, count: int) -> Source:
    return indexed(name, count, lambda row: RawSample(text=f"{name} {row}"))


class Words:
    """One item a sample, as many tokens as its number says (modulo 7, plus one)."""

    item: str | None = None

    def add(self, sample: RawSample) -> None:
        self.item = sample.text

    def pop(self) -> str | None:
        item, self.item = self.item, None
        return item

    def rest(self) -> None:
        return None

    def tokens(self, item: str) -> int:
        return int(item.split()[1]) % 7 + 1

    def state(self) -> None:
        return None

    def load(self, state: None) -> None:
        self.item = None


class Packed(TokenPacker):
    """Documents of as many tokens as their number says, packed to eight."""

    def __init__(self) -> None:
        super().__init__(eos=-1, length=8)

    def add(self, sample: Any) -> None:
        number = int(sample.text.split()[1])
        super().add([number] * (number % 11))

    def tokens(self, item: list[int]) -> int:
        return len(item)

    def state(self) -> list[int]:
        return list(self.left)

    def load(self, state: list[int]) -> None:
        self.left = list(state)


def mix(counts: tuple[int, int, int] = (400, 300, 200), repeat: bool = False, share: Share = WHOLE) -> TokenMix:
    weights = {"a": 2.0, "b": 2.0, "c": 1.0}
    return TokenMix(
        {
            name: Lane(weight, ShuffledSource(numbered(name, count), share, 16, 3, repeat), encoder())
            for (name, weight), count, encoder in zip(weights.items(), counts, (Packed, Words, Words), strict=True)
        }
    )


def shares(stream: TokenMix) -> dict[str, float]:
    return {name: count / sum(stream.tokens.values()) for name, count in stream.tokens.items()}


def test_shares_follow_the_weights_in_tokens_not_in_samples() -> None:
    stream = mix(repeat=True)
    for drawn in islice(stream, 500):
        assert drawn.tokens >= 1
        if sum(stream.tokens.values()) > 100:
            assert shares(stream) == pytest.approx({"a": 0.4, "b": 0.4, "c": 0.2}, abs=8 / 100)
    assert shares(stream) == pytest.approx({"a": 0.4, "b": 0.4, "c": 0.2}, abs=0.005)


def test_every_sample_comes_once_when_others_end_before() -> None:
    drawn = list(mix((40, 300, 3)))
    counts = Counter(one.item for one in drawn if one.source != "a")
    assert counts == Counter([*(f"b {n}" for n in range(300)), *(f"c {n}" for n in range(3))])
    words = Counter(token for one in drawn if one.source == "a" for token in one.item)
    assert words == Counter({-1: 40} | {n: n % 11 for n in range(40) if n % 11})


@pytest.mark.parametrize("repeat", [False, True])
def test_any_state_goes_on_with_the_very_next_item(repeat: bool) -> None:
    whole = [tuple(one) for one in islice(mix((40, 50, 20), repeat), 300)]
    for stop in (0, 1, 2, 15, 16, 17, 33, 60, len(whole) - 1):
        first = mix((40, 50, 20), repeat)
        list(islice(first, stop))
        state = json.loads(json.dumps(first.state_dict()))
        second = mix((40, 50, 20), repeat)
        second.load_state_dict(state)
        assert [tuple(one) for one in islice(second, len(whole) - stop)] == whole[stop:]
        assert second.tokens.keys() == first.tokens.keys()


def test_ranks_and_workers_share_without_loss_or_repeat() -> None:
    for size, ranks, workers in product(range(0, 14), range(1, 5), range(1, 4)):
        seen: list[str] = []
        for rank, worker in product(range(ranks), range(workers)):
            share = Share(rank * workers + worker, ranks * workers)
            stream = ShuffledSource(numbered("x", size), share, 4, 0)
            if size == 0 and share.total == 1:
                continue
            while (sample := stream.next()) is not None:
                seen.append(sample.text)
            stretches = [list(Share(n, ranks * workers).stretch(size)) for n in range(ranks * workers)]
            assert sum(stretches, []) == list(range(size))
            assert max(map(len, stretches)) - min(map(len, stretches)) <= 1
        assert sorted(seen) == sorted(f"x {row}" for row in range(size))


def test_packing_loses_no_token_and_states_the_end_of_documents() -> None:
    documents = [[10, 11, 12], [], [20] * 9, [30]]

    def packed(packer: TokenPacker) -> list[list[int]]:
        for document in documents:
            packer.add(document)
        return [*iter(packer.pop, None), *filter(None, [packer.rest()])]

    assert packed(TokenPacker(eos=0, length=4)) == [[10, 11, 12, 0], [0, 20, 20, 20], [20, 20, 20, 20], [20, 20, 0, 30]]
    with_head = packed(TokenPacker(eos=0, length=4, bos=1))
    assert all(one[0] == 1 and len(one) <= 4 for one in with_head)
    assert sum((one[1:] for one in with_head), []) == sum(([*one, 0] for one in documents), [])


def some_empty(count: int, empty: Callable[[int], bool]) -> Source:
    def sample(row: int) -> RawSample:
        if empty(row):
            raise UserError(f"row {row} is empty")
        return RawSample(text=str(row))

    return indexed("small", count, sample)


@pytest.mark.parametrize(
    ("count", "bad", "kept", "message"),
    [
        (12, 5, False, "its 7 samples all fall on the same side of data.val_share"),
        (12, 12, True, "no sample of it can be used, the first: row [0-9]+ is empty; check the data"),
        (0, 0, True, "it has no sample; check the data"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_source_that_gives_nothing_says_why(count: int, bad: int, kept: bool, message: str) -> None:
    stream = ShuffledSource(some_empty(count, lambda row: row < bad), keep=lambda _: kept)
    with pytest.raises(UserError, match=f"data.sources.small: {message}") as error:
        stream.next()
    assert "\n" not in str(error.value)


def test_unusable_samples_are_counted_and_too_many_are_an_error() -> None:
    stream = ShuffledSource(some_empty(30, lambda row: row % 3 == 0), buffer=5)
    with pytest.warns(UserWarning, match="is empty; such samples of small are left out"):
        texts = [one.text for one in iter(stream.next, None)]
    assert sorted(map(int, texts)) == [row for row in range(30) if row % 3]
    assert stream.skipped == 10
    with pytest.warns(UserWarning), pytest.raises(UserError, match=f"{PATIENCE} samples of small could not be used"):
        ShuffledSource(some_empty(1000, lambda row: True)).next()
