"""Reading captions: which fact a word names, and how a steered caption is scored."""

import numpy as np
import pytest

from vlmscope.circuits.caption_pairs import CaptionPair
from vlmscope.core.intervention import Rate
from vlmscope.data.orrery.rendering import make_scene
from vlmscope.tasks.steps.caption_swaps import Swap, score
from vlmscope.tasks.steps.caption_words import REST, slots_of


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("planets", ["name", REST, REST, "colour", REST, REST, REST, "cover", REST]),
        ("digits", [REST, REST, REST, "first", REST, "second", REST]),
        ("shapes", ["count", "shape_colour", "shape", REST]),
        ("hands", [REST, REST, REST, "fingers", REST, REST]),
    ],
)
def test_words_name_facts(kind: str, expected: list[str]) -> None:
    for index in range(12):
        scene = make_scene("test", kind, index)
        caption = next(q.answer for q in scene.questions if q.group == "caption").split()
        found = slots_of(scene, caption)
        # "two digits , two and three": a number may stand for either, so that only the facts' own places count.
        if kind == "digits" and "two" in caption[3:]:
            continue
        assert list(found) == expected


def test_a_caption_is_right_when_every_word_is() -> None:
    words = (("mars", ",", "a", "red", "planet"), ("earth", ",", "a", "blue", "planet"))
    pairs: list[CaptionPair] = []
    swap = Swap("x", pairs, [np.zeros((1, 1, 3), np.uint8)], [words], Rate(1, 1, 1, 1))

    def of(text: str) -> dict[str, float]:
        return {name: rate.value for name, rate in score(swap, [text]).items()}

    assert of("earth , a blue planet") == {"all_right": 1.0, "right_words": 1.0, "kept_words": 1.0}
    assert of("mars , a blue planet") == {"all_right": 0.0, "right_words": 0.5, "kept_words": 1.0}
    assert of("mars , a red planet")["right_words"] == 0.0
    assert of("earth , a blue planet planet")["all_right"] == 0.0
    assert of("") == {"all_right": 0.0, "right_words": 0.0, "kept_words": 0.0}
    many = score(swap, ["earth , a blue planet", "mars , a red planet"])["all_right"]
    assert (many.value, many.cases) == (0.5, 2)
