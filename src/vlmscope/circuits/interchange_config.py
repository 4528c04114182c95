"""Settings of interchange interventions: a plain record, free of torch, so that Hydra can register it."""

from __future__ import annotations

from dataclasses import dataclass, field

from vlmscope.core.errors import UserError


@dataclass
class InterchangeConfig:
    """How features are chosen on training pairs and carried over on test pairs (docs/circuits.md).

    Modes, scopes and the number of control draws are those of `intervention`.

    Attributes:
        circuit: folder of a saved circuit, instead of features chosen on training pairs.
        features: how many are chosen for each question, those of most estimated effect.
        counts: points of the curve over the number of features.
        steps: inputs at which gradients are taken for the estimate.
        generate: pairs on which the answer is generated too, token by token; 0 leaves that out.
        answerable: only pairs count that are answered rightly on both sides; false takes all.
        least: fewer answerable pairs than this give no interval, and an error.
        scenes: train and held-out scenes on which visual_arithmetic and counting look at what features say.
        transfer: pairs of each split that counting groups by another fact.
    """

    circuit: str | None = None
    features: int = 300
    counts: list[int] = field(default_factory=lambda: [10, 30, 100, 300, 1000])
    steps: int = 5
    generate: int = 20
    answerable: bool = True
    least: int = 10
    scenes: list[int] = field(default_factory=lambda: [1500, 700])
    transfer: int = 240

    def __post_init__(self) -> None:
        for key, smallest in (("features", 1), ("steps", 1), ("generate", 0), ("least", 2), ("transfer", 1)):
            if getattr(self, key) < smallest:
                raise UserError(f"interchange.{key}={getattr(self, key)}: it must be at least {smallest}")
        if any(count < 1 for count in self.counts):
            raise UserError(f"interchange.counts={list(self.counts)}: they count features; choose 1 or more")
        if len(self.scenes) != 2 or min(self.scenes) < 1:
            raise UserError(f"interchange.scenes={list(self.scenes)}: give two counts, training and held-out scenes")
