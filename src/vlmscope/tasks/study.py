"""Feature study: one pass over data for all features: top examples, samples, histograms, counts (docs/study.md)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.features.study.records import StudyFolder
    from vlmscope.tasks.context import RunContext

USES = ("data", "study")
RANKS = True  # several processes can run it together
MEMORY = "study.forward_tokens (which a resumed study may change), study.batch_size or study.top"


@dataclass
class Config:
    """What is kept is in `study=`, the data in `data=`. The files are in `study/` of the run folder."""


def run(cfg: "AppConfig", context: "RunContext") -> dict[str, float]:
    """Go through the data, each process through its part; the main one writes the files."""
    from vlmscope.core.errors import NotMainRank, UserError
    from vlmscope.tasks.studies.data import described, look_for, opened, study_origin, study_sources

    config = cfg.study
    if cfg.prompt is not None or cfg.image is not None:
        raise UserError("task=study goes through data; leave out prompt= and image=, or put them into data=folder")
    if config.path is not None:
        raise UserError("study.path names a study that is there already; leave it out of task=study, which makes one")
    folder, sources = context.run_dir / "study", study_sources(cfg, config)
    if folder.exists() and not cfg.trainer.resume:
        raise UserError(f"{folder} is there already; add trainer.resume=true to go on, or choose a new hydra.run.dir")
    look_for(sources)  # torch takes seconds to import: a mistake should not wait for it

    from vlmscope.data.folder import NumberedRows
    from vlmscope.features.study.run import StudyPart, finish, finished_study, run_part, study_parts
    from vlmscope.tasks.wiring import load_model, load_scope
    from vlmscope.training.ranks import joint_sum, own_share

    origin, share = study_origin(cfg, config, sources, context.overrides), own_share()
    done = finished_study(folder, origin)
    if done is not None:
        return metrics_of(done)
    part = StudyPart(folder, share, origin)
    rows = NumberedRows(opened(cfg, sources), config.batch_size, share, config.limit)
    vlm = load_model(cfg)
    scope = load_scope(cfg, vlm, context.overrides)
    times = run_part(scope, rows, part, config)
    joint_sum([1.0])  # all parts are finished
    if share.index:
        raise NotMainRank
    parts = study_parts(folder, share.total, origin)
    found = metrics_of(finish(folder, scope, parts, config, described(cfg, config, sources)))
    return {**found, "perf/study_seconds": times.all, "perf/study_over_forward": times.ratio}


def metrics_of(study: "StudyFolder") -> dict[str, float]:
    """Items, positions by kind, rows left out, features that fired, and the share of dead ones by layer."""
    info = study.info
    found = {"study/items": float(info.items), "study/rows": float(info.rows)}
    found |= {f"study/positions_{kind}": float(count) for kind, count in info.positions.items()}
    found["study/skipped"] = float(sum(info.skipped.values()))
    fired = 0
    for layer in study.layers:
        dead = study.layer(layer).dead
        fired += int((~dead).sum())
        found[f"layers/study_dead_frac/layer_{layer:02d}"] = float(dead.mean())
    total = sum(info.n_features.values())
    return found | {"study/features_fired": float(fired), "study/dead_frac": 1 - fired / total}
