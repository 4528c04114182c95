"""Pairs differ in one fact and, to the pixel, in nothing else; rows and pairs of files are read or refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmscope.core.errors import UserError
from vlmscope.data.config import PairsConfig
from vlmscope.data.inputs import (
    UsedPictures,
    content_key,
    load_pairs,
    read_pairs,
    read_rows,
)
from vlmscope.data.orrery.dataset import CHANGES, ScenePair, scene_pairs
from vlmscope.data.orrery.scenes import SIDE

N = 24
GROUPS = {
    "left_planet": {"left", "left_colour", "left_cover"},
    "planet": {"name", "colour", "cover"},
    "first_digit": {"first", "sum"},
    "second_digit": {"second", "sum"},
    "count": {"count"},
    "shape": {"shape"},
    "shape_colour": {"shape_colour"},
    "object": {"shape", "shape_colour"},
    "fingers": {"fingers"},
}


def differs(pair: ScenePair) -> np.ndarray:
    """[64, 64] bool: the pixels that are not equal."""
    first, second = pair.original.image, pair.counterfactual.image
    assert first is not None and second is not None
    return (first != second).any(-1)


def answers(pair: ScenePair) -> list[tuple[str, str, str]]:
    both = zip(pair.original.questions, pair.counterfactual.questions, strict=True)
    return [(a.group, a.answer, b.answer) for a, b in both]


@pytest.mark.parametrize("change", list(CHANGES))
def test_only_the_changed_fact_gets_another_answer(change: str) -> None:
    for pair in scene_pairs(change, "test", N):
        moved = {group for group, a, b in answers(pair) if a != b}
        # Two planets may share a colour, which is then no difference.
        assert moved <= GROUPS[change]
        assert GROUPS[change] - moved <= {"colour", "left_colour"}
        questions = [(q.group, q.question) for q in pair.original.questions]
        assert questions == [(q.group, q.question) for q in pair.counterfactual.questions]
        assert differs(pair).any()


def boxes(pair: ScenePair) -> np.ndarray:
    """[64, 64] bool: where the shapes or planets of either scene can be."""
    found = np.zeros((SIDE, SIDE), bool)
    for scene in (pair.original, pair.counterfactual):
        flat = scene.facts.get("boxes") or scene.facts["box"]
        assert isinstance(flat, list)
        for left, top, right, bottom in np.reshape(flat, (-1, 4)) * SIDE:
            # A turned cross reaches a little out of its box.
            rows, columns = (slice(max(int(a) - 1, 0), int(b) + 2) for a, b in ((top, bottom), (left, right)))
            found[rows, columns] = True
    return found


@pytest.mark.parametrize("change", ["planet", "shape", "shape_colour", "object"])
def test_nothing_differs_outside_the_things_themselves(change: str) -> None:
    for pair in scene_pairs(change, "test", N):
        assert not (differs(pair) & ~boxes(pair)).any()
        assert pair.original.facts.get("box") == pair.counterfactual.facts.get("box")
        if change == "shape_colour":
            assert pair.original.facts["boxes"] == pair.counterfactual.facts["boxes"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    colours = {"a": (200, 0, 0), "a_copy": (200, 0, 0), "b": (0, 0, 200), "b, c": (0, 0, 0), "c": (9, 9, 9)}
    for name, colour in (colours | {"d": (0, 90, 0)}).items():
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    return tmp_path


def write(folder: Path, *lines: object) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


GOOD = {"prompt": "p ?", "image": "a.png", "answer": "red", "counterfactual": {"image": "b.png", "answer": "blue"}}


def test_own_pairs_fill_in_what_the_counterfactual_leaves_out(folder: Path) -> None:
    text = {"prompt": "p ?", "answer": "x", "counterfactual": {"prompt": "q ?", "answer": "y"}, "question": "text"}
    other = {**GOOD, "image": "c.png", "counterfactual": {"image": "d.png", "answer": "blue"}}
    pairs = read_pairs(write(folder, GOOD, text, {**other, "id": "third"}))
    assert [p.question for p in pairs] == ["answer", "text", "answer"]
    assert pairs[0].counterfactual.prompt == "p ?"
    assert pairs[0].original.images[0].getpixel((0, 0)) == (200, 0, 0)
    assert pairs[0].counterfactual.images[0].getpixel((0, 0)) == (0, 0, 200)
    assert (pairs[1].change, len(pairs[1].original.images)) == ("prompt", 0)
    config = PairsConfig(path=str(folder / "pairs.jsonl"), train=1, test=5)
    assert [len(load_pairs(config, split)) for split in ("train", "test")] == [1, 2]
    with pytest.raises(UserError, match="takes them all"):
        load_pairs(PairsConfig(path=str(folder / "pairs.jsonl"), train=3), "test")


def test_pairs_are_split_by_content_and_not_by_line(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy = {**GOOD, "image": "a_copy.png", "counterfactual": {"image": "d.png", "answer": "blue"}}
    words = {"prompt": "Is  it red ?", "answer": "x", "counterfactual": {"prompt": "q ?", "answer": "y"}}
    again = {"prompt": "r ?", "answer": "x", "counterfactual": {"prompt": "is it RED ?", "answer": "y"}}
    new = {"prompt": "p ?", "image": "c.png", "answer": "red", "counterfactual": {"image": "d.png", "answer": "blue"}}
    config = PairsConfig(path=str(write(folder, GOOD, words, copy, again, new)), train=2, test=3)
    (pair,) = load_pairs(config, "test")
    assert pair.id.endswith("line 5") and "2 pairs share an input with a training pair" in caplog.text
    write(folder, GOOD, words, copy, again)
    with pytest.raises(UserError, match="every pair after the first 2 shares an input"):
        load_pairs(config, "test")


def test_a_picture_that_chose_does_not_test() -> None:
    red, blue, large = (Image.new(mode, size, colour) for mode, size, colour in
                        (("RGB", (4, 4), "red"), ("RGB", (4, 4), "blue"), ("RGBA", (8, 2), "red")))  # fmt: skip
    assert content_key([red]) == content_key([red.convert("RGBA")]) != content_key([large])
    assert content_key([red], "Is  it?") == content_key([red], "is it?") != content_key([red], "is it")
    used = UsedPictures()
    used.add(False, "contrast", {"mars train 0": content_key([red])})
    used.add(True, "trials", {"mars test 0": content_key([blue])})
    for tests, name, picture in ((True, "a", red), (False, "b", blue)):
        with pytest.raises(UserError, match="has the same content as"):
            used.add(tests, "more", {name: content_key([picture])})
    assert used.tested == {"trials": {"mars test 0": content_key([blue])}}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "has no pair"),
        (["[" * 99_999], "line 1: not valid JSON"),
        ([[1]], "line 1: write"),
        ([{**GOOD, "colour": 1}], "no key 'colour'"),
        ([{**GOOD, "answer": " "}], "the original has no answer"),
        ([GOOD, {**GOOD, "counterfactual": {"answer": "blue"}}], "line 2: original and counterfactual are the same"),
        ([{**GOOD, "counterfactual": {"image": [], "answer": "blue"}}], "1 pictures, the counterfactual 0"),
        ([{**GOOD, "image": 3}], "neither a path nor a list"),
        ([{**GOOD, "id": 1}, {**GOOD, "id": 1}], "asks 'answer' twice"),
    ],
)
def test_own_pairs_that_cannot_be_used_are_one_line(folder: Path, lines: list, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        read_pairs(write(folder, *lines))
    assert "\n" not in str(error.value)


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
        ({"image": 3, "prompt": "a"}, "neither a path nor a list"),
        ({"id": "../x", "prompt": "a"}, "folder's name"),
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
    assert words in bad[0]
    assert "r.jsonl row 2: " in bad[0]


def test_lines_that_are_no_rows_are_told_from_good_ones(folder: Path) -> None:
    # JSON lets these stand in a string as they are (RFC 8259, section 7); only a line feed ends a line of JSONL.
    texts = [f"before{mark}after" for mark in "\u2028\u2029\x85\x7f\x9c"]
    lines = [json.dumps({"prompt": text, "image": "a.png"}, ensure_ascii=False) for text in texts]
    bad_lines = ['{"prompt": "a\fb"}', "[" * 99_999, '{"id": ' + "9" * 5000 + "}"]
    (folder / "r.jsonl").write_bytes("\r\n".join([*lines, *bad_lines, ""]).encode())
    (folder / "r.csv").write_bytes("\r\n".join(["prompt", *texts, "one, two"]).encode())
    good, bad = read_rows(folder / "r.jsonl")
    assert [row.prompt for row in good] == texts
    assert all(f"r.jsonl row {n}: not valid JSON" in one for n, one in enumerate(bad, start=6)) and len(bad) == 3
    good, (comma,) = read_rows(folder / "r.csv")
    assert [row.prompt for row in good] == texts and "double quotes" in comma
