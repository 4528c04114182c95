"""Feature study: one pass over data for all features: top examples, samples, histograms, counts (docs/study.md)."""

from __future__ import annotations

import shutil

from vlmscope.config import AppConfig
from vlmscope.config.wiring import load_model, load_scope, made_study, study_origin, study_sources
from vlmscope.core.errors import NotMainRank, UserError
from vlmscope.core.records import layer_key
from vlmscope.data.mixing import NumberedRows
from vlmscope.features.labels import set_path, write_labels
from vlmscope.features.proposals import label_study
from vlmscope.features.shipped import small_copy
from vlmscope.features.study import StudyPart, data_record, finish, finished_study, run_part, study_parts
from vlmscope.features.study_files import StudyFolder, open_sources
from vlmscope.tasks.settings import RunContext
from vlmscope.training.ranks import joint_sum, own_share

SCENE = "scene"  # the fact whose values alone are scored next to each label, where the data have it


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Study the data, each process its part; the main process writes the files."""
    config = cfg.study
    if cfg.prompt is not None or cfg.image is not None:
        raise UserError("task=study goes through data; leave out prompt= and image=, or put them into data=folder")
    if config.path is not None:
        raise UserError("study.path names a study that is there already; leave it out of task=study, which makes one")
    folder = context.run_dir / "study"
    if config.published is not None:
        if own_share().index:  # nothing to divide
            raise NotMainRank
        study = made_study(cfg, load_scope(cfg, load_model(cfg), context.overrides), folder)
        return metrics_of(study) | _labelled_and_small(cfg, context, study)
    sources = study_sources(cfg)
    if folder.exists() and not cfg.trainer.resume:
        raise UserError(f"{folder} is there already; add trainer.resume=true to resume, or choose a new hydra.run.dir")

    origin, share = study_origin(cfg, sources, context.overrides), own_share()
    done = finished_study(folder, origin)
    if done is not None:
        return metrics_of(done) | _labelled_and_small(cfg, context, done)
    part = StudyPart(folder, share, origin)
    data = data_record(sources, config, cfg.data.max_bad_shards, cfg.data.name)
    rows = NumberedRows(open_sources(data), config.batch_size, share, config.limit)
    scope = load_scope(cfg, load_model(cfg), context.overrides)
    seconds, over_forward = run_part(scope, rows, part, config)
    joint_sum([1.0])  # a barrier: returns when all parts are finished
    if share.index:
        raise NotMainRank
    study = finish(folder, scope, study_parts(folder, share.total, origin), config, data)
    metrics = metrics_of(study) | {"perf/study_seconds": seconds, "perf/study_over_forward": over_forward}
    return metrics | _labelled_and_small(cfg, context, study)


def _labelled_and_small(cfg: AppConfig, context: RunContext, study: StudyFolder) -> dict[str, float]:
    """Label the study and write its small copy, as the task's settings say."""
    metrics: dict[str, float] = {}
    if cfg.task.labels:
        labels, _ = label_study(study, cfg.seed, shuffled=0, kind=SCENE)
        write_labels(set_path(study.path, "auto"), labels)
        metrics["label/labelled"] = float(sum(bool(label.text) for _, label in labels))
        metrics["label/beats_chance"] = float(sum(label.beats_chance for _, label in labels))
    if cfg.task.keep is not None:
        place = context.run_dir / "small"
        shutil.rmtree(place, ignore_errors=True)  # of a run before this one
        small = small_copy(study, place, cfg.task.keep)
        metrics["study/small_mb"] = sum(path.stat().st_size for path in small.path.rglob("*.*")) / 1e6
    return metrics


def metrics_of(study: StudyFolder) -> dict[str, float]:
    """Items, positions by kind, rows left out, features that fired, and the share of dead ones by layer."""
    info = study.info
    dead = {layer: study.layer(layer).dead for layer in study.layers}
    fired = sum(int((~is_dead).sum()) for is_dead in dead.values())
    return {
        "study/items": float(info.items),
        "study/rows": float(info.rows),
        **{f"study/positions_{kind}": float(count) for kind, count in info.positions.items()},
        "study/skipped": float(sum(info.skipped.values())),
        **{f"layers/study_dead_frac/{layer_key(layer)}": float(is_dead.mean()) for layer, is_dead in dead.items()},
        "study/features_fired": float(fired),
        "study/dead_frac": 1 - fired / sum(info.n_features.values()),
    }
