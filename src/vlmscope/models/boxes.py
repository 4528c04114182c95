"""Where on a picture the cells of a vision tower's grid lie, through the processor's padding, resizing and cropping.

Boxes are fractions of the picture as it was given; x points right, y points down.
"""

from collections.abc import Mapping
from typing import Any

from vlmscope.core.images import PatchBox

WHOLE = PatchBox(0.0, 0.0, 1.0, 1.0)


def grid_boxes(rows: int, columns: int, window: PatchBox = WHOLE) -> list[PatchBox]:
    """The cells of a grid over a part of a picture, row by row.

    Args:
        rows: cells down.
        columns: cells across.
        window: the part that the grid covers; it may reach beyond the picture, where the processor padded.

    Returns:
        `rows * columns` boxes, cut at the picture's edges: a cell of nothing but padding has no area.
    """
    return [PatchBox(*map(_clip, cell)) for cell in grid_windows(rows, columns, window)]


def grid_windows(rows: int, columns: int, window: PatchBox) -> list[PatchBox]:
    """The cells of a grid row by row, not cut at the picture's edges, so that they can be divided further."""

    def x(column: int) -> float:
        return window.left + (window.right - window.left) * column / columns

    def y(row: int) -> float:
        return window.top + (window.bottom - window.top) * row / rows

    return [PatchBox(x(c), y(r), x(c + 1), y(r + 1)) for r in range(rows) for c in range(columns)]


def tile_boxes(rows: int, columns: int, side: int) -> list[PatchBox]:
    """A picture cut into `rows * columns` tiles of `side * side` cells, tile by tile, then the picture as one tile."""
    tiles = [cell for tile in grid_boxes(rows, columns) for cell in grid_boxes(side, side, tile)] if rows else []
    return tiles + grid_boxes(side, side)


def _clip(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def square_window(size: tuple[int, int]) -> PatchBox:
    """The square around a picture of this width and height that a processor pads it to, the picture in its middle."""
    width, height = size
    side = max(size)
    left, top = -((side - width) // 2), -((side - height) // 2)
    return PatchBox(left / width, top / height, (left + side) / width, (top + side) / height)


def seen_window(size: tuple[int, int], processor: Any) -> PatchBox:
    """The part of a picture that a pad-resize-crop image processor shows to the tower.

    Args:
        size: width and height of the picture in pixels.
        processor: a Hugging Face image processor with `do_resize`, `do_center_crop` and perhaps `do_pad` (to a square).
    """
    width, height = size
    window = square_window(size) if getattr(processor, "do_pad", None) else WHOLE
    left, top = window.left * width, window.top * height
    across, down = (window.right - window.left) * width, (window.bottom - window.top) * height
    if processor.do_resize and processor.do_center_crop:
        resized_width, resized_height = _resized(across, down, processor.size)
        crop = processor.crop_size
        # Hugging Face crops whole pixels of the resized picture.
        left += (int(resized_width - crop["width"]) // 2) * across / resized_width
        top += (int(resized_height - crop["height"]) // 2) * down / resized_height
        across, down = crop["width"] * across / resized_width, crop["height"] * down / resized_height
    return PatchBox(left / width, top / height, (left + across) / width, (top + down) / height)


def _resized(width: float, height: float, size: Mapping[str, int]) -> tuple[int, int]:
    shortest = size.get("shortest_edge")
    if shortest is None:
        return size["width"], size["height"]
    short, long = min(width, height), max(width, height)
    longer = int(shortest * long / short)
    return (shortest, longer) if width <= height else (longer, shortest)
