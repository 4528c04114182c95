"""Which cells are painted, in which order, and that areas and hits are what they are by hand."""

import numpy as np
import pytest

from vlmscope.attention.rollout import cell_values, painted, ranking
from vlmscope.core.maps import PictureMap, TileMap
from vlmscope.core.records import generator
from vlmscope.metrics.causal import bootstrap_mean
from vlmscope.metrics.prediction import area_under, pointing_hit
from vlmscope.models.boxes import grid_boxes


def test_cells_have_what_lies_in_them() -> None:
    values = generator(0, "cells").normal(size=(4, 4))
    found = PictureMap("x", 0, [TileMap(grid_boxes(4, 4), values)], 0.0, {})
    assert cell_values(found, 4) == pytest.approx(values)
    assert cell_values(found, 2) == pytest.approx(values.reshape(2, 2, 2, 2).sum((1, 3)))
    fine = cell_values(found, 8)
    assert fine == pytest.approx(np.kron(values, np.full((2, 2), 0.25)))


def test_the_largest_come_first_and_equals_in_no_order_of_their_own() -> None:
    values = np.array([[1.0, 5.0], [-2.0, 3.0]])
    assert ranking(values, 0).tolist() == [1, 3, 0, 2]
    flat = [ranking(np.ones((4, 4)), seed).tolist() for seed in range(3)]
    assert all(sorted(order) == list(range(16)) for order in flat)
    assert len({tuple(order) for order in flat}) == 3 and flat[0] == ranking(np.ones((4, 4)) + 1e-13, 0).tolist()


def test_deleted_cells_are_grey_and_inserted_ones_are_all_that_is_left() -> None:
    image = generator(1, "image").integers(0, 256, (12, 20, 3)).astype(np.uint8)
    mean = image.mean((0, 1)).round().astype(np.uint8)
    order = np.array([3, 0, 2, 1])
    found = painted(image, order, 2, [1, 3])
    deleted, inserted = list(found.deleted()), list(found.inserted())
    assert found.counts == (0, 1, 3, 4)
    assert np.array_equal(deleted[0], image) and np.array_equal(inserted[-1], image)
    assert (deleted[-1] == mean).all() and (inserted[0] == mean).all()
    one, other = deleted[1], inserted[1]
    assert (one[6:, 10:] == mean).all() and np.array_equal(other[6:, 10:], image[6:, 10:])
    assert np.array_equal(one[:6], image[:6]) and (other[:6] == mean).all()
    assert np.array_equal(deleted[2][:6, 10:], image[:6, 10:])  # the cell that goes last
    assert (deleted[2][:6, :10] == mean).all()


def test_areas_hits_and_means() -> None:
    assert area_under(np.array([0, 1, 4]), np.array([[2.0, 2, 2], [0, 1, 1]])) == pytest.approx([2, (0.5 + 3) / 4])
    on = np.array([[True, False], [False, False]])
    assert pointing_hit(np.array([[3.0, 1], [0, 2]]), on) == 1
    assert pointing_hit(np.array([[3.0, 4], [0, 2]]), on) == 0
    assert pointing_hit(np.zeros((2, 2)), on) == on.mean()
    values = generator(2, "means").normal(size=400) + 3
    rate = bootstrap_mean(values, control=1.5)
    spread = 1.96 * values.std() / 20
    assert rate.value == pytest.approx(values.mean()) and rate.control == 1.5 and rate.cases == 400
    assert rate.ci_low == pytest.approx(values.mean() - spread, abs=0.02)
    assert rate.ci_high == pytest.approx(values.mean() + spread, abs=0.02)
    with pytest.raises(ValueError, match="at least one case"):
        bootstrap_mean([])
