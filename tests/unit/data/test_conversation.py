"""Records become conversations, captions and texts; a folder of them is read lazily and checked whole before use."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmscope.core.errors import UserError
from vlmscope.core.records import CAPTION_REQUEST, Conversation, Document, Exchange
from vlmscope.data.config import SourceConfig
from vlmscope.data.mixing import open_source
from vlmscope.data.samples import WHOLE, exchanges_of, record_parts
from vlmscope.data.tables import JsonLines, load_folder


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
        ({"texts": [{"user": "a", "assistant": "b"}, {"user": "a"}]}, "assistant of exchange 2 is missing"),
        ({"texts": [{"user": " ", "assistant": "b"}]}, "user of exchange 1 is missing or empty"),
        ({"text": ""}, "text is missing or empty"),
        ({"text": "x", "images": "a.png"}, "images must be a list of paths"),
        ({"text": "x", "imges": ["a.png"]}, "no key 'imges'; did you mean 'images'"),
        ({"text": "x", "picture": "a.png"}, "no key 'picture'; .* go into facts"),
        ({"texts": [{"user": "a", "assistant": "b"}], "Image": "a.png"}, "no key 'Image'; did you mean 'image'"),
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
        ({"role": ["user", "assistant"], "content": ["a ?", "b"]}, 0, TWO[:1]),
        # Encoded as JSON, whole or each entry.
        (json.dumps([{"user": "a ?", "assistant": "b"}, {"user": "c ?", "assistant": "d"}]), 2, TWO),
        ([json.dumps(turn) for turn in said("role", *TURNS)], 0, TWO),
        (json.dumps(said("from", *TURNS)), 0, TWO),
        # Pictures: none written (the template places them), or one mark for each, before or after the first question.
        (said("from", *TURNS), 2, TWO),
        (said("from", ("user", "<image>\na ?"), *REST), 1, TWO),
        (said("from", ("user", "a ?\n<image>"), *REST), 1, TWO),
        (said("from", ("user", "<image> a ? <image>"), *REST), 2, TWO),
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
        ("hello", 0, "texts must be a list .*; it is 'hello'"),
        (["hello", "you"], 0, "texts must be a list .*; its first entry is 'hello'"),
        ([{"question": "a", "answer": "b"}], 0, "its first entry has the keys answer, question"),
        ({"user": ["a"], "assistant": []}, 0, "texts must be a list"),
        (
            [*said("role", *TURNS), {"from": "human", "value": "x"}],
            0,
            "entry 5 has the keys from, value, the first .* role",
        ),
        (said("role", ("tool", "a"), *REST), 0, "message 1 is of 'tool'; user, assistant and system are read"),
        (said("role", ("user", "a"), ("assistant", " ")), 0, "assistant of exchange 1 is missing or empty"),
        (said("role", ("user", 3), *REST), 0, "message 1 is neither a text nor a list of parts"),
        (said("role", *TURNS[:3]), 0, "it ends with a question"),
        (said("from", *REST), 0, "message 1 is the assistant's where the user's is due"),
        (said("role", *TURNS, ("system", "s")), 0, "message 5 is the system's where the user's is due"),
        (said("role", ("system", "s")), 0, "it has no question"),
        (said("from", ("user", "<image>\na"), *REST), 2, "1 <image> are written and 2 pictures are given"),
        (said("from", ("user", "compare <image> with <image> ?"), *REST), 2, "<image> within the words"),
        (said("role", ("user", image_parts("a", "<image>", "b")), *REST), 1, "<image> within the words"),
        (said("from", *TURNS[:2], ("user", "<image>\nc"), TURNS[3]), 1, "<image> within the words or after"),
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


TURN = {"user": "what is this ?", "assistant": "red"}


def write(folder: Path, records: list[Any], name: str = "train.jsonl") -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    for number in range(4):
        Image.new("RGB", (8 + number, 6), (number, 0, 0)).save(tmp_path / "pictures" / f"{number}.png")
    return tmp_path


def test_lines_are_read_when_they_are_asked_for(folder: Path) -> None:
    records = [{"images": [f"pictures/{n}.png"], "texts": [{**TURN, "assistant": f"é{n}"}]} for n in range(4)]
    lines = JsonLines(write(folder, [records[0], "", records[1], {"text": "words"}, *records[2:]]))
    assert len(lines) == 5
    third = lines[3]
    assert isinstance(third, Conversation)
    assert (third.images[0].size, third.exchanges[0].assistant) == ((10, 6), "é2")
    assert third.origin.endswith("train.jsonl line 5")
    assert isinstance(lines[2], Document)
    assert [sample.origin[-1] for sample in lines[1:3]] == ["3", "4"]
    (folder / "pictures" / "3.png").unlink()
    assert lines[0].exchanges[0].assistant == "é0"
    with pytest.raises(UserError, match="line 6: image .*3.png: no such file"):
        _ = lines[4]


def test_validation_is_its_own_file_or_a_seeded_share(folder: Path) -> None:
    write(folder, [{"text": f"t{n}"} for n in range(40)])
    train, val = load_folder(folder, 0.1, 0)
    texts = [sample.text for part in (train, val) for sample in part]
    assert (len(train), len(val)) == (36, 4)
    assert sorted(texts) == sorted(f"t{n}" for n in range(40))
    again, other = load_folder(folder, 0.1, 0)[1], load_folder(folder, 0.1, 1)[1]
    assert again.lines == val.lines != other.lines
    assert len(load_folder(folder, 0.001, 0)[1]) == 1
    write(folder, [{"text": "v"}], "val.jsonl")
    train, val = load_folder(folder, 0.1, 0)
    assert (len(train), [sample.text for sample in val]) == (40, ["v"])


def test_no_example_is_in_training_and_in_validation(folder: Path) -> None:
    """Split by words and pictures' bytes, whatever the line or the name of the file."""
    picture = (folder / "pictures" / "2.png").read_bytes()
    (folder / "pictures" / "copy.png").write_bytes(picture)
    (folder / "pictures" / "other.png").write_bytes(picture + b"\0" * 4)
    names = ["pictures/2.png", "pictures/copy.png", "pictures/other.png"]
    shown = [{"images": [name], "texts": [{"user": "what ?", "assistant": "red"}]} for name in names]
    texts = [{"text": text} for n in range(8) for text in (f"Text {n}", f"text  {n}")]
    path = write(folder, [*texts[:8], *shown, *texts[8:]])
    contents = JsonLines(path).contents()
    assert len(set(contents)) == 10 and contents[8] == contents[9] != contents[10]
    for seed in range(6):
        train, val = load_folder(folder, 0.3, seed)
        assert len(train) + len(val) == 19 and 6 <= len(val) <= 7
        assert not {*train.contents()} & {*val.contents()}
    write(folder, [{"text": "a"}, {"text": "A "}])
    with pytest.raises(UserError, match="all the same"):
        load_folder(folder, 0.1, 0)


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([], "holds no example"),
        (["", " "], "holds no example"),
        ([{"text": "x"}, "{'text': 1}"], r"line 2: not valid JSON \(Expecting property name"),
        (["[" * 99_999], "line 1: not valid JSON"),
        ([{"text": "x"}, {"caption": "x"}], "line 2: it has neither"),
        ([{"text": "x"}, {"images": ["pictures/9.png"], "text": "x"}], "line 2: image .*9.png: no such file"),
        ([{"images": ["pictures"], "text": "x"}], "line 1: image .*is a folder"),
        ([{"images": ["train.jsonl"], "text": "x"}], "line 1: image .*cannot be read as a picture"),
    ],
)
def test_the_whole_file_is_checked_before_use(folder: Path, records: list[Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        JsonLines(write(folder, records))


@pytest.mark.parametrize("text", ["a \ud800 b", "caf\udce9"])  # no characters: neither UTF-8 nor any tokenizer has them
def test_texts_of_half_characters_are_left_out_or_refused(folder: Path, text: str) -> None:
    write(folder, [{"text": "x"}, json.dumps({"images": ["pictures/1.png"], "texts": [{**TURN, "assistant": text}]})])
    first, second = open_source("it", SourceConfig("folder", str(folder))).open(WHOLE)
    assert first().text == "x"
    with pytest.raises(UserError, match="line 2: .* is not a valid character"):
        second()
    # A folder that is trained on as it is has all its lines looked at first.
    with pytest.raises(UserError, match="line 2: .* is not a valid character"):
        load_folder(folder, 0.1, 0)
