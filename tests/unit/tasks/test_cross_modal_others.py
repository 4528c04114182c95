"""Which other concepts each one is tested with."""

from types import SimpleNamespace
from typing import Any

from vlmscope.features.cross_modal_config import CrossModalConfig, CrossQuestion
from vlmscope.tasks.steps.cross_modal_effects import drawn_others

ANSWERS = {"earth": "blue", "neptune": "blue", "mars": "red", "saturn": "yellow"}


def config(others: int | None) -> CrossModalConfig:
    asked = CrossQuestion("what colour is this planet ?", "what colour is {concept} ?", ANSWERS)
    return CrossModalConfig(list(ANSWERS), {"colour": asked}, others=others)


def test_all_others_or_some_with_another_answer() -> None:
    bench: Any = SimpleNamespace(cfg=SimpleNamespace(seed=0))
    whole = drawn_others(bench, config(None), "colour")
    assert whole["earth"] == ["neptune", "mars", "saturn"]
    some = [drawn_others(SimpleNamespace(cfg=SimpleNamespace(seed=seed)), config(2), "colour") for seed in range(9)]  # type: ignore[arg-type]
    assert all(set(one["earth"]) == {"mars", "saturn"} for one in some)  # neptune is blue too
    assert all(len(one["mars"]) == 2 and "mars" not in one["mars"] for one in some)
    assert len({tuple(one["mars"]) for one in some}) > 1
