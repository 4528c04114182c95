"""Records become conversations, captions and texts; the order of drawing has each once an epoch."""

import json
from typing import Any

import pytest

from vlmscope.core.errors import UserError
from vlmscope.core.records import CAPTION_REQUEST, Exchange
from vlmscope.data.samples import drawn, exchanges_of, record_parts


def test_the_three_layouts() -> None:
    turns = [{"user": "a ?", "assistant": "b", "source": "x"}, {"user": "c", "assistant": "d"}]
    for record, names, sample in (
        ({"images": ["i", "j"], "texts": turns, "id": 4}, ["i", "j"], (Exchange("a ?", "b"), Exchange("c", "d"))),
        ({"texts": turns[:1]}, [], (Exchange("a ?", "b"),)),
        ({"images": ["i"], "text": "a red planet"}, ["i"], (Exchange(CAPTION_REQUEST, "a red planet"),)),
    ):
        assert record_parts(record, "line 1") == (names, sample, "")
    for record in ({"text": "words"}, {"text": "words", "images": []}):
        assert record_parts(record, "line 1") == ([], (), "words")


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ([1], "not a JSON object"),
        ({"caption": "x", "id": 1}, "neither texts nor text, .*; its keys are caption, id"),
        ({"messages": [], "conversations": []}, "both messages and conversations"),
        ({"text": "x", "images": ["a"], "image": "b"}, "both images and image"),
        ({"text": "x", "image": 3}, "image must be a path"),
        ({"texts": [], "text": "x"}, "both texts and text"),
        ({"texts": []}, "texts must be a list"),
        ({"texts": {"user": "x"}}, "texts must be a list"),
        ({"texts": ["x"]}, "texts must be a list"),
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
        record_parts(record, "train.jsonl line 7")


def image_parts(*parts: str) -> list[dict[str, Any]]:
    """Content as Hugging Face's processors take it; Arrow fills the keys that a part lacks with null."""
    return [
        {"type": "image", "text": None} if part == "<image>" else {"type": "text", "text": part, "index": None}
        for part in parts
    ]


def said(layout: str, *turns: tuple[str, Any]) -> list[dict[str, Any]]:
    """The same conversation in another layout; speakers in its own words."""
    if layout == "from":
        names = {"user": "human", "assistant": "gpt"}
        return [{"from": names.get(who, who), "value": words} for who, words in turns]
    return [{"role": who, "content": words} for who, words in turns]


TWO = (Exchange("a ?", "b"), Exchange("c ?", "d"))
TURNS = (("user", "a ?"), ("assistant", "b"), ("user", "c ?"), ("assistant", "d"))
REST = TURNS[1:]


@pytest.mark.parametrize(
    ("value", "n_images", "exchanges"),
    [
        ([{"user": "a ?", "assistant": "b", "source": "x"}, {"user": "c ?", "assistant": "d"}], 1, TWO),
        ({"user": ["a ?", "c ?"], "assistant": ["b", "d"], "source": ["x", "x"]}, 1, TWO),  # a column of structs
        ([{"user": "see <image> ?", "assistant": "b"}], 1, (Exchange("see <image> ?", "b"),)),  # verbatim, as before
        (said("role", *TURNS), 0, TWO),
        (said("from", *TURNS), 0, TWO),
        ({"role": ["user", "assistant"], "content": ["a ?", "b"]}, 0, TWO[:1]),
        ({"from": ["human", "gpt"], "value": ["a ?", "b"]}, 0, TWO[:1]),
        # Encoded as JSON, whole or each entry.
        (json.dumps([{"user": "a ?", "assistant": "b"}, {"user": "c ?", "assistant": "d"}]), 2, TWO),
        ([json.dumps(turn) for turn in said("role", *TURNS)], 0, TWO),
        (json.dumps(said("from", *TURNS)), 0, TWO),
        # Pictures: none written (the template places them), or one mark for each, before or after the first question.
        (said("from", *TURNS), 2, TWO),
        (said("from", ("user", "<image>\na ?"), *REST), 1, TWO),
        (said("from", ("user", "a ?\n<image>"), *REST), 1, TWO),
        (said("from", ("user", "<image>\n<image>\na ?"), *REST), 2, TWO),
        (said("from", ("user", "<image> a ? <image>"), *REST), 2, TWO),
        (said("role", ("user", "<image>a ?"), *REST), 1, TWO),
        (said("role", ("user", image_parts("<image>", "a ?")), ("assistant", image_parts("b")), *TURNS[2:]), 1, TWO),
        (said("role", ("user", image_parts("a", " ?", "<image>", "<image>")), *REST), 2, TWO),
        # A system message goes before the first question, as Gemma's template puts it; an empty one is none.
        (said("role", ("system", "Be kind."), *TURNS), 0, (Exchange("Be kind.\n\na ?", "b"), TWO[1])),
        (said("from", ("system", "s"), ("user", "<image>\na ?"), *REST), 1, (Exchange("s\n\na ?", "b"), TWO[1])),
        (said("role", ("system", ""), *TURNS), 0, TWO),
    ],
)
def test_conversations_of_the_common_layouts(value: Any, n_images: int, exchanges: tuple[Exchange, ...]) -> None:
    assert exchanges_of(value, n_images, "row 1: texts") == exchanges
    key = "messages" if "role" in str(value) else "conversations"
    names = [f"{n}.png" for n in range(n_images)]
    record = {"images": names, key: value}
    assert record_parts(record, "line 1") == (names, exchanges, "")
    if n_images == 1:
        assert record_parts({"image": "0.png", key: value}, "line 1") == (names, exchanges, "")


