"""Train Orrery, the embedded VLM: vision tower first, then the whole model; saved in Hugging Face layout."""

from __future__ import annotations

from vlmscope.config import AppConfig
from vlmscope.config.wiring import limit_threads
from vlmscope.data.orrery.dataset import scene_shards
from vlmscope.tasks.settings import RunContext, TrainOrrerySettings
from vlmscope.training.orrery import train_orrery
from vlmscope.training.resume import RunLogger


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Train (or resume, with trainer.resume=true) and report test accuracies next to those with shuffled pictures."""
    limit_threads(cfg)
    task: TrainOrrerySettings = cfg.task
    if task.max_steps is not None:
        for stage in (task.training.tower, task.training.vlm, task.training.polish):
            stage.max_steps = min(stage.max_steps, task.max_steps)
            stage.warmup = min(stage.warmup, max(stage.max_steps // 4, 1))
    logger = RunLogger(context.tracked)
    data, resume = scene_shards(cfg.data.path), cfg.trainer.resume
    kinds = cfg.data.scenes
    return train_orrery(
        data, kinds, task.architecture, task.training, context.run_dir, logger, resume, task.test_scenes
    )
