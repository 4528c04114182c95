"""Settings of maps of features over a picture: a plain record, free of torch, so that Hydra can register it."""

from dataclasses import dataclass, field

from vlmscope.core.errors import UserError, check_choice, check_least


@dataclass
class WhereConfig:
    """Settings of attention rollout (docs/where.md); those of the vision path are in `attribution`."""

    last_layers: int = 4  # so many layers of the tower, counted from the last that the decoder is given anything of
    head_share: float = 0.3  # share of a layer's heads that count, those of lowest entropy
    identity: bool = True  # whether the residual stream counts as much as the attention
    # how rows of patches become those of soft tokens: "max" (the paper's code) or "mean" (as the model pools)
    pool: str = "max"
    side: int = 8  # cells down and across the picture, to delete and to insert
    # numbers of cells at which a curve is measured, besides none and all
    counts: list[int] = field(default_factory=lambda: [2, 4, 8, 16, 32])
    draws: int = 3  # random orders a scene

    def check(self) -> None:
        """Raise a `UserError` that names the first setting that makes no sense."""
        check_least("where", self, last_layers=1, side=1, draws=1)
        check_choice("where.pool", self.pool, ("max", "mean"))
        if not 0.0 < self.head_share <= 1.0:
            raise UserError(f"where.head_share={self.head_share}: it must lie in (0, 1]; 0.3 is the paper's")
        if not all(0 < count < self.side**2 for count in self.counts):
            raise UserError(f"where.counts={self.counts}: choose numbers of cells from 1 to {self.side**2 - 1}")
