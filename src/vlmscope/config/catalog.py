"""Where the clone's folders are, from any current folder, and what can be chosen in them, without composing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmscope.core.artifacts import read_yaml
from vlmscope.core.errors import UserError


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
