"""Where the clone's own folders are: configuration and shipped assets are found from any current folder."""

from pathlib import Path

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
