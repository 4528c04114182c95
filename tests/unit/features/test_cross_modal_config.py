"""What a set of concepts may say."""

import pytest

from vlmscope.core.errors import UserError
from vlmscope.features.config import CrossModalConfig, CrossQuestion
from vlmscope.features.cross_modal import drawn_others

ANSWERS = {"red": "red", "yellow": "yellow", "blue": "blue"}


def question(**changed) -> CrossQuestion:
    given = {"picture": "what colour is this ?", "text": "what colour is {concept} ?", "answers": ANSWERS} | changed
    return CrossQuestion(**given)


def test_a_word_may_stand_for_the_concept_in_the_text() -> None:
    asked = question(words={"red": "mars"})
    assert asked.asked_in_text("red") == "what colour is mars ?"
    assert asked.asked_in_text("blue") == "what colour is blue ?"


def test_an_unknown_source_is_refused() -> None:
    CrossModalConfig(list(ANSWERS), {"colour": question()}, source="colours")
    with pytest.raises(UserError, match=r"cross_modal.source=animals: choose one of planets, digits, colours"):
        CrossModalConfig(list(ANSWERS), {"colour": question()}, source="animals")


def test_all_others_or_some_with_another_answer() -> None:
    answers = {"earth": "blue", "neptune": "blue", "mars": "red", "saturn": "yellow"}

    def drawn(others: int | None, seed: int = 0) -> dict[str, list[str]]:
        config = CrossModalConfig(list(answers), {"colour": question(answers=answers)}, others=others)
        return drawn_others(config, "colour", seed)

    assert drawn(None)["earth"] == ["neptune", "mars", "saturn"]
    some = [drawn(2, seed) for seed in range(9)]
    assert all(set(one["earth"]) == {"mars", "saturn"} for one in some)  # neptune is blue too
    assert all(len(one["mars"]) == 2 and "mars" not in one["mars"] for one in some)
    assert len({tuple(one["mars"]) for one in some}) > 1
