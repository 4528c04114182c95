"""Train eyes for a frozen text model: vision tower and projector, on pictures that others drew."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlmscope.models.eyes import EyesConfig
from vlmscope.training.config import EyesTrainingConfig

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.tasks.registry import RunContext

MEMORY = "task.training.tower.batch"


@dataclass
class Config:
    """Sizes, text model and stages; the pictures are those of `assets/eyes_pictures`."""

    architecture: EyesConfig = field(default_factory=EyesConfig)
    training: EyesTrainingConfig = field(default_factory=EyesTrainingConfig)


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Train (or resume, with trainer.resume=true) and report how many pictures of unseen artists find their name."""
    from vlmscope.config.wiring import limit_threads
    from vlmscope.training.eyes import train_eyes

    limit_threads(cfg)
    logger = context.tracked.lightning_logger()
    return train_eyes(cfg.task.architecture, cfg.task.training, context.run_dir, logger, cfg.trainer.resume)
