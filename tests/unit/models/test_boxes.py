"""Boxes through padding, resizing and cropping, against numbers worked out by hand."""

from types import SimpleNamespace

import pytest

from vlmscope.core.records import PatchBox
from vlmscope.models.boxes import grid_boxes, seen_window, square_window


def processor(**changes) -> SimpleNamespace:
    settings = {"do_resize": True, "do_center_crop": True, "size": {"shortest_edge": 336}}
    return SimpleNamespace(**settings, crop_size={"width": 336, "height": 336}, **changes)


def test_the_middle_square_is_seen_when_the_processor_crops() -> None:
    assert seen_window((672, 336), processor()) == pytest.approx((0.25, 0.0, 0.75, 1.0))
    assert seen_window((100, 400), processor()) == pytest.approx((0.0, 0.375, 1.0, 0.625))
    assert seen_window((500, 500), processor()) == pytest.approx((0, 0, 1, 1))


def test_everything_is_seen_when_the_processor_pads_to_a_square() -> None:
    assert seen_window((672, 336), processor(do_pad=True)) == pytest.approx((0.0, -0.5, 1.0, 1.5))
    assert square_window((50, 100)) == pytest.approx((-0.5, 0.0, 1.5, 1.0))


def test_a_grid_runs_row_by_row_and_ends_at_the_picture() -> None:
    boxes = grid_boxes(2, 4, square_window((50, 100)))
    assert boxes[1] == pytest.approx((0.0, 0.0, 0.5, 0.5)) and boxes[6] == pytest.approx((0.5, 0.5, 1.0, 1.0))
    assert boxes[0] == PatchBox(0.0, 0.0, 0.0, 0.5)  # padding alone
