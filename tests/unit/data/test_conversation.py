"""Records become conversations, captions and texts; the order of drawing has each once an epoch."""

from typing import Any

import pytest
from PIL import Image

from vlmscope.core.conversation import CAPTION_REQUEST, Conversation, Document, Exchange
from vlmscope.core.errors import UserError
from vlmscope.data.conversation import check_record, drawn, sample_of

PICTURE = Image.new("RGB", (2, 2))


def test_the_three_layouts() -> None:
    turns = [{"user": "a ?", "assistant": "b", "source": "x"}, {"user": "c", "assistant": "d"}]
    for record, names, sample in (
        ({"images": ["i", "j"], "texts": turns, "id": 4}, ["i", "j"], (Exchange("a ?", "b"), Exchange("c", "d"))),
        ({"texts": turns[:1]}, [], (Exchange("a ?", "b"),)),
        ({"images": ["i"], "text": "a red planet"}, ["i"], (Exchange(CAPTION_REQUEST, "a red planet"),)),
    ):
        opened: list[str] = []

        def open_picture(name: str, opened: list[str] = opened) -> Image.Image:
            opened.append(name)
            return PICTURE

        assert check_record(record, "line 1") == names
        assert sample_of(record, open_picture, "line 1") == Conversation((PICTURE,) * len(names), sample, "line 1")
        assert opened == names
    for record in ({"text": "words"}, {"text": "words", "images": []}):
        assert check_record(record, "line 1") == []
        assert sample_of(record, lambda _: PICTURE) == Document("words")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ([1], "not a JSON object"),
        ({"caption": "x"}, "neither texts nor text"),
        ({"texts": [], "text": "x"}, "both texts and text"),
        ({"texts": []}, "texts must be a list"),
        ({"texts": {"user": "x"}}, "texts must be a list"),
        ({"texts": ["x"]}, "exchange 1 of texts is not a JSON object"),
        ({"texts": [{"user": "a", "assistant": "b"}, {"user": "a"}]}, "assistant of exchange 2 is missing"),
        ({"texts": [{"user": " ", "assistant": "b"}]}, "user of exchange 1 is missing or empty"),
        ({"texts": [{"user": 3, "assistant": "b"}]}, "user of exchange 1 is missing"),
        ({"text": ""}, "text is missing or empty"),
        ({"text": "x", "images": "a.png"}, "images must be a list of paths"),
        ({"text": "x", "images": [None]}, "images must be a list of paths"),
    ],
)
def test_other_records_are_refused_with_their_line(record: Any, words: str) -> None:
    with pytest.raises(UserError, match=f"train.jsonl line 7: .*{words}"):
        check_record(record, "train.jsonl line 7")


def test_each_example_comes_once_an_epoch() -> None:
    order = [drawn(3, n, 10) for n in range(30)]
    epochs = [order[:10], order[10:20], order[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order != [drawn(4, n, 10) for n in range(30)]
    assert [drawn(3, n, 10) for n in (25, 3)] == [order[25], order[3]]  # whatever was asked before
