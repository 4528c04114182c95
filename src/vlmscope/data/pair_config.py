"""Settings of counterfactual pairs: a plain record, so that Hydra can register it."""

from __future__ import annotations

from dataclasses import dataclass

from vlmscope.core.errors import UserError


@dataclass
class PairsConfig:
    """Pairs of inputs that differ in one fact (docs/circuits.md).

    Attributes:
        change: the fact of Orrery's scenes that differs; None for pairs of one's own.
        path: a JSONL file of one's own pairs.
        original: the fact's word in every original, drawn when None.
        counterfactual: the same in every counterfactual.
        train: pairs on which features are chosen.
        test: pairs on which effects are measured; of one's own, those that are left.
        seed: of the pairs.
    """

    change: str | None = None
    path: str | None = None
    original: str | None = None
    counterfactual: str | None = None
    train: int = 60
    test: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.change is None) == (self.path is None):
            raise UserError(
                "pairs: give pairs.change=<fact> for Orrery's scenes or pairs.path=<file.jsonl>, one of them"
            )
        if self.train < 0:
            raise UserError(f"pairs.train={self.train}: it counts pairs; choose 0 or more")
        if self.test < 1:
            raise UserError(f"pairs.test={self.test}: it counts pairs; choose 1 or more")
