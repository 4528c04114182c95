"""The data of a feature study: any `data=`, as sources that are gone through once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmscope.core.errors import UserError

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.data.config import SourceConfig
    from vlmscope.data.samples import Source
    from vlmscope.features.study.config import StudyConfig
    from vlmscope.features.study.records import StudyFolder
    from vlmscope.scope import Scope


def study_sources(cfg: AppConfig, config: StudyConfig) -> dict[str, SourceConfig]:
    """The settings of the sources, with absolute paths and the split that is studied.

    Raises:
        UserError: the data is not one that can be studied, or has no path.
    """
    from vlmscope.data.config import SourceConfig
    from vlmscope.data.orrery.scenes import KINDS

    data = cfg.data
    if data.sources:
        found = dict(data.sources)
    elif data.name == "orrery":
        if data.path is None:
            raise UserError("data.path is not set: give the folder with Orrery's shards (task=build_data writes them)")
        found = {kind: SourceConfig("shards", data.path, split="val", stream=kind) for kind in KINDS}
    elif data.name == "folder":
        if not data.path:
            raise UserError("data.path is not set: give the folder with train.jsonl (docs/bring_your_own.md)")
        found = {"folder": SourceConfig("folder", data.path)}
    else:
        raise UserError(f"data={data.name}: a study goes through orrery, folder, or a mix (docs/data.md)")
    return {
        name: replace(one, split=config.split or one.split, path=one.path and str(Path(one.path).absolute()))
        for name, one in found.items()
    }


def needed_study(cfg: AppConfig) -> Path:
    """The folder of the study that `study.path=` names, looked for before anything heavy is imported.

    Raises:
        UserError: none was named, or there is none.
    """
    from vlmscope.core.study import study_folder

    if cfg.study.path is None:
        raise UserError(
            "no study: add study.path=FOLDER, the run folder of a finished task=study (python run.py task=study)"
        )
    return study_folder(cfg.study.path)


def look_for(sources: Mapping[str, SourceConfig]) -> None:
    """Refuse shards that are not there, before anything heavy is imported.

    Raises:
        UserError: a folder has no index.
    """
    from vlmscope.data.shards import read_index

    for name, one in sources.items():
        if one.kind == "shards":
            read_index(Path(str(one.path)), f"data.path or data.sources.{name}.path")


def opened(cfg: AppConfig, sources: dict[str, SourceConfig]) -> dict[str, tuple[float, Source]]:
    """The sources with their weights.

    Raises:
        UserError: one is not there, empty, or of another schema.
    """
    from vlmscope.data.mixing import open_source

    most = cfg.data.max_bad_shards
    # A study leaves bad pictures out, up to a limit, so they are not looked for first.
    return {name: (one.weight, open_source(name, one, None, most, False)) for name, one in sources.items()}


def described(cfg: AppConfig, config: StudyConfig, sources: dict[str, SourceConfig]) -> dict[str, Any]:
    """`StudyInfo.data`: from it pictures are found again."""
    settings = {name: asdict(one) for name, one in sources.items()}
    return {
        "name": cfg.data.name,
        "split": config.split,
        "limit": config.limit,
        "max_bad_shards": cfg.data.max_bad_shards,
        "sources": settings,
    }


def study_origin(
    cfg: AppConfig, config: StudyConfig, sources: Mapping[str, SourceConfig], overrides: Sequence[str]
) -> dict[str, Any]:
    """Everything that decides a study, by name."""
    from vlmscope.core.origin import flat
    from vlmscope.features.study.run import HOW
    from vlmscope.tasks.origin import data_origin, model_origin, transcoder_origin

    kept = {key: value for key, value in asdict(config).items() if key not in HOW}
    found = model_origin(cfg) | transcoder_origin(cfg, overrides) | data_origin(cfg, sources)
    return found | flat("study", kept) | {"seed": cfg.seed}


def made_study(cfg: AppConfig, scope: Scope, folder: Path) -> StudyFolder:
    """A study of `cfg.study` and `cfg.data`, made in one go in `folder`."""
    from vlmscope.data.folder import NumberedRows
    from vlmscope.data.samples import WHOLE
    from vlmscope.features.study.run import StudyPart, finish, run_part, study_parts

    config, sources = cfg.study, study_sources(cfg, cfg.study)
    origin = study_origin(cfg, config, sources, ("transcoder",))
    rows = NumberedRows(opened(cfg, sources), config.batch_size, WHOLE, config.limit)
    run_part(scope, rows, StudyPart(folder, WHOLE, origin), config)
    return finish(folder, scope, study_parts(folder, 1, origin), config, described(cfg, config, sources))
