"""Train Orrery, the embedded VLM: vision tower first, then the whole model; saved in Hugging Face layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlmscope.models.orrery import OrreryConfig
from vlmscope.training.config import OrreryTrainingConfig

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.tasks.registry import RunContext

USES = ("data",)
MEMORY = "task.training.vlm.batch"


@dataclass
class Config:
    """Sizes and stages. `max_steps`, when set, shortens each stage (for a try). The data are Orrery's scenes."""

    architecture: OrreryConfig = field(default_factory=OrreryConfig)
    training: OrreryTrainingConfig = field(default_factory=OrreryTrainingConfig)
    max_steps: int | None = None
    test_scenes: int | None = None


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Train (or resume, with trainer.resume=true) and report test accuracies next to those with shuffled pictures."""
    from vlmscope.config.wiring import limit_threads
    from vlmscope.data.orrery.dataset import scene_shards
    from vlmscope.training.orrery import train_orrery

    limit_threads(cfg)
    task: Config = cfg.task
    if task.max_steps is not None:
        for stage in (task.training.tower, task.training.vlm, task.training.polish):
            stage.max_steps = min(stage.max_steps, task.max_steps)
            stage.warmup = min(stage.warmup, max(stage.max_steps // 4, 1))
    logger = context.tracked.lightning_logger()
    data, resume = scene_shards(cfg.data.path), cfg.trainer.resume
    kinds = cfg.data.scenes
    return train_orrery(
        data, kinds, task.architecture, task.training, context.run_dir, logger, resume, task.test_scenes
    )
