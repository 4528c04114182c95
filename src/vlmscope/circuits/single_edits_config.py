"""Settings of single-feature edits: a plain record, free of torch, so that Hydra can register it."""

from __future__ import annotations

from dataclasses import dataclass, field

from vlmscope.core.errors import UserError


@dataclass
class SingleEditsConfig:
    """Which features are edited one at a time, how, and how much is asked for an interval (docs/circuits.md).

    Modes are those of `intervention`.

    Attributes:
        inputs: pictures a concept and question of `circuit`, or pairs a question of `pairs`.
        shares: features are drawn alike from those that together hold so much of the influence on the answer, and
            from each band between two shares; ascending.
        features: drawn from each band, at most.
        factors: what a feature's activation is multiplied by; 0 ablates.
        add: also add the mean activation of the layer's active features.
        least: fewer inputs than this give no interval, and an error.
        seed: of pictures and draws.
    """

    inputs: int = 2
    shares: list[float] = field(default_factory=lambda: [0.5, 0.8, 0.95, 1.0])
    features: int = 16
    factors: list[float] = field(default_factory=lambda: [0.0, 0.5, 0.9, 2.0, 4.0])
    add: bool = True
    least: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        for key, smallest in (("inputs", 1), ("features", 1), ("least", 2)):
            if getattr(self, key) < smallest:
                raise UserError(f"single_edits.{key}={getattr(self, key)}: it must be at least {smallest}")
        shares = list(self.shares)
        if not shares or shares != sorted(set(shares)) or shares[0] <= 0 or shares[-1] > 1:
            raise UserError(f"single_edits.shares={shares}: give ascending shares of influence above 0, at most 1")
        if not self.factors and not self.add:
            raise UserError("single_edits.factors=[] and single_edits.add=false leave nothing to do; choose a factor")
        if 1.0 in self.factors:
            raise UserError("single_edits.factors has 1, which changes nothing; leave it out")
