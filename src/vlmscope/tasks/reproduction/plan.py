"""What task=reproduce will run: the tagged experiments, composed and looked at before the first one starts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmscope.core.errors import UserError

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.tasks.context import RunContext

# What belongs to this task and is not passed on; and keys of a run that no number hangs on.
_OWN = ("task=", "task.", "hydra", "experiment=", "name=")
_NO_NUMBER = ("reproduce", "paper", "figure", "headline", "tracking", "trainer")
SHARDS = "shards"  # where validation scenes go when an experiment needs them and there are none


@dataclass(frozen=True)
class Job:
    """One experiment under one seed.

    Attributes:
        name: of the experiment.
        label: the name of its folder; with the seed where there are several.
        question: its one-line description.
        overrides: of its command line, without its folder.
        cfg: what these compose to.
        needs_shards: it reads Orrery's scenes from shards, and they are not there.
        digest: of configuration, code, assets and packages: the same digest, the same numbers.
    """

    name: str
    label: str
    question: str
    overrides: tuple[str, ...]
    cfg: AppConfig
    needs_shards: bool
    digest: str


def planned(cfg: AppConfig, context: RunContext) -> list[Job]:
    """Every job in its order, composed with what the command line passes on.

    Raises:
        UserError: nothing is tagged, `task.only` names what is not, or an experiment does not compose or lacks a file.
    """
    from vlmscope.config.catalog import first_comment, reproducible

    found = reproducible(_config_folders())
    chosen = _chosen(cfg, found)
    shared = _passed_on(cfg, context)
    base = base_digest()
    jobs = []
    for name in chosen:
        question = first_comment(found[name])
        for seed in cfg.task.seeds or [None]:
            label = name if seed is None else f"{name}_seed_{seed}"
            own = () if seed is None else (f"seed={seed}",)
            overrides = (f"experiment={name}", *shared, *own)
            composed = _composed(name, overrides)
            lacks, digest = _lacks_shards(composed), _digest(base, composed)
            jobs.append(Job(name, label, question, overrides, composed, lacks, digest))
    return jobs


def _chosen(cfg: AppConfig, found: dict[str, Path]) -> list[str]:
    from vlmscope.config.resolve import suggestion

    if not found:
        raise UserError("no experiment says reproduce: true; tag one, with its headline (docs/reproduce.md)")
    for name in cfg.task.only:
        if name not in found:
            raise UserError(f"task.only: no experiment {name!r} that says reproduce: true; {suggestion(name, found)}")
    return [name for name in found if not cfg.task.only or name in cfg.task.only]


def _config_folders() -> list[Path]:
    """`conf/` and what `hydra.searchpath` adds."""
    from hydra.core.hydra_config import HydraConfig

    sources = HydraConfig.get().runtime.config_sources
    return [Path(source.path) for source in sources if source.schema == "file" and source.path]


def _passed_on(cfg: AppConfig, context: RunContext) -> tuple[str, ...]:
    """What the user typed that the experiments get too."""
    from hydra.core.hydra_config import HydraConfig

    if HydraConfig.get().runtime.choices.get("experiment") not in (None, "null"):
        raise UserError("task=reproduce runs experiments itself; choose them with task.only=[a,b], not experiment=")
    plain = [override for override in context.overrides if not override.lstrip("+~").startswith(_OWN)]
    if cfg.task.seeds and any(override.startswith("seed=") for override in plain):
        raise UserError("both seed= and task.seeds= were given; give one of them")
    paths = [override for override in HydraConfig.get().overrides.hydra if override.startswith("hydra.searchpath=")]
    return (*plain, *paths)


def _composed(name: str, overrides: Sequence[str]) -> AppConfig:
    from hydra import compose
    from omegaconf import OmegaConf

    from vlmscope.config.resolve import CONFIG_ERRORS, one_line, to_app_config

    try:
        cfg = compose("config", list(overrides), return_hydra_config=True)
        swept = OmegaConf.select(cfg, "hydra.mode")
        found = to_app_config(_without_hydra(cfg), overrides)
    except UserError as error:
        raise UserError(f"experiment={name}: {error}") from error
    except CONFIG_ERRORS as error:
        raise UserError(f"experiment={name}: {one_line(error)}") from error
    if swept is not None and swept.name == "MULTIRUN":
        raise UserError(f"experiment={name} is a sweep, which has no numbers of its own; it cannot say reproduce: true")
    _check_files(name, found)
    return found


def _without_hydra(cfg):
    from omegaconf import open_dict

    with open_dict(cfg):
        del cfg["hydra"]
    return cfg


def _check_files(name: str, cfg: AppConfig) -> None:
    """Model, transcoders and a named study are there; what a hub id names is looked for when it is fetched."""
    from vlmscope.config.schema import TranscoderSetConfig
    from vlmscope.models.checkpoint import is_hub_id

    wanted = {}
    if cfg.model.tiny is None and cfg.model.hub is None:
        wanted["model.path"] = cfg.model.path
    if isinstance(cfg.transcoder, TranscoderSetConfig):
        wanted["transcoder.path"] = cfg.transcoder.path
    if cfg.study.path is not None:
        wanted["study.path"] = cfg.study.path
    for key, path in wanted.items():
        if not Path(path).exists() and not is_hub_id(path):
            raise UserError(f"experiment={name}: {key}={path} is not there; give the folder, or restore assets/")


def _reads_shards(cfg: AppConfig) -> bool:
    from vlmscope.tasks.experiment import Config

    return isinstance(cfg.task, Config) and cfg.data.name == "orrery" and cfg.task.reads_shards(cfg)


def _lacks_shards(cfg: AppConfig) -> bool:
    """Whether it reads the validation scenes, and not all kinds of them are there."""
    from vlmscope.data.orrery.scenes import KINDS
    from vlmscope.data.shards import shard_files

    if not _reads_shards(cfg):
        return False
    try:
        return not all(shard_files(Path(cfg.data.path or ""), "val", kind) for kind in KINDS)
    except UserError:
        return True


def base_digest() -> str:
    """Of the code, the shipped assets and the packages that can change a number."""
    from vlmscope.config.catalog import project_root
    from vlmscope.tracking.client import package_versions

    found = hashlib.sha256(json.dumps(package_versions()).encode())
    for folder in (project_root() / "src", project_root() / "assets", project_root() / "experiments"):
        for path in sorted(folder.rglob("*.py" if folder.name == "experiments" else "*")):
            if path.is_file() and "__pycache__" not in path.parts and "egg-info" not in str(path.parent):
                found.update(os.fsencode(path.relative_to(folder)) + b"\0")
                found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def _files(cfg: AppConfig) -> list[Any]:
    """The content of model, transcoders, study and pictures, which may lie outside assets/ and change there."""
    from vlmscope.config.schema import TranscoderSetConfig
    from vlmscope.core.origin import files_digest
    from vlmscope.tasks.origin import model_origin, study_digest, transcoder_origin

    found: list[Any] = []
    if Path(cfg.model.path).is_dir():  # else a model of the hub at a fixed commit, or a tiny one
        found.append(model_origin(cfg))
    if isinstance(cfg.transcoder, TranscoderSetConfig) and Path(cfg.transcoder.path).is_dir():
        found.append(transcoder_origin(cfg))
    found += [study_digest(path) for path in (cfg.study.path, cfg.attribution.labels) if path is not None]
    files = [*(cfg.image or []), *(path for own in cfg.images.values() for path in own)]
    files += [one.path for one in (cfg.pairs, cfg.circuit_spec) if one is not None and one.path is not None]
    return [*found, files_digest(Path(path) for path in files)]


def _digest(base: str, cfg: AppConfig) -> str:
    """Shards that are not there yet are those of seed 0, which the code stands for."""
    from vlmscope.data.shards import INDEX

    settings = {key: value for key, value in asdict(cfg).items() if key not in _NO_NUMBER}
    index = Path(cfg.data.path or "") / INDEX
    data = index.read_text(encoding="utf-8") if _reads_shards(cfg) and index.is_file() else ""
    said = json.dumps([base, settings, data, _files(cfg)], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()
