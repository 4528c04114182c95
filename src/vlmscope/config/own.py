"""Experiments of the user's own: `experiment=./mine.yaml`, a file anywhere, with its pictures and Python next to it.

Hydra finds options by name in the folders of its search path; a file elsewhere is read here and handed to Hydra as the
option `own/<name>`. In such a file

- the keys are those of the whole configuration (`# @package _global_` is not needed), `name` being the file's;
- `defaults: [/experiment/mars_earth_patch, _self_]` starts from a shipped experiment;
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
    own = [Path(name) for name in names if name.endswith((".yaml", ".yml"))]
    if own and len(own) < len(names):
        raise UserError(f"{override}: these are files and names; give the shipped experiments in a sweep of their own")
    return own


def adopt(arguments: Sequence[str]) -> list[str]:
    """The command line with files of experiments registered and replaced by the options that they have become.

    Raises:
        UserError: a file is missing or holds no settings, or two files have the same name.
    """
    adopted: list[str] = []
    for argument in arguments:
        files = own_files(argument)
        names = [re.sub(r"[^\w-]", "_", file.stem) for file in files]
        if len(set(names)) < len(names):
            raise UserError(f"{argument}: two of these files have one name; rename one")
        for name, file in zip(names, files, strict=True):
            ConfigStore.instance().store(group=f"experiment/{OWN}", name=name, node=_node(file), package="_global_")
        adopted.append(_KEY + ",".join(f"{OWN}/{name}" for name in names) if files else argument)
    return adopted


def _node(file: Path) -> Any:
    """The settings of a file, with absolute paths and `experiment_file`, the file itself."""
    if not file.is_file():
        raise UserError(f"experiment={file}: no such file; give the path of a YAML file (docs/experiments.md)")
    body = read_yaml(file)
    if not isinstance(body, dict):
        raise UserError(f"{file} holds no settings; write an experiment (docs/experiments.md)")
    folder = file.absolute().parent
    body = {key: _resolved(value, folder) for key, value in body.items()}
    if isinstance(images := body.get("images"), dict):
        for concept, paths in images.items():
            images[concept] = [str(folder / path) for path in ([paths] if isinstance(paths, str) else paths or [])]
    return OmegaConf.create({"name": file.stem, **body, "experiment_file": str(file.absolute())})


def _resolved(value: Any, folder: Path) -> Any:
    """A value with every text that begins with `./` or `../` made an absolute path."""
    if isinstance(value, dict):
        return {key: _resolved(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolved(item, folder) for item in value]
    return str(folder / value) if isinstance(value, str) and value.startswith(("./", "../")) else value


def module_file(experiment_file: str) -> Path | None:
    """The Python of an own experiment: the file of the same name next to it, else that of the experiment it starts
    from; None without one.
    """
    file = Path(experiment_file)
    bases = [_BASE.fullmatch(str(item).partition("@")[0]) for item in (read_yaml(file) or {}).get("defaults", [])]
    places = [file.with_suffix(".py"), *(conf_dir() / "experiment" / f"{base[1]}.py" for base in bases if base)]
    return next((place for place in places if place.is_file()), None)
