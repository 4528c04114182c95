"""Settings of Orrery's training: plain records, free of torch, so that Hydra can register them."""

from dataclasses import dataclass, field


@dataclass
class StageConfig:
    """One training stage: steps, scenes of each kind in a batch, and the optimiser's settings."""

    max_steps: int
    batch: dict[str, int]
    lr: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.02
    clip: float = 1.0
    tower_rate: float = 1.0
    questions: int = 3  # at most so many a picture and step, drawn at random
    seed: int = 0
    exit_weight: float = 0.0  # of the early-exit loss
    exit_layers: int = 0  # how many layers early the answer must be readable (each of them adds a term)


@dataclass
class OrreryTrainingConfig:
    """The stages of `task=train_orrery`. `polish` gives counting and sums, which lag behind, a larger share."""

    tower: StageConfig = field(
        default_factory=lambda: StageConfig(2400, {"planets": 8, "digits": 24, "shapes": 10, "hands": 6})
    )
    vlm: StageConfig = field(
        default_factory=lambda: StageConfig(
            2800,
            {"planets": 5, "digits": 12, "shapes": 4, "hands": 2, "text": 2},
            lr=8e-4,
            tower_rate=0.25,
            seed=1,
            exit_weight=0.3,
            exit_layers=2,
        )
    )
    polish: StageConfig = field(
        default_factory=lambda: StageConfig(
            1400,
            {"planets": 4, "digits": 10, "shapes": 9, "hands": 3, "text": 2},
            lr=4e-4,
            tower_rate=0.5,
            seed=2,
            exit_weight=0.3,
            exit_layers=2,
        )
    )
    checkpoint_every: int = 200
    val_every: int = 400
