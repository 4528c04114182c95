"""Pictures of concepts show what they are asked for, and splits share nothing."""

import numpy as np
import pytest

from vlmscope.core.errors import UserError
from vlmscope.data.orrery.dataset import colour_scenes, concept_scenes, digit_scenes
from vlmscope.data.orrery.scenes import APPEARANCE, SHAPE_COLOURS, Scene, appearance


def numbers(scene: Scene, fact: str) -> list[float]:
    found = scene.facts[fact]
    assert isinstance(found, list)
    return found


def test_digits_have_the_first_and_the_second_that_were_asked_for() -> None:
    scenes = digit_scenes("seven", "test", 4, seed=1, second="two")
    assert all((s.facts["first"], s.facts["second"], s.facts["sum"]) == ("seven", "two", "nine") for s in scenes)
    drawn = digit_scenes("seven", "train", 20)
    assert len({str(scene.facts["second"]) for scene in drawn}) > 5
    train, test = ({s for scene in digit_scenes("five", split, 30) for s in numbers(scene, "sources")}
                   for split in ("train", "test"))  # fmt: skip
    assert train and test and not train & test  # handwriting that was never seen
    with pytest.raises(UserError, match="no digit 'ten'"):
        digit_scenes("three", "test", 1, second="ten")


def test_colours_are_on_the_picture() -> None:
    for colour, rgb in SHAPE_COLOURS.items():
        for scene in colour_scenes(colour, "test", 2):
            assert scene.facts["shape_colour"] == colour and scene.image is not None
            near = np.abs(scene.image.astype(int) - np.array(rgb)).max(-1) < 45
            assert near.mean() > 0.004
    assert len({str(scene.facts["count"]) for scene in colour_scenes("red", "train", 20)}) > 3
    with pytest.raises(UserError, match="no shapes are orange"):
        colour_scenes("orange", "test", 1)


def test_appearance_is_measured_on_the_disc() -> None:
    looks = {name: np.mean([appearance(s) for s in concept_scenes(name, "train", 12)], 0) for name in
             ("mars", "earth", "neptune", "moon")}  # fmt: skip
    red, texture = APPEARANCE.index("red"), APPEARANCE.index("texture")
    assert looks["mars"][red] > looks["moon"][red] > looks["neptune"][red]
    assert looks["earth"][texture] > looks["neptune"][texture]  # continents against an even disc
    scene = concept_scenes("mars", "train", 1)[0]
    assert scene.image is not None
    left, _, right, _ = numbers(scene, "box")
    assert appearance(scene)[APPEARANCE.index("size")] == pytest.approx((right - left) / 2)
    brighter = appearance(type(scene)(scene.kind, scene.key, np.minimum(scene.image * 1.0 + 20, 255).astype(np.uint8),
                                      scene.facts))  # fmt: skip
    assert brighter[0] > appearance(scene)[0]
