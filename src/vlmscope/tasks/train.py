"""Trainings: Orrery, eyes for a text model, and transcoders."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vlmscope.config import AppConfig
from vlmscope.config.wiring import data_origin, limit_threads, load_model, model_origin
from vlmscope.core.artifacts import flat, folder_digest, read_json, write_json, write_text
from vlmscope.core.errors import UserError, bad_picture
from vlmscope.core.hub import is_hub_id
from vlmscope.core.launch import program
from vlmscope.core.results import text_table
from vlmscope.data.orrery.dataset import scene_shards
from vlmscope.report.figures import fvu_by_layer
from vlmscope.tasks.settings import RunContext, TrainEyesSettings, TrainOrrerySettings
from vlmscope.training.captures import batches_for
from vlmscope.training.config import TranscoderArchConfig, TranscoderTrainingConfig
from vlmscope.training.eyes import train_eyes
from vlmscope.training.orrery import train_orrery
from vlmscope.training.ranks import own_share
from vlmscope.training.resume import RunLogger
from vlmscope.training.transcoder_training import train_transcoders
from vlmscope.transcoders.formats import save_set
from vlmscope.transcoders.hub import CARD, facts_of_set, render, with_metrics
from vlmscope.transcoders.transcoder import TranscoderSet


def run_train_orrery(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Train Orrery, the embedded VLM: vision tower first, then the whole model; saved in Hugging Face layout.

    Train (or resume, with trainer.resume=true) and report test accuracies next to those with shuffled pictures.
    """
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


def run_train_eyes(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Train eyes for a frozen text model: vision tower and projector, on pictures that others drew.

    Train (or resume, with trainer.resume=true) and report how many pictures of unseen artists find their name.
    """
    limit_threads(cfg)
    task: TrainEyesSettings = cfg.task
    logger = RunLogger(context.tracked)
    return train_eyes(task.architecture, task.training, context.run_dir, logger, cfg.trainer.resume)


# Settings that stand elsewhere in the card, and so not in its table.
_IN_CARD = ("k", "activation", "skip", "cross_layer", "data")


def run_train_transcoders(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Train a sparse transcoder for every layer from one forward per batch; saved as a transcoder set.

    Train, save to `<run_dir>/transcoders`, and report FVU, L0, dead features and the change of cross-entropy.

    `transcoder.site` chooses the layers: those of the decoder, or those of the vision tower.
    """
    if not isinstance(cfg.transcoder, TranscoderArchConfig):
        raise UserError("training needs an architecture, not a trained set: add transcoder=arch")
    config = TranscoderTrainingConfig(cfg.transcoder, cfg.optim, cfg.trainer, cfg.task)
    origin: dict[str, Any] = {}
    if own_share().index == 0:  # only the main rank records it
        no_weight = ("micro_tokens", "license")  # settings on which no weight depends
        task = {key: value for key, value in asdict(cfg.task).items() if key not in no_weight}
        origin = model_origin(cfg) | data_origin(cfg) | flat("task", task) | {"seed": cfg.seed}
    unread = context.run_dir / "unread_picture.json"
    if cfg.trainer.resume and unread.is_file() and cfg.data.path is not None and origin:
        stopped = read_json(unread)
        if folder_digest(cfg.data.path, Path(stopped["picture"])) == stopped["others"]:
            origin |= {"data.files": stopped["data.files"]}  # unchanged except for the repaired picture

    states, resume = context.run_dir / "data_states.json", cfg.trainer.resume
    vlm, source = batches_for(
        cfg.data, cfg.task, cfg.seed, lambda: load_model(cfg), states,
        lambda: model_origin(cfg, weights=False) | data_origin(cfg), resume,
    )  # fmt: skip
    config = replace(config, data=source.settings)
    try:
        transcoders, metrics = train_transcoders(
            vlm,
            source.train,
            source.val,
            config,
            context.run_dir,
            RunLogger(context.tracked),
            data_figures=source.figures,
            origin=origin,
            job=context.job,
        )
    except UserError as error:
        picture = bad_picture(error)
        if picture is not None and cfg.data.path is not None and "data.files" in origin:
            others = folder_digest(cfg.data.path, picture)
            write_json(unread, {"picture": str(picture), "others": others, "data.files": origin["data.files"]})
        raise
    unread.unlink(missing_ok=True)
    save_set(transcoders, context.run_dir / "transcoders", dtype="bfloat16")
    write_text(context.run_dir / "transcoders" / CARD, training_card(cfg, config, transcoders, metrics))
    fvu_by_layer(metrics, context.run_dir / "figures" / "fvu_by_layer.png")
    print("\n".join(_result(metrics, transcoders, context)))
    return metrics


def _result(metrics: Mapping[str, float], transcoders: TranscoderSet, context: RunContext) -> list[str]:
    """FVU by layer, dead features, and a command that uses the set."""
    n_layers = len(transcoders)
    rows: list[tuple[str, ...]] = [("FVU by layer", *map(str, range(n_layers)), "mean")]
    kinds = {"all tokens": "fvu", "text": "fvu_text", "text, token means": "fvu_token_text", "image": "fvu_image"}
    for name, key in kinds.items():
        values = [metrics.get(f"layers/{key}/layer_{layer:02d}") for layer in range(n_layers)]
        values.append(metrics.get(f"val/{key}"))
        if None not in values:  # without pictures there is no figure for them
            rows.append((name, *(f"{value:.3f}" for value in values)))
    lines = [context.job] if context.job else []
    lines += [*text_table(rows).splitlines(), f"dead features {metrics['val/dead_frac']:.1%}"]
    if "val/ce_delta" in metrics:
        lines[-1] += f"; cross-entropy {metrics['val/ce_delta']:+.3f} nats with all layers spliced in"
    if not context.job:  # a sweep ends with a table of its jobs
        model = [one for one in context.overrides if one.startswith(("model=", "model."))]
        folder = context.run_dir / "transcoders"
        named = ["transcoder=path", f"transcoder.path={folder}"]
        used = shlex.join(
            [
                *model,
                *(named if transcoders.site == "decoder" else [f"transcoder.tower={folder}", "attribution.tower=true"]),
            ]
        )
        lines.append(f"next: {program()} task=trace image=PICTURE.png 'prompt=what is this ?' {used}")
    return lines


def training_card(
    cfg: AppConfig, config: TranscoderTrainingConfig, transcoders: TranscoderSet, metrics: Mapping[str, float]
) -> str:
    """The text of the set's README.md, from the run's settings and metrics.

    Training tokens (`train/tokens`) are split by the shares drawn from each source (`data/<source>/tokens_share`);
    without shares all are of the data that the configuration names.
    """
    model = cfg.model
    hub = model.hub or (model.path if model.family is None and is_hub_id(model.path) else None)
    facts = with_metrics(facts_of_set(transcoders), metrics)
    total = metrics.get("train/tokens", 0.0)
    end = "/tokens_share"
    shares = {key.removeprefix("data/").removesuffix(end): v for key, v in metrics.items() if key.endswith(end)}
    return render(
        replace(
            facts,
            base_model=hub or facts.base_model,
            base_revision=model.revision,
            license=cfg.task.license,
            data={name: round(s * total) for name, s in (shares or {cfg.data.name: 1.0}).items()} if total else {},
            settings={name: value for name, value in config.settings().items() if name not in _IN_CARD},
        )
    )
