"""Compose a configuration as the command line does; a composition takes 0.2 s, so the same one is made once."""

from functools import cache
from itertools import zip_longest

from hydra import compose, initialize_config_dir

from vlmscope.config import AppConfig, catalog
from vlmscope.config.catalog import conf_dir, register
from vlmscope.config.resolve import quote_arguments, to_app_config
from vlmscope.tasks.settings import TASKS


@cache
def composed(*overrides: str) -> AppConfig:
    """The typed configuration; shared by all who ask, so it is to be read only."""
    register(TASKS)
    quoted = quote_arguments(overrides, TASKS)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_app_config(compose("config", quoted), quoted)


def rounds(*groups: str) -> list[tuple[str, ...]]:
    """Every option of these groups once, an option of each group at a time, with the paths that some need."""
    options = [[f"{group}={name}" for name in catalog.options(group)] for group in groups]
    return [tuple(part for one in chosen if one for part in (one, *_paths(one))) for chosen in zip_longest(*options)]


def _paths(option: str) -> list[str]:
    group, name = option.split("=")
    if option == "data=mix_local":
        return [f"data.sources.{source}.path=/x" for source in ("text", "captions", "questions")]
    return [f"{group}.path=/x"] if name in ("path", "folder", "file") else []
