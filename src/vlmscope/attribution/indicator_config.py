"""Settings of the prediction of wrong answers from graphs: a plain record, so that Hydra can register it."""

from __future__ import annotations

from dataclasses import dataclass, field

from vlmscope.core.errors import UserError


@dataclass
class HallucinationConfig:
    """Which scenes are asked about, and how the prediction is judged (docs/circuits.md).

    Attributes:
        scenes: of each kind, from the test split, made harder (`data/orrery/harder.py`).
        levels: least and highest level of hardness, 0 being as in training.
        folds: of the cross-validation; a scene's cases are never split.
        shuffles: times that it is shuffled which answers are wrong.
        examples: pictures in the report.
        seed: of scenes, folds and draws.
    """

    scenes: dict[str, int] = field(default_factory=lambda: {"planets": 40, "digits": 40, "shapes": 40, "hands": 60})
    levels: list[float] = field(default_factory=lambda: [0.0, 0.6])
    folds: int = 10
    shuffles: int = 50
    examples: int = 6
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.levels) != 2 or not 0 <= self.levels[0] <= self.levels[1] <= 1:
            raise UserError(f"hallucination.levels={list(self.levels)}: give two levels, 0 <= least <= highest <= 1")
        if sum(self.scenes.values()) < 2 or min(self.scenes.values()) < 0:
            raise UserError(f"hallucination.scenes={dict(self.scenes)}: they count scenes; ask for two or more")
        for key, least in (("folds", 2), ("shuffles", 1), ("examples", 0)):
            if getattr(self, key) < least:
                raise UserError(f"hallucination.{key}={getattr(self, key)}: it must be at least {least}")
