"""One root key, `seed`, decides everything random in a run: every seed of every group follows it."""

from dataclasses import fields, is_dataclass
from typing import Any

import pytest
from tests.configs.composing import composed, rounds

from vlmscope.config import catalog

GROUPS = ("circuit", "interchange", "pairs", "study", "where")
EXPERIMENTS = [(f"experiment={name}",) for name in catalog.options("experiment")]


def seeds(node: Any, path: str = "") -> dict[str, int]:
    """Every field called seed below a record, by its dotted name."""
    if isinstance(node, dict):
        parts = list(node.items())
    elif is_dataclass(node):
        parts = [(item.name, getattr(node, item.name)) for item in fields(node)]
    else:
        return {path: node} if path.rpartition(".")[2] == "seed" else {}
    return {key: value for name, part in parts for key, value in seeds(part, f"{path}.{name}").items()}


@pytest.mark.parametrize("chosen", [*rounds(*GROUPS), *EXPERIMENTS])
def test_every_seed_follows_the_root(chosen: tuple[str, ...]) -> None:
    found = seeds(composed(*chosen, "seed=7"))
    assert found.pop(".seed") == 7
    # The stages of Orrery's training keep the seeds that the shipped model was made with.
    own = {key for key, value in found.items() if value != 7 and not key.startswith(".task.training.")}
    assert own == set()
    assert ".trainer.seed" in found
