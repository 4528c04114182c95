"""Masks of objects against what the pictures show."""

import numpy as np
import pytest

from vlmscope.core.records import PatchBox
from vlmscope.data.orrery.objects import covered_cells, object_mask, painted_mask, share_in_boxes
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.data.orrery.scenes import SHAPES
from vlmscope.data.orrery.shapes import counted_scenes


@pytest.mark.parametrize("kind", ["planets", "digits", "shapes", "hands"])
def test_objects_stand_out_from_what_is_around_them(kind: str) -> None:
    for index in range(6):
        scene = make_scene("test", kind, index, 7)
        assert scene.image is not None
        mask = object_mask(scene)
        assert mask.shape == (64, 64) and 0.02 < mask.mean() < 0.9
        far = np.abs(scene.image.astype(float) - np.median(scene.image[~mask], axis=0)).max(-1)
        assert far[mask].mean() > 5 * far[~mask].mean()


def test_a_digit_can_be_asked_for_alone() -> None:
    scene = make_scene("test", "digits", 0, 7)
    first, second, both = (object_mask(scene, group) for group in ("first", "second", "sum"))
    assert not first[:, 32:].any() and not second[:, :32].any() and first.any() and second.any()
    assert np.array_equal(first | second, both)


def test_a_cell_counts_from_a_quarter_on() -> None:
    mask = np.zeros((8, 8), bool)
    mask[0, :4], mask[4:6, 4:6] = True, True
    mask[4, 0] = True
    assert covered_cells(mask, 2).tolist() == [[True, False], [False, True]]
    mask[0, 0] = False
    assert covered_cells(mask, 2).tolist() == [[False, False], [False, True]]


def test_painted_pixels_lie_in_the_boxes_and_shares_are_of_each_box() -> None:
    scene = make_scene("test", "shapes", 3)
    assert scene.image is not None
    painted, boxed = painted_mask(scene.image), object_mask(scene)
    assert painted.any()
    assert (painted & ~boxed).mean() < 0.01  # a turned cross reaches a little out of its box
    halves = [PatchBox(0, 0, 0.5, 1), PatchBox(0.5, 0, 1, 1)]
    shares = share_in_boxes(painted, halves)
    assert shares.mean() == painted.mean()
    assert shares[0] == painted[:, :32].mean()


def test_counted_scenes_are_balanced_and_painted_as_they_say() -> None:
    pixels, facts = counted_scenes("test", 60, 0)
    count, shape, _ = facts.T
    assert np.bincount(count)[1:].tolist() == [10] * 6
    assert np.bincount(shape).tolist() == [12] * len(SHAPES)
    assert np.corrcoef(count, [painted_mask(one).sum() for one in pixels])[0, 1] > 0.8
    assert not np.array_equal(pixels[0], counted_scenes("train", 1, 0)[0][0])
