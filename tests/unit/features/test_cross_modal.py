"""What a set of concepts may say, and which other concepts it is tested with."""

import pytest

from vlmscope.core.errors import UserError
from vlmscope.features.config import CrossModalConfig, CrossQuestion
from vlmscope.features.cross_modal import drawn_others

ANSWERS = {"earth": "blue", "neptune": "blue", "mars": "red", "saturn": "yellow"}


def config(**changed) -> CrossModalConfig:
    asked = CrossQuestion("what colour is this ?", "what colour is {concept} ?", ANSWERS, words={"mars": "dust"})
    return CrossModalConfig(list(ANSWERS), {"colour": asked}, **changed)


def test_a_word_may_stand_for_the_concept_in_the_text() -> None:
    asked = config().questions["colour"]
    assert [asked.asked_in_text(one) for one in ("mars", "earth")] == [
        "what colour is dust ?",
        "what colour is earth ?",
    ]


def test_an_unknown_source_is_refused() -> None:
    config(source="colours")
    with pytest.raises(UserError, match=r"cross_modal.source=animals: no such choice; choose one of planets, digits"):
        config(source="animals")


def test_all_others_or_some_with_another_answer() -> None:
    assert drawn_others(config(), "colour", 0)["earth"] == ["neptune", "mars", "saturn"]
    some = [drawn_others(config(others=2), "colour", seed) for seed in range(9)]
    assert all(set(one["earth"]) == {"mars", "saturn"} for one in some)  # neptune is blue too
    assert all(len(one["mars"]) == 2 and "mars" not in one["mars"] for one in some)
    assert len({tuple(one["mars"]) for one in some}) > 1
