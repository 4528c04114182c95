"""Scenes are seeded, splits do not share sources, and every word is in the vocabulary."""

import numpy as np
import pytest

from vlmscope.core.records import generator
from vlmscope.data.orrery import hands, planets, shapes
from vlmscope.data.orrery.digits import glyphs
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.data.orrery.scenes import KINDS, NUMBERS, PLANETS, SIDE, SPLITS, vocabulary


@pytest.mark.parametrize("kind", KINDS)
def test_equal_arguments_give_equal_scenes_and_other_ones_differ(kind: str) -> None:
    one, again = make_scene("train", kind, 3, seed=1), make_scene("train", kind, 3, seed=1)
    assert one.questions == again.questions
    assert one.facts == again.facts
    others = [make_scene("val", kind, 3, 1), make_scene("train", kind, 4, 1), make_scene("train", kind, 3, 2)]
    if one.image is None:
        assert any(o.questions != one.questions for o in others)
        return
    assert again.image is not None
    assert one.image.shape == (SIDE, SIDE, 3)
    assert one.image.dtype == np.uint8
    assert np.array_equal(one.image, again.image)
    for other in others:
        assert other.image is not None
        assert not np.array_equal(one.image, other.image)


def test_every_word_of_every_scene_is_known() -> None:
    known = set(vocabulary())
    for split in SPLITS:
        for kind in KINDS:
            for index in range(30):
                for q in make_scene(split, kind, index).questions:
                    assert set(q.question.split()) | set(q.answer.split()) <= known


def test_splits_use_different_glyphs() -> None:
    sources = {split: {int(i) for part in glyphs(split)[1] for i in part} for split in SPLITS}
    assert not sources["train"] & sources["test"]
    assert not sources["train"] & sources["val"]
    assert not sources["val"] & sources["test"]
    assert len(set.union(*sources.values())) == 1797


def test_sum_is_the_sum() -> None:
    for index in range(40):
        facts = make_scene("test", "digits", index).facts
        first, second, total = (NUMBERS.index(str(facts[k])) for k in ("first", "second", "sum"))
        assert first + second == total


def test_hands_are_mostly_of_five_and_never_of_six() -> None:
    counts = [make_scene("train", "hands", i).facts["fingers"] for i in range(300)]
    assert counts.count("five") / 300 == pytest.approx(0.9, abs=0.06)
    assert "six" not in counts
    assert {"one", "two", "three", "four"} <= set(counts)


def test_more_fingers_and_shapes_cover_more_pixels() -> None:
    def skin(n: int) -> float:
        pictures = [hands.render(generator(7, i), n).astype(int) for i in range(12)]
        return float(np.mean([(np.abs(p - p[0, 0]).sum(-1) > 60).mean() for p in pictures]))

    areas = [skin(n) for n in range(1, 7)]
    assert areas == sorted(areas)
    _, boxes = shapes.render(generator(1, "x"), "star", "red", 5)
    assert len(boxes) == 20


@pytest.mark.parametrize("name", list(PLANETS))
def test_planet_box_holds_the_planet(name: str) -> None:
    image, facts = planets.render(generator(5, name), name)
    left, top, right, bottom = (round(v * SIDE) for v in facts["box"])
    inside = image[top:bottom, left:right].mean()
    assert 0 <= left < right <= SIDE
    assert inside > image.mean()


def test_unknown_split_or_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown split"):
        make_scene("dev", "planets", 0)
    with pytest.raises(ValueError, match="unknown scene kind"):
        make_scene("train", "cats", 0)
