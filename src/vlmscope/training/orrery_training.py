"""Runs the stages of Orrery's training and saves the model in Hugging Face layout."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from vlmscope.core.artifacts import write_json
from vlmscope.core.origin import flat, folder_digest
from vlmscope.data.orrery.dataset import ScenePool
from vlmscope.data.orrery.facts import vocabulary
from vlmscope.data.orrery.scene import KINDS, SPLITS
from vlmscope.models.orrery.build import build_orrery
from vlmscope.models.orrery.config import OrreryConfig
from vlmscope.models.orrery.processor import build_processor
from vlmscope.training.orrery_config import OrreryTrainingConfig
from vlmscope.training.orrery_evaluation import accuracy, six_finger_answers
from vlmscope.training.orrery_module import (
    ScheduledModule,
    StepBatches,
    TowerModule,
    VlmModule,
    tower_batch,
)
from vlmscope.training.resume import ResumableCheckpoint, fit_or_interrupt

PICTURES = tuple(k for k in KINDS if k != "text")
VAL_SCENES = 200
STAGES = ("tower", "vlm", "polish")  # folders of their checkpoints


class _Validate(pl.Callback):
    """Validation by our own step count: accuracy by group to the logger, every `every` steps and at the end."""

    def __init__(self, every: int, total: int, measure: Any) -> None:
        self.every, self.total, self.measure = every, total, measure

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if pl_module.steps_done % self.every and pl_module.steps_done != self.total:
            return
        pl_module.eval()
        metrics = self.measure()
        pl_module.train()
        if trainer.logger is not None:
            trainer.logger.log_metrics(metrics, step=pl_module.steps_done)
        shown = ", ".join(f"{k.split('/')[-1]} {v:.3f}" for k, v in metrics.items())
        print(f"\nstep {pl_module.steps_done}: {shown}", flush=True)


def train_orrery(
    data: Path,
    architecture: OrreryConfig,
    config: OrreryTrainingConfig,
    run_dir: Path,
    logger: Any,
    resume: bool,
    test_scenes: int | None = None,
) -> tuple[dict[str, float], Path]:
    """Train the tower, then the VLM; save to `run_dir/model`; return test metrics and that folder.

    Args:
        data: folder with Orrery's shards (`task=build_data`).
        architecture: sizes of the model.
        config: all stages.
        run_dir: checkpoints and model go here.
        logger: a Lightning logger, or False.
        resume: continue from the checkpoints in `run_dir`; else these are removed.
        test_scenes: how many test scenes of each kind; all when None.

    Raises:
        UserError: a checkpoint is of other settings or other data; each difference is named.
    """
    processor = build_processor(vocabulary(), architecture.image_size, architecture.soft_tokens)
    settings = {key: value for key, value in asdict(config).items() if key not in ("checkpoint_every", "val_every")}
    origin = {"data": folder_digest(data), **flat("training", settings), **flat("architecture", asdict(architecture))}
    if not resume:  # a later stage's checkpoint of another run must not be found when this one resumes
        for stage in STAGES:
            shutil.rmtree(run_dir / stage, ignore_errors=True)
    model = build_orrery(architecture, len(processor.tokenizer), config.tower.seed)
    pools = {split: ScenePool(data, split) for split in SPLITS}
    projector = model.model.multi_modal_projector
    tower = TowerModule(
        config.tower,
        model.model.vision_tower,
        projector.avg_pool,
        projector.patches_per_image,
        architecture.vision_width,
    )
    _fit(
        tower,
        StepBatches(pools["train"], config.tower, lambda: tower.steps_done, tower_batch),
        lambda: tower_accuracy(tower, pools["val"]),
        config,
        run_dir / STAGES[0],
        logger,
        resume,
        origin,
    )
    for name, stage in ((STAGES[1], config.vlm), (STAGES[2], config.polish)):
        vlm = VlmModule(stage, model, processor.tokenizer)
        _fit(
            vlm,
            StepBatches(pools["train"], stage, partial(getattr, vlm, "steps_done"), vlm.collate),
            partial(validation, vlm, pools["val"]),
            config,
            run_dir / name,
            logger,
            resume,
            origin,
        )
    model.to(torch.bfloat16).to(torch.float32)  # what is shipped is bf16: measure that  # pyright: ignore[reportArgumentType]
    vlm.eval()
    metrics = {f"test/accuracy/{k}": v for k, v in vlm_accuracy(vlm, pools["test"], test_scenes).items()}
    shuffled = vlm_accuracy(vlm, pools["test"], test_scenes, shuffle_images=True)
    metrics |= {f"test/accuracy_shuffled/{k}": v for k, v in shuffled.items()}
    metrics |= {f"test/six_fingers/{word}": share for word, share in six_finger_answers(vlm).items()}
    folder = run_dir / "model"
    model.to(torch.bfloat16).save_pretrained(folder)  # pyright: ignore[reportArgumentType]
    processor.save_pretrained(folder)
    write_json(folder / "metrics.json", metrics)
    return metrics, folder


def validation(vlm: VlmModule, pool: ScenePool) -> dict[str, float]:
    """Accuracies on the first validation scenes, under the names that the logger gets."""
    return {f"val/accuracy/{k}": v for k, v in vlm_accuracy(vlm, pool, VAL_SCENES).items()}


def tower_accuracy(tower: TowerModule, pool: ScenePool) -> dict[str, float]:
    """Validation accuracy of each head of stage 1."""
    right: dict[str, list[int]] = {}
    with torch.no_grad():
        for kind in PICTURES:
            for name, (good, asked) in tower.losses(tower_batch(pool.scenes(kind, VAL_SCENES), 0))[1].items():
                entry = right.setdefault(name, [0, 0])
                entry[0], entry[1] = entry[0] + good, entry[1] + asked
    return {f"val/tower_accuracy/{name}": good / asked for name, (good, asked) in right.items()}


def vlm_accuracy(vlm: VlmModule, pool: ScenePool, limit: int | None, shuffle_images: bool = False) -> dict[str, float]:
    """Accuracy of every question group of every kind, captions as `caption_<kind>`."""
    result: dict[str, float] = {}
    for kind in PICTURES if shuffle_images else KINDS:
        for group, value in accuracy(vlm, pool.scenes(kind, limit), shuffle_images).items():
            result[f"caption_{kind}" if group == "caption" else group] = value
    return result


def _fit(
    module: ScheduledModule,
    batches: StepBatches,
    measure: Any,
    config: OrreryTrainingConfig,
    folder: Path,
    logger: Any,
    resume: bool,
    origin: Mapping[str, Any],
) -> None:
    total = module.config.max_steps
    checkpoint = ResumableCheckpoint(folder, config.checkpoint_every, resume, origin)
    checkpoint.restore_weights(module)
    trainer = pl.Trainer(
        max_steps=-1,
        max_epochs=1,
        accelerator="cpu",
        logger=logger,
        enable_checkpointing=False,
        enable_model_summary=False,
        gradient_clip_val=module.config.clip,
        callbacks=[checkpoint, _Validate(config.val_every, total, measure)],
        log_every_n_steps=20,
    )
    if module.steps_done < total:
        fit_or_interrupt(trainer, module, batches.loader())
    checkpoint.save(trainer, module)
