"""The clone's folders, what can be chosen in them, and what Hydra must know: schemas and resolvers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from vlmscope.config.schema import AppConfig, RandomTranscodersConfig, TranscoderSetConfig
from vlmscope.core.artifacts import read_yaml
from vlmscope.core.errors import UserError
from vlmscope.training.config import TranscoderArchConfig


def project_root() -> Path:
    """The clone that this package was installed from with `pip install -e`.

    Raises:
        UserError: when `conf/` is not there, as in a plain wheel.
    """
    root = Path(__file__).resolve().parents[3]
    if not (root / "conf" / "config.yaml").is_file():
        raise UserError(f"no conf/config.yaml in {root}; run vlmscope from a clone, installed with `pip install -e .`")
    return root


def conf_dir() -> Path:
    """The folder of Hydra's configuration groups."""
    return project_root() / "conf"


def asset(relative: str) -> str:
    """The absolute path of a shipped asset; `${asset:orrery}` in configuration files."""
    return str(project_root() / "assets" / relative)


def first_comment(path: Path) -> str:
    """The first comment line of a YAML file that is not a `@package` directive, or an empty string."""
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if text and not text.startswith("#"):
            break
        text = text.lstrip("#").strip()
        if text and not text.startswith("@package"):
            return text
    return ""


def options(group: str, folder: Path | None = None) -> dict[str, str]:
    """Name and first comment line of every YAML file of a group, sorted by name; `folder` defaults to `conf/`."""
    files = sorted((folder or conf_dir()).joinpath(group).glob("*.yaml"))
    return {path.stem: first_comment(path) for path in files}


def reproducible(folders: Sequence[Path]) -> dict[str, Path]:
    """Name -> file of every experiment below `folders`, such as `conf/`, that says `reproduce: true`, by name."""
    files = sorted(path for folder in folders for path in folder.joinpath("experiment").glob("*.yaml"))
    return {path.stem: path for path in files if (read_yaml(path) or {}).get("reproduce") is True}


def _run_label(*names: Any) -> str:
    return next(str(name) for name in names if name not in (None, "", "null", "None"))


def run_label(cfg: DictConfig, choices: Mapping[str, Any]) -> str:
    """What a run belongs to: its `name`, else its experiment, else its task; `choices` are Hydra's group choices.

    It names the folder under `outputs/` and the experiment in MLflow.
    """
    return _run_label(cfg.name, choices.get("experiment"), choices["task"])


OVERRIDES = "overrides.yaml"  # in every run folder: what the command line said, a list
_ELSEWHERE = ("experiment=", "task=", "hydra", "tracking", "trainer.threads=", "data.path=")


def job_settings(overrides: Sequence[str]) -> list[str]:
    """What a job of a sweep sets, without what says where it runs and is recorded: `transcoder.k=8`, `seed=1`."""
    plain = [override.lstrip("+") for override in overrides]
    return [override for override in plain if not override.startswith(_ELSEWHERE)]


def _named(name: str, config: type) -> type:
    """The task's dataclass with a leading `name`, so that a saved configuration says which task it was for."""
    if "name" in {item.name for item in fields(config)}:
        return config
    return make_dataclass(config.__name__, [("name", str, field(default=name, kw_only=True))], bases=(config,))


_registered: dict[str, type] = {}


def register(task_configs: Mapping[str, type]) -> None:
    """Tell Hydra about every schema. `task_configs` maps a task's name to its `Config` dataclass. Repeatable.

    Repeating costs nothing: Hydra takes 0.1 s to read the schemas, and a process may run many commands.
    """
    if task_configs == _registered:
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
