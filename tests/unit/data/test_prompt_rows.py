"""Rows of prompts and pictures: both file kinds give the same, every mistake names its row."""

import json
from pathlib import Path

import pytest
from PIL import Image

from vlmscope.core.errors import UserError
from vlmscope.data.prompts import read_rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b, c.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path


def test_csv_and_jsonl_say_the_same(folder: Path) -> None:
    (folder / "r.csv").write_text('﻿id, image ,prompt\nx,a.png,"one, two"\n,"a.png; b, c.png",three\n3,,no picture\n')
    lines = [
        {"id": "x", "image": "a.png", "prompt": "one, two"},
        {"image": ["a.png", "b, c.png"], "prompt": "three"},
        {"id": 3, "prompt": "no picture", "image": None},
    ]
    (folder / "r.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = [read_rows(folder / name) for name in ("r.csv", "r.jsonl")]
    assert [bad for _, bad in found] == [[], []]
    for rows, _ in found:
        assert [(row.id, row.prompt) for row in rows] == [
            ("x", "one, two"),
            ("row_00002", "three"),
            ("3", "no picture"),
        ]
        assert [row.images for row in rows] == [(folder / "a.png",), (folder / "a.png", folder / "b, c.png"), ()]
    assert found[0][0][1].origin.endswith("r.csv row 2")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"image": "nowhere.png", "prompt": "a"}, "no such file"),
        ({"image": "a.png"}, "no prompt"),
        ({"image": "a.png", "prompt": " "}, "no prompt"),
        ({"image": 3, "prompt": "a"}, "neither a path nor a list"),
        ({"img": "a.png", "prompt": "a"}, "no key 'img'"),
        ({"id": "../x", "prompt": "a"}, "folder's name"),
        ({"id": ".x", "prompt": "a"}, "folder's name"),
        ({"id": "good", "prompt": "a"}, "row 1"),
        (["a"], "not a JSON object"),
    ],
)
def test_a_bad_row_is_named_and_the_others_remain(folder: Path, line: object, words: str) -> None:
    rows = [{"id": "good", "prompt": "x"}, line, {"id": "last", "prompt": "y"}]
    (folder / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    good, bad = read_rows(folder / "r.jsonl")
    assert [row.id for row in good] == ["good", "last"]
    assert len(bad) == 1
    assert words in str(bad[0])
    assert "r.jsonl row 2: " in str(bad[0])


# JSON lets every one of these stand in a string as it is (RFC 8259, section 7); only a line feed ends a line of JSONL.
BREAKS = "\u2028\u2029\x85\x7f\x9c"


def test_line_ends_of_unicode_do_not_end_a_row(folder: Path) -> None:
    texts = [f"before{mark}after" for mark in BREAKS]
    lines = [json.dumps({"prompt": text, "image": "a.png"}, ensure_ascii=False) for text in texts]
    (folder / "r.jsonl").write_bytes("\r\n".join([*lines, ""]).encode())
    (folder / "r.csv").write_bytes("\r\n".join(["prompt", *texts]).encode())
    for name in ("r.jsonl", "r.csv"):
        good, bad = read_rows(folder / name)
        assert ([row.prompt for row in good], bad) == (texts, [])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a\fb"}', "not valid JSON (Invalid control character at column 14"),
        ("[" * 99_999, "not valid JSON"),
        ('{"id": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_a_line_that_is_not_json_is_one_bad_row(folder: Path, line: str, words: str) -> None:
    (folder / "r.jsonl").write_text(f'{line}\n{{"prompt": "good"}}\n')
    good, (bad,) = read_rows(folder / "r.jsonl")
    assert [row.prompt for row in good] == ["good"] and "r.jsonl row 1: " in str(bad) and words in str(bad)


def test_a_prompt_with_a_bare_comma_is_told_from_a_good_row(folder: Path) -> None:
    (folder / "r.csv").write_text("image,prompt\na.png,one, two\na.png,good\n")
    good, bad = read_rows(folder / "r.csv")
    assert len(good) == 1
    assert "double quotes" in str(bad[0])


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("r.txt", "a", "give a .csv or a .jsonl"),
        ("r.csv", "image,question\na.png,b\n", "columns image, question"),
        ("r.csv", "", "columns (none)"),
        ("r.csv", "image,prompt\n", "has no row"),
        ("r.jsonl", "\n", "has no row"),
    ],
)
def test_files_that_hold_no_rows_are_refused(folder: Path, name: str, text: str, words: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(UserError) as error:
        read_rows(folder / name)
    assert words in str(error.value)
