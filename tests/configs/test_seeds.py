"""One root key, `seed`, decides everything random in a run: every seed of every group follows it."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from vlmscope.config import catalog
from vlmscope.config.paths import conf_dir
from vlmscope.config.resolve import to_app_config
from vlmscope.config.store import register
from vlmscope.tasks import registry

GROUPS = ("circuit", "cross_modal", "hallucination", "interchange", "pairs", "study", "where")
OPTIONS = [f"{group}={name}" for group in GROUPS for name in catalog.options(group)]
EXPERIMENTS = [f"experiment={name}" for name in catalog.options("experiment")]


@pytest.fixture(autouse=True)
def hydra() -> Iterator[None]:
    register(registry.configs())
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


def seeds(node: Any, path: str = "") -> dict[str, int]:
    """Every field called seed below a record, by its dotted name."""
    if isinstance(node, dict):
        parts = list(node.items())
    elif is_dataclass(node):
        parts = [(item.name, getattr(node, item.name)) for item in fields(node)]
    else:
        return {path: node} if path.rpartition(".")[2] == "seed" else {}
    return {key: value for name, part in parts for key, value in seeds(part, f"{path}.{name}").items()}


@pytest.mark.parametrize("chosen", [*OPTIONS, *EXPERIMENTS])
def test_every_seed_follows_the_root(chosen: str) -> None:
    arguments = [chosen, "seed=7"] + (["pairs.path=/x"] if chosen == "pairs=file" else [])
    found = seeds(to_app_config(compose("config", arguments), arguments))
    assert found.pop(".seed") == 7
    # The stages of Orrery's training keep the seeds that the shipped model was made with.
    own = {key for key, value in found.items() if value != 7 and not key.startswith(".task.training.")}
    assert own == set()
    assert ".trainer.seed" in found
