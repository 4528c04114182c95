"""Which fact each word of a scene's caption names."""

import pytest

from vlmscope.data.orrery.rendering import make_scene


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("planets", ["name", "", "", "colour", "", "", "", "cover", ""]),
        ("digits", ["", "", "", "first", "", "second", ""]),
        ("shapes", ["count", "shape_colour", "shape", ""]),
        ("hands", ["", "", "", "fingers", "", ""]),
    ],
)
def test_words_name_facts(kind: str, expected: list[str]) -> None:
    for index in range(12):
        scene = make_scene("test", kind, index)
        caption = scene.answer("caption").split()
        # "two digits , two and three": a number may stand for either, so that only the facts' own places count.
        if kind == "digits" and "two" in caption[3:]:
            continue
        assert list(scene.facts_named(caption)) == expected