@pytest.mark.parametrize(
    ("value", "n_images", "words"),
    [
        (None, 0, "texts must be a list .*; it is None"),
        ([], 0, "texts must be a list .*; it is \\[\\]"),
        ("hello", 0, "texts must be a list .*; it is 'hello'"),
        (["hello", "you"], 0, "texts must be a list .*; its first entry is 'hello'"),
        ([3], 0, "texts must be a list .*; its first entry is 3"),
        ([{"question": "a", "answer": "b"}], 0, "its first entry has the keys answer, question"),
        ({"question": ["a"], "answer": ["b"]}, 0, "its first entry has the keys answer, question"),
        ({"user": ["a"], "assistant": []}, 0, "texts must be a list"),
        (
            [*said("role", *TURNS), {"from": "human", "value": "x"}],
            0,
            "entry 5 has the keys from, value, the first .* role",
        ),
        (said("role", ("tool", "a"), *REST), 0, "message 1 is of 'tool'; user, assistant and system are read"),
        (said("role", ("user", None), *REST), 0, "user of exchange 1 is missing or empty"),
        (said("role", ("user", "a"), ("assistant", " ")), 0, "assistant of exchange 1 is missing or empty"),
        (said("role", ("user", 3), *REST), 0, "message 1 is neither a text nor a list of parts"),
        (said("role", *TURNS[:3]), 0, "it ends with a question"),
        (said("from", *REST), 0, "message 1 is the assistant's where the user's is due"),
        (said("from", TURNS[0], TURNS[0]), 0, "message 2 is the user's where the assistant's is due"),
        (said("role", *TURNS, ("system", "s")), 0, "message 5 is the system's where the user's is due"),
        (said("role", ("system", "s")), 0, "it has no question"),
        (said("from", ("user", "<image>\na"), *REST), 2, "1 <image> are written and 2 pictures are given"),
        (said("from", ("user", "<image>\na"), *REST), 0, "1 <image> are written and 0 pictures are given"),
        (said("from", ("user", "compare <image> with <image> ?"), *REST), 2, "<image> within the words"),
        (said("role", ("user", image_parts("a", "<image>", "b")), *REST), 1, "<image> within the words"),
        (said("from", *TURNS[:2], ("user", "<image>\nc"), TURNS[3]), 1, "<image> within the words or after"),
        (said("from", ("user", "a"), ("assistant", "<image>")), 1, "<image> within the words or after"),
        (said("from", ("user", "<image>"), *REST), 1, "user of exchange 1 is missing or empty"),
        (
            said("role", ("user", [{"type": "image_url", "image_url": {"url": "x"}}]), *REST),
            1,
            "a part of type 'image_url'",
        ),
        (said("role", ("user", [{"type": "image", "path": "x.png"}]), *REST), 1, "brings a picture of its own"),
        (said("role", ("user", ["a"]), *REST), 0, "parts that are objects"),
    ],
)
def test_conversations_of_other_layouts_are_refused_in_one_line(value: Any, n_images: int, words: str) -> None:
    with pytest.raises(UserError, match=f"row 1: .*{words}") as error:
        exchanges_of(value, n_images, "row 1: texts")
    assert "\n" not in str(error.value)


def test_each_example_comes_once_an_epoch() -> None:
    order = [drawn(3, n, 10) for n in range(30)]
    epochs = [order[:10], order[10:20], order[20:]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order != [drawn(4, n, 10) for n in range(30)]
    assert [drawn(3, n, 10) for n in (25, 3)] == [order[25], order[3]]  # whatever was asked before
