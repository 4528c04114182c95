"""The shipped files, the options in `conf/`, and the schemas and resolvers registered with Hydra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from vlmscope.config.schema import AppConfig, RandomTranscodersConfig, TranscoderSetConfig
from vlmscope.core.artifacts import read_yaml, shipped
from vlmscope.core.errors import UserError
from vlmscope.training.config import TranscoderArchConfig


def conf_dir() -> Path:
    """Folder of Hydra's configuration groups; `experiment/` in it holds the experiments.

    Raises:
        UserError: it is missing, as in a clone that was made without symbolic links.
    """
    folder = shipped("conf")
    if not (folder / "config.yaml").is_file():
        raise UserError(f"no {folder / 'config.yaml'}; install vlmscope again, or clone it with symbolic links")
    return folder


def asset(relative: str) -> str:
    """Absolute path of a shipped asset; `${asset:orrery}` in configuration files."""
    return str(shipped(f"assets/{relative}"))


def first_comment(path: Path) -> str:
    """First comment line of a YAML file that is not a `@package` directive, or an empty string."""
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text and not text.startswith("#"):
            break
        text = text.lstrip("#").strip()
        if text and not text.startswith("@package"):
            return text
    return ""


def options(group: str, folder: Path | None = None) -> dict[str, str]:
    """Name -> first comment line of every YAML file of a group, by name; `folder` defaults to `conf/`."""
    files = sorted((folder or conf_dir()).joinpath(group).glob("*.yaml"))
    return {path.stem: first_comment(path) for path in files}


def option(group: str, name: str) -> dict[str, Any]:
    """Keys of an option of a group, such as `path` of a model; empty for a name without one, such as a folder's."""
    file = conf_dir() / group / f"{name}.yaml"
    if Path(name).name != name or not file.is_file() or Path(name).exists():
        return {}
    OmegaConf.register_new_resolver("asset", asset, replace=True)
    keys = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
    assert isinstance(keys, dict), file
    found = {str(key): value for key, value in keys.items()}
    return found if found.get("path") not in (None, "", "???") else {}


def reproducible(folders: Sequence[Path]) -> dict[str, Path]:
    """Name -> file of every experiment below `folders`, such as `conf/`, with `reproduce: true`, by path."""
    files = sorted(path for folder in folders for path in folder.joinpath("experiment").glob("*.yaml"))
    return {path.stem: path for path in files if (read_yaml(path) or {}).get("reproduce") is True}


OWN = "own"  # the group of experiments outside the clone (`config.own`), below `experiment`


def _run_label(*names: Any) -> str:
    return next(str(name) for name in names if name not in (None, "", "null", "None")).removeprefix(f"{OWN}/")


def run_label(cfg: DictConfig, choices: Mapping[str, Any]) -> str:
    """Label of a run: its `name`, else its experiment, else its task; `choices` are Hydra's group choices.

    It names the folder under `outputs/` and the MLflow experiment.
    """
    return _run_label(cfg.name, choices.get("experiment"), choices["task"])


OVERRIDES = "overrides.yaml"  # in every run folder: the list of command-line overrides
_ELSEWHERE = ("experiment=", "task=", "hydra", "tracking", "trainer.threads=", "data.path=")


def job_settings(overrides: Sequence[str]) -> list[str]:
    """Overrides of a sweep's job that decide its result, such as `transcoder.k=8`; not where it runs or is logged."""
    plain = [override.lstrip("+") for override in overrides]
    return [override for override in plain if not override.startswith(_ELSEWHERE)]


def _named(name: str, config: type) -> type:
    """The task's dataclass with a field `name`, so that a saved configuration names its task."""
    if "name" in {item.name for item in fields(config)}:
        return config
    return make_dataclass(config.__name__, [("name", str, field(default=name, kw_only=True))], bases=(config,))


_registered: dict[str, type] = {}


def register(task_configs: Mapping[str, type]) -> None:
    """Register all schemas and resolvers with Hydra; `task_configs` maps task names to `Config` dataclasses."""
    if task_configs == _registered:  # registering takes 0.1 s, and a process may run many commands
        return
    store = ConfigStore.instance()
    store.store(name="app_schema", node=AppConfig)
    store.store(group="transcoder", name="set_schema", node=TranscoderSetConfig)
    store.store(group="transcoder", name="random_schema", node=RandomTranscodersConfig)
    store.store(group="transcoder", name="arch_schema", node=TranscoderArchConfig)
    for name, config in task_configs.items():
        store.store(group="task", name=name, node=_named(name, config))
    OmegaConf.register_new_resolver("asset", asset, replace=True)
    OmegaConf.register_new_resolver("run_label", _run_label, replace=True)
    _registered.clear()
    _registered.update(task_configs)
