"""A batch divided among processes: every row once, in order, with its own pictures."""

import numpy as np
import pytest
import torch
from torch import Tensor

from vlmscope.training.batches import Forward
from vlmscope.training.ranks import share

SOFT = 8


def forward(pictures: list[int], seed: int = 0, each: int = 4) -> dict[str, Tensor]:
    """A row for each number of pictures, `each` soft tokens a picture; every row and picture has values of its own."""
    rng = np.random.default_rng(seed)
    width = each * max(pictures) + 3
    ids = torch.from_numpy(rng.integers(10, 90, (len(pictures), width)))
    for row, count in enumerate(pictures):
        ids[row, : each * count] = SOFT
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if sum(pictures):
        found["pixel_values"] = torch.from_numpy(rng.standard_normal((sum(pictures), 3, 2, 2)))
    return found


def rows(batch: list[Forward]) -> list[tuple[list[int], list[float]]]:
    """Each row's tokens and its pictures' values."""
    found = []
    for one in batch:
        pixels, begin = one.get("pixel_values"), 0
        for ids in one["input_ids"]:
            count = int((ids == SOFT).sum()) // 4
            mine = [] if pixels is None else pixels[begin : begin + count].flatten().tolist()
            found.append((ids.tolist(), mine))
            begin += count
        assert pixels is None or begin == len(pixels), "a picture without its row"
    return found


BATCHES = {
    "one forward": [forward([1, 1, 1, 1, 1])],
    "texts": [forward([0, 0, 0])],
    "rows with none, one and two pictures": [forward([0, 2, 1, 0, 1])],
    "several forwards": [forward([1, 1], 1), forward([0, 0, 0], 2), forward([2], 3)],
}


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("name", BATCHES)
def test_the_parts_are_the_batch(name: str, parts: int) -> None:
    batch: list[Forward] = list(BATCHES[name])
    divided = [share(batch, part, parts, SOFT) for part in range(parts)]
    assert [row for part in divided for row in rows(part)] == rows(batch)
    sizes = [len(rows(part)) for part in divided]
    assert max(sizes) - min(sizes) <= 1


def test_a_single_forward_needs_no_list() -> None:
    (one,) = share(forward([1, 1]), 1, 2, SOFT)
    assert one["input_ids"].shape[0] == one["attention_mask"].shape[0] == one["pixel_values"].shape[0] == 1


def whole(batch: list[Forward], soft: int | None, parts: int = 3) -> bool:
    """Whether exactly one part has the single forward, untouched, and the others nothing."""
    divided = [share(batch, part, parts, soft) for part in range(parts)]
    return sorted(map(len, divided)) == [0] * (parts - 1) + [1] and any(
        part and part[0] is batch[0] for part in divided
    )


def test_what_cannot_be_parted_stays_whole() -> None:
    assert whole([{**forward([1, 1, 1]), "image_grid_thw": torch.ones(3, 3)}], SOFT)  # not a row of tokens each
    assert whole([forward([1, 1, 1])], None)  # no soft tokens that say whose a picture is
    odd = forward([1, 1, 1])
    odd["input_ids"][0, 0] = 9  # rows with pictures of different lengths
    assert whole([odd], SOFT)
    none: dict[str, Tensor] = {**forward([0, 0, 0]), "pixel_values": torch.zeros(2, 3, 2, 2)}
    assert whole([none], SOFT)  # pictures, and no row that takes them
    assert not whole([forward([1, 1, 1])], SOFT)
