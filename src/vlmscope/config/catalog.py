"""The shipped files, the options in `conf/`, the user's own experiments, and what is registered with Hydra.

`experiment=./mine.yaml` is a file anywhere, with its pictures and Python next to it.
Hydra finds options by name in the folders of its search path; a file elsewhere is read here and handed to Hydra as the
option `own/<name>`. In such a file

- the keys are those of the whole configuration (`# @package _global_` is not needed), `name` being the file's;
- `defaults: [/experiment/mars_earth_patch, _self_]` starts from a shipped experiment, `[./other.yaml, _self_]` from a
  file;
- a text that begins with `./` or `../` is a path from the file's folder, and so are the paths under `images:`.
"""

from __future__ import annotations

import re
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


def options(group: str) -> dict[str, str]:
    """Name -> first comment line of every YAML file of a group, by name."""
    return {path.stem: first_comment(path) for path in sorted((conf_dir() / group).glob("*.yaml"))}


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


OWN = "own"  # the group of experiments outside the clone below `experiment`


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


# The user's own experiments

_KEY = "experiment="
_BASE = re.compile(r"/?experiment/([\w-]+)")


def own_files(override: str) -> list[Path]:
    """The files that an override `experiment=./a.yaml,./b.yaml` names; none where it names shipped experiments."""
    names = override.removeprefix(_KEY).split(",") if override.startswith(_KEY) else []
    own = [Path(name) for name in names if _is_file(name)]
    if own and len(own) < len(names):
        raise UserError(f"{override}: these are files and names; give the shipped experiments in a sweep of their own")
    return own


def adopt(arguments: Sequence[str]) -> list[str]:
    """The command line with files of experiments registered and replaced by the options that they have become.

    Raises:
        UserError: a file is missing or holds no settings, or files start from each other in a circle.
    """
    names: dict[Path, str] = {}  # by file, each its own
    adopted: list[str] = []
    for argument in arguments:
        files = own_files(argument)
        options = [f"{OWN}/{_adopted(file, names)}" for file in files]
        adopted.append(_KEY + ",".join(options) if files else argument)
    return adopted


def _adopted(file: Path, names: dict[Path, str], above: tuple[Path, ...] = ()) -> str:
    """Register a file with Hydra, and those that it starts from; returns its name there."""
    file = file.absolute()
    if file in above:
        raise UserError(f"{file} starts from itself; correct its defaults")
    if file in names:
        return names[file]
    if not file.is_file():
        raise UserError(f"experiment={file}: no such file; give the path of a YAML file (docs/experiments.md)")
    body = read_yaml(file)
    if not isinstance(body, dict):
        raise UserError(f"{file} holds no settings; write an experiment (docs/experiments.md)")
    if "defaults" in body:
        body["defaults"] = [
            f"/experiment/{OWN}/{_adopted(file.parent / item, names, (*above, file))}" if _is_file(item) else item
            for item in body["defaults"]
        ]
    body = {key: _resolved(value, file.parent) for key, value in body.items()}
    if isinstance(images := body.get("images"), dict):
        for concept, paths in images.items():
            images[concept] = [str(file.parent / path) for path in ([paths] if isinstance(paths, str) else paths or [])]
    name = stem = re.sub(r"[^\w-]", "_", file.stem)
    while name in names.values():
        name = f"{stem}_{len(names)}"
    names[file] = name
    node = OmegaConf.create({"name": file.stem, **body, "experiment_file": str(file)})
    ConfigStore.instance().store(group=f"experiment/{OWN}", name=name, node=node, package="_global_")
    return name


def _is_file(item: Any) -> bool:
    """Whether an experiment, or an entry of `defaults`, is a file and no name."""
    return isinstance(item, str) and item.endswith((".yaml", ".yml"))


def _resolved(value: Any, folder: Path) -> Any:
    """A value with every text that begins with `./` or `../` made an absolute path."""
    if isinstance(value, dict):
        return {key: _resolved(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item, folder) for item in value]
    return str(folder / value) if isinstance(value, str) and value.startswith(("./", "../")) else value


def module_file(experiment_file: str | Path) -> Path | None:
    """The Python of an own experiment: the file of the same name next to it, else that of the experiment that it
    starts from; None without one.
    """
    file = Path(experiment_file)
    if file.with_suffix(".py").is_file():
        return file.with_suffix(".py")
    for item in (read_yaml(file) or {}).get("defaults", []):
        base = _BASE.fullmatch(str(item).partition("@")[0])
        place = conf_dir() / "experiment" / f"{base[1]}.py" if base else None
        found = module_file(file.parent / item) if _is_file(item) else place
        if found is not None and found.is_file():
            return found
    return None
