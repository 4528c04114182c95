"""A folder of the user's own data: read lazily, checked whole before use, mistakes named with their line."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlmscope.core.errors import UserError
from vlmscope.core.records import Conversation, Document
from vlmscope.data.config import SourceConfig
from vlmscope.data.folder import JsonLines, load_folder
from vlmscope.data.mixing import open_source
from vlmscope.data.samples import WHOLE

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


def test_lines_as_llava_has_them_keep_their_picture(folder: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "red"}]
    (sample,) = JsonLines(write(folder, [{"id": "1", "image": "pictures/2.png", "conversations": turns}]))
    (row,) = open_source("it", SourceConfig("folder", str(folder))).open(WHOLE)
    assert sample.exchanges == row().exchanges == (("what ?", "red"),)
    assert [one.size for one in sample.images] == [one.size for one in row().opened().images] == [(10, 6)]


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


def test_a_picture_damaged_after_its_header_is_found_on_reading(folder: Path) -> None:
    picture = folder / "pictures" / "noise.png"
    Image.effect_noise((64, 64), 90).save(picture)
    picture.write_bytes(picture.read_bytes()[:600])
    lines = JsonLines(write(folder, [{"text": "x"}, {"images": ["pictures/noise.png"], "text": "x"}]))
    with pytest.raises(UserError, match=r"train\.jsonl line 2: image .*noise.png: cannot be read as a picture"):
        _ = lines[1]


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


def test_other_mistakes(folder: Path) -> None:
    with pytest.raises(UserError, match="no train.jsonl in .*docs/bring_your_own.md"):
        load_folder(folder, 0.1, 0)
    write(folder, [{"text": "only one"}])
    with pytest.raises(UserError, match="1 examples, too few to hold 1 out"):
        load_folder(folder, 0.1, 0)
    (folder / "train.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(UserError, match="line 1: not UTF-8"):
        JsonLines(folder / "train.jsonl")
