"""Experiments of the user's own: `experiment=./mine.yaml`, a file anywhere, with its pictures and Python next to it.

Hydra finds options by name in the folders of its search path; a file elsewhere is read here and handed to Hydra as the
option `own/<name>`. In such a file

- the keys are those of the whole configuration (`# @package _global_` is not needed), `name` being the file's;
- `defaults: [/experiment/mars_earth_patch, _self_]` starts from a shipped experiment, `[./other.yaml, _self_]` from a
  file;
- a text that begins with `./` or `../` is a path from the file's folder, and so are the paths under `images:`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from vlmscope.config.catalog import OWN, conf_dir
from vlmscope.core.artifacts import read_yaml
from vlmscope.core.errors import UserError

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
        options = [f"{OWN}/{_registered(file, names)}" for file in files]
        adopted.append(_KEY + ",".join(options) if files else argument)
    return adopted


def _registered(file: Path, names: dict[Path, str], above: tuple[Path, ...] = ()) -> str:
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
            f"/experiment/{OWN}/{_registered(file.parent / item, names, (*above, file))}" if _is_file(item) else item
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
