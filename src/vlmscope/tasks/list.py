"""Shows the tasks, experiments, models, transcoders, prompt sets and pairs that can be chosen, with a line each."""

from dataclasses import dataclass

from vlmscope.config import AppConfig, catalog
from vlmscope.tasks import registry
from vlmscope.tasks.registry import RunContext

RECORDED = False


@dataclass
class Config:
    """This task has no settings."""


def table(title: str, rows: dict[str, str]) -> str:
    """A heading and one aligned line for each row."""
    width = max((len(name) for name in rows), default=0)
    lines = [f"  {name:<{width}}  {text}".rstrip() for name, text in rows.items()] or ["  (none)"]
    return "\n".join([title, *lines])


def overview() -> str:
    """Tasks, experiments, models, transcoders, prompt sets and pairs."""
    return "\n\n".join(
        [
            table("Tasks (task=NAME)", registry.summaries()),
            table("Experiments (experiment=NAME)", catalog.options("experiment")),
            table("Models (model=NAME)", catalog.options("model")),
            table("Transcoders (transcoder=NAME)", catalog.options("transcoder")),
            table("Prompt sets (prompts=NAME)", catalog.options("prompts")),
            table("Counterfactual pairs (pairs=NAME)", catalog.options("pairs")),
        ]
    )


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Print the overview."""
    print(overview())
    return {}
