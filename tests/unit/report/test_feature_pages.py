"""What a feature's strongest examples have in common, in words."""

import numpy as np
import pytest
from tests.unit.report.conftest import BOXES, GRID

from vlmscope.core.records import Exchange
from vlmscope.core.study import (
    ANSWER,
    IMAGE,
    TEXT,
    ExampleView,
    StudyExample,
    StudyItem,
)
from vlmscope.report import feature_page

N = len(BOXES)


def make_item(words: tuple[str, ...] = ("what", "is", "this", "?"), answer: str = "mars", number: int = 1) -> StudyItem:
    """A picture of `GRID` by `GRID` patches, then words and an answer."""
    tokens = ("<bos>", "<soi>", *["<soft>"] * N, "<eoi>", *words, answer)
    kinds = np.array([TEXT, TEXT, *[IMAGE] * N, *[TEXT] * (1 + len(words)), ANSWER], np.uint8)
    return StudyItem(
        number, "planets", number, 0, f"row {number}", f"{number:032x}", (Exchange(" ".join(words), answer),), "", 1,
        np.arange(len(tokens)), tokens, kinds, np.zeros(N, np.int64), BOXES, ((GRID, GRID),),
    )  # fmt: skip


def make_view(
    at: dict[int, int], activation: float = 4.0, group: str = "top", item: StudyItem | None = None
) -> ExampleView:
    """An example that fires at these positions with these levels; the peak is the largest."""
    item = item or make_item()
    positions = np.array(sorted(at), np.uint16)
    levels = np.array([at[int(p)] for p in positions], np.uint8)
    example = StudyExample(group, 0, activation, item.id, int(positions[levels.argmax()]), positions, levels)
    length = len(item.token_ids)
    return ExampleView(example, item, example.activations(length), example.dense_levels(length))


USUAL = {"what": 1.0, "is": 1.0, "this": 0.9, "mars": 0.1}


@pytest.mark.parametrize(
    ("position", "usual", "guess"),
    [
        (N + 6, USUAL, "right before the answer “mars”"),
        (N + 4, USUAL, "at “is”"),
        (N + 7, USUAL, "at “mars”"),
        (4, USUAL, "on pictures where the text says “mars”"),
        (4, {**USUAL, "mars": 0.9}, "on pictures of many kinds"),
        (None, USUAL, "never fires in this study"),
    ],
)
def test_guesses_from_the_strongest_examples(position: int | None, usual: dict, guess: str) -> None:
    views = [] if position is None else [make_view({position: 255})] * 3
    assert feature_page.guess([(view.item.caption, view.places()) for view in views], usual) == guess
