"""A study of all features: the one that `study.path` names, or one made in the run folder as task=study makes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmscope.data.folder import NumberedRows
from vlmscope.data.samples import WHOLE
from vlmscope.features.study.records import StudyFolder
from vlmscope.features.study.run import StudyPart, finish, run_part, study_parts
from vlmscope.tasks.studies.data import described, opened, study_origin, study_sources

if TYPE_CHECKING:
    from vlmscope.tasks.steps.bench import Bench


def run(bench: Bench) -> None:
    """Leaves a `StudyFolder` in `bench.records`; writes study/ when there is none to read."""
    cfg, config = bench.cfg, bench.cfg.study
    if config.path is not None:
        study = StudyFolder(config.path)
    else:
        folder, sources = bench.run_dir / "study", study_sources(cfg, config)
        origin = study_origin(cfg, config, sources, ("transcoder",))
        rows = NumberedRows(opened(cfg, sources), config.batch_size, WHOLE, config.limit)
        run_part(bench.scope, rows, StudyPart(folder, WHOLE, origin), config)
        parts = study_parts(folder, 1, origin)
        study = finish(folder, bench.scope, parts, config, described(cfg, config, sources))
    bench.records["study"] = study
    bench.metrics["study/items"] = float(study.info.items)
    bench.metrics |= {f"study/positions_{kind}": float(count) for kind, count in study.info.positions.items()}
