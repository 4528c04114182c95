"""Train eyes for a frozen text model: vision tower and projector, on pictures that others drew."""

from __future__ import annotations

from vlmscope.config import AppConfig
from vlmscope.config.wiring import limit_threads
from vlmscope.tasks.settings import RunContext, TrainEyesSettings
from vlmscope.training.eyes import train_eyes
from vlmscope.training.resume import RunLogger


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Train (or resume, with trainer.resume=true) and report how many pictures of unseen artists find their name."""
    limit_threads(cfg)
    task: TrainEyesSettings = cfg.task
    logger = RunLogger(context.tracked)
    return train_eyes(task.architecture, task.training, context.run_dir, logger, cfg.trainer.resume)
