"""The numbers by which an experiment is judged when it is run again: a plain record for its YAML."""

from dataclasses import dataclass

from omegaconf import MISSING

from vlmscope.core.errors import UserError


@dataclass
class HeadlineConfig:
    """Where one metric of an experiment must lie, both ends included (docs/reproduce.md).

    Attributes:
        low: the least, in the metric's own unit. `task=reproduce task.seeds=[0,1,2]` makes ranges.
        high: the most.
        says: what the number means, in one line.
    """

    low: float = MISSING
    high: float = MISSING
    says: str = MISSING

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise UserError(
                f"headline: low={self.low:g} and high={self.high:g} leave no range; low must be at most high"
            )
        if not self.says.strip():
            raise UserError(
                f"headline: the range {self.low:g} to {self.high:g} does not say what it means; fill in says"
            )

    def holds(self, value: float | None) -> bool:
        """Whether a measured value lies in the range; one that is missing or not a number does not."""
        return value is not None and self.low <= value <= self.high


def check_reproducible(reproduce: bool, paper: str | None, headline: dict[str, HeadlineConfig]) -> None:
    """Raise a UserError when an experiment is to be reproduced and does not say what must come out."""
    if reproduce and not headline:
        raise UserError("reproduce=true needs numbers to check: give headline.<metric> its low, high and says")
    if reproduce and not (paper or "").strip():
        raise UserError("reproduce=true needs paper: what the paper reports, in one sentence, or: nothing comparable")
