"""Pairs differ in one fact and, to the pixel, in nothing else; one's own pairs are read or refused in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmscope.core.errors import UserError
from vlmscope.data.config import PairsConfig
from vlmscope.data.orrery.dataset import CHANGES, ScenePair, scene_pairs
from vlmscope.data.orrery.scenes import NUMBERS, SIDE
from vlmscope.data.pairs import load_pairs, orrery_pairs, read_pairs

N = 24
GROUPS = {
    "planet": {"name", "colour", "cover"},
    "first_digit": {"first", "sum"},
    "second_digit": {"second", "sum"},
    "count": {"count"},
    "shape": {"shape"},
    "shape_colour": {"shape_colour"},
    "object": {"shape", "shape_colour"},
    "fingers": {"fingers"},
}


def answers(pair: ScenePair) -> list[tuple[str, str, str]]:
    both = zip(pair.original.questions, pair.counterfactual.questions, strict=True)
    return [(a.group, a.answer, b.answer) for a, b in both]


@pytest.mark.parametrize("change", list(CHANGES))
def test_pairs_are_seeded_and_splits_and_seeds_differ(change: str) -> None:
    one, again = scene_pairs(change, "test", 3, 5), scene_pairs(change, "test", 3, 5)
    for a, b in zip(one, again, strict=True):
        assert np.array_equal(a.original.image, b.original.image)
        assert np.array_equal(a.counterfactual.image, b.counterfactual.image)
        assert (a.values, answers(a)) == (b.values, answers(b))
    for others in (scene_pairs(change, "train", 3, 5), scene_pairs(change, "test", 3, 6)):
        assert not any(np.array_equal(a.original.image, b.original.image) for a, b in zip(one, others, strict=True))
    # A longer list begins with the shorter one.
    assert np.array_equal(scene_pairs(change, "test", 5, 5)[2].original.image, one[2].original.image)


@pytest.mark.parametrize("change", list(CHANGES))
def test_only_the_changed_fact_gets_another_answer(change: str) -> None:
    for pair in scene_pairs(change, "test", N):
        moved = {group for group, a, b in answers(pair) if a != b}
        # Two planets may share a colour, which is then no difference.
        assert moved <= GROUPS[change]
        assert GROUPS[change] - moved <= {"colour"}
        questions = [(q.group, q.question) for q in pair.original.questions]
        assert questions == [(q.group, q.question) for q in pair.counterfactual.questions]
        assert pair.differs.any()


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
        assert not (pair.differs & ~boxes(pair)).any()
        assert pair.original.facts.get("box") == pair.counterfactual.facts.get("box")
        if change == "shape_colour":
            assert pair.original.facts["boxes"] == pair.counterfactual.facts["boxes"]


def test_another_planet_has_the_same_stars_and_disc() -> None:
    for pair in scene_pairs("planet", "test", N):
        first, second = pair.original.image, pair.counterfactual.image
        assert first is not None and second is not None
        left, top, right, bottom = np.array(pair.original.facts["box"]) * SIDE
        radius = max(right - left, bottom - top) / 2
        y, x = np.mgrid[:SIDE, :SIDE] + 0.5
        # A disc that the picture's edge cuts has a smaller box: only whole ones are looked at.
        if min(left, top) > 0 and max(right, bottom) < SIDE:
            outside = np.hypot(x - (left + right) / 2, y - (top + bottom) / 2) > radius + 1
            assert np.array_equal(first[outside], second[outside])


@pytest.mark.parametrize(
    ("change", "own", "other"), [("first_digit", "first", "second"), ("second_digit", "second", "first")]
)
def test_the_other_digit_stays_the_same_glyph(change: str, own: str, other: str) -> None:
    for pair in scene_pairs(change, "test", N):
        columns = np.flatnonzero(pair.differs.any(0))
        # The glyph's cell: 9 columns of at most 3.6 pixels, turned and sheared, around 16 or 48, give or take 2.
        middle = 16 if own == "first" else 48
        assert np.abs(columns + 0.5 - middle).max() < 2 + 4.5 * 3.6 + 6
        facts, changed = pair.original.facts, pair.counterfactual.facts
        assert facts[other] == changed[other]
        assert facts[own] != changed[own]
        at = ("first", "second").index(other)
        assert facts["sources"][at] == changed["sources"][at]  # type: ignore[index]
        total = [NUMBERS.index(str(f["first"])) + NUMBERS.index(str(f["second"])) for f in (facts, changed)]
        assert [NUMBERS.index(str(f["sum"])) for f in (facts, changed)] == total


def test_one_shape_more_leaves_the_others_where_they_are() -> None:
    for pair in scene_pairs("count", "test", N):
        before, after = pair.original.facts["boxes"], pair.counterfactual.facts["boxes"]
        assert isinstance(before, list) and isinstance(after, list)
        assert after[: len(before)] == before
        assert len(after) == len(before) + 4
        left, top, right, bottom = np.array(after[-4:]) * SIDE
        rows, columns = np.nonzero(pair.differs)
        assert top - 2 <= rows.min() and rows.max() <= bottom + 1
        assert left - 2 <= columns.min() and columns.max() <= right + 1


def test_one_finger_more_is_all_that_is_drawn() -> None:
    for pair in scene_pairs("fingers", "test", N):
        before, after = pair.original.image, pair.counterfactual.image
        assert before is not None and after is not None
        ground = before[0, 0].astype(int)
        # What differs was ground (or its soft edge) and is skin now: nothing was erased.
        nearer = np.abs(after.astype(int) - ground).sum(-1) - np.abs(before.astype(int) - ground).sum(-1)
        assert (nearer[pair.differs] > 0).all()
        assert 10 < pair.differs.sum() < 200


def test_values_can_be_chosen() -> None:
    pairs = scene_pairs("fingers", "test", 4, original="five", counterfactual="six")
    assert {pair.values for pair in pairs} == {("five", "six")}
    assert {p.values[1] for p in scene_pairs("planet", "test", 8, counterfactual="earth")} == {"earth"}


@pytest.mark.parametrize(
    ("change", "original", "counterfactual", "said"),
    [
        ("colours", None, None, "no pairs that differ in 'colours'"),
        ("planet", "saturn", None, "no value 'saturn'"),
        ("planet", "mars", "mars", "the two must differ"),
        ("fingers", "five", "four", "one more"),
        ("count", "six", None, "one more"),
    ],
)
def test_pairs_that_cannot_be_are_refused(
    change: str, original: str | None, counterfactual: str | None, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        scene_pairs(change, "test", 1, 0, original, counterfactual)


def test_every_question_of_a_scene_becomes_a_pair() -> None:
    pairs = orrery_pairs("first_digit", "test", 2)
    assert [pair.question for pair in pairs] == ["first", "second", "sum"] * 2
    assert [pair.moves for pair in pairs] == [True, False, True] * 2
    assert len({pair.id for pair in pairs}) == 2
    assert load_pairs(PairsConfig(change="first_digit", test=2), "test")[0].id == pairs[0].id


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, colour in (("a", (200, 0, 0)), ("b", (0, 0, 200))):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    return tmp_path


def write(folder: Path, *lines: object) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


GOOD = {"prompt": "p ?", "image": "a.png", "answer": "red", "counterfactual": {"image": "b.png", "answer": "blue"}}


def test_own_pairs_fill_in_what_the_counterfactual_leaves_out(folder: Path) -> None:
    text = {"prompt": "p ?", "answer": "x", "counterfactual": {"prompt": "q ?", "answer": "y"}, "question": "text"}
    pairs = read_pairs(write(folder, GOOD, text, {**GOOD, "id": "third"}))
    assert [p.question for p in pairs] == ["answer", "text", "answer"]
    assert pairs[0].counterfactual.prompt == "p ?"
    assert pairs[0].original.images[0].getpixel((0, 0)) == (200, 0, 0)
    assert pairs[0].counterfactual.images[0].getpixel((0, 0)) == (0, 0, 200)
    assert (pairs[1].change, len(pairs[1].original.images)) == ("prompt", 0)
    config = PairsConfig(path=str(folder / "pairs.jsonl"), train=1, test=5)
    assert [len(load_pairs(config, split)) for split in ("train", "test")] == [1, 2]
    with pytest.raises(UserError, match="takes them all"):
        load_pairs(PairsConfig(path=str(folder / "pairs.jsonl"), train=3), "test")


def test_line_ends_of_unicode_do_not_end_a_pair(folder: Path) -> None:
    asked = [f"a{mark}b ?" for mark in "\u2028\u2029\x85"]
    lines = [json.dumps({**GOOD, "prompt": text, "id": text}, ensure_ascii=False) for text in asked]
    assert [pair.original.prompt for pair in read_pairs(write(folder, *lines))] == asked


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "has no pair"),
        (["[" * 99_999], "line 1: not valid JSON"),
        (["{"], "line 1: not valid JSON"),
        ([[1]], "line 1: write"),
        ([{**GOOD, "counterfactual": None}], "line 1: write"),
        ([{**GOOD, "colour": 1}], "no key 'colour'"),
        ([{**GOOD, "answer": " "}], "the original has no answer"),
        ([GOOD, {**GOOD, "counterfactual": {"answer": "blue"}}], "line 2: original and counterfactual are the same"),
        ([{**GOOD, "counterfactual": {"image": [], "answer": "blue"}}], "1 pictures, the counterfactual 0"),
        ([{**GOOD, "image": "c.png"}], "c.png"),
        ([{**GOOD, "image": 3}], "neither a path nor a list"),
        ([{**GOOD, "id": 1}, {**GOOD, "id": 1}], "asks 'answer' twice"),
    ],
)
def test_own_pairs_that_cannot_be_used_are_one_line(folder: Path, lines: list, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        read_pairs(write(folder, *lines))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [{}, {"change": "planet", "path": "x"}, {"change": "planet", "train": -1}, {"change": "planet", "test": 0}],
)
def test_settings_that_cannot_be_are_refused(settings: dict) -> None:
    with pytest.raises(UserError, match="pairs"):
        PairsConfig(**settings)


def test_captions_are_kept_beside_the_questions() -> None:
    for pair in scene_pairs("object", "test", 6):
        for words, caption in zip(pair.values, pair.captions, strict=True):
            colour, shape = words.split()
            assert caption.split()[1] == colour
            assert caption.split()[2].startswith(shape)
        assert pair.values[0].split()[0] != pair.values[1].split()[0]
        assert pair.values[0].split()[1] != pair.values[1].split()[1]
