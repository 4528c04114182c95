"""Harder scenes: reproducible, with the facts of the easy ones, harder with the level."""

import numpy as np
import pytest

from vlmscope.core.errors import UserError
from vlmscope.data.orrery.objects import degrade, harder_scenes
from vlmscope.data.orrery.rendering import make_scene


def test_scenes_are_test_scenes_with_their_answers() -> None:
    counts = {"planets": 2, "digits": 1, "shapes": 1, "hands": 12}
    scenes = harder_scenes(counts, (0.2, 0.5), seed=4)
    again = harder_scenes(counts, (0.2, 0.5), seed=4)
    assert [scene.key for scene in scenes[:2]] == ["test-planets-000000", "test-planets-000001"]
    assert len({scene.key for scene in scenes}) == 16
    for one, same in zip(scenes, again, strict=True):
        assert one.image is not None and same.image is not None
        np.testing.assert_array_equal(one.image, same.image)
        level = one.facts["level"]
        assert isinstance(level, float) and 0.2 <= level <= 0.5
        assert all(" " not in question.answer for question in one.questions)  # captions are left out
    easy = make_scene("test", "planets", 1, 4)
    assert [q.answer for q in scenes[1].questions] == [q.answer for q in easy.questions[:3]]
    fingers = {scene.questions[0].answer for scene in scenes[4:]}
    assert fingers == {"five", "six"}
    first, other = scenes[0].image, harder_scenes(counts, (0.2, 0.5), seed=5)[0].image
    assert first is not None and other is not None and not np.array_equal(other, first)


def test_a_level_makes_the_picture_smaller_darker_and_noisy() -> None:
    image = make_scene("test", "shapes", 3).image
    assert image is not None
    rng = np.random.default_rng
    np.testing.assert_array_equal(degrade(image, 0.0, rng(0)), image)
    hard = degrade(image, 1.0, rng(0))
    assert hard.shape == image.shape and hard.dtype == np.uint8
    assert hard.max() < image.max()
    corner = degrade(np.full_like(image, 128), 1.0, rng(1)).astype(float) / 255
    assert corner.mean() == pytest.approx(0.3 * 128 / 255, abs=0.02)  # clipping at black lifts it a little
    assert 0.08 < corner.std() < 0.12


def test_scenes_without_pictures_are_refused() -> None:
    with pytest.raises(UserError, match="no harder scenes of 'text': choose from planets"):
        harder_scenes({"text": 1}, (0, 1))
