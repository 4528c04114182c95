"""List the tasks, experiments, models, transcoders, prompt sets and pairs to choose from, one line each."""

from vlmscope.config import AppConfig, catalog
from vlmscope.tasks.settings import RunContext, summaries

GROUPS = {
    "experiment": "Experiments",
    "model": "Models",
    "transcoder": "Transcoders",
    "prompts": "Prompt sets",
    "pairs": "Counterfactual pairs",
}


def table(title: str, rows: dict[str, str]) -> str:
    """A heading and one aligned line for each row."""
    width = max((len(name) for name in rows), default=0)
    lines = [f"  {name:<{width}}  {text}".rstrip() for name, text in rows.items()] or ["  (none)"]
    return "\n".join([title, *lines])


def overview() -> str:
    """Tasks, experiments, models, transcoders, prompt sets and pairs."""
    tables = [table("Tasks (task=NAME)", summaries())]
    tables += [table(f"{title} ({group}=NAME)", catalog.options(group)) for group, title in GROUPS.items()]
    return "\n\n".join(tables)


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Print the overview."""
    print(overview())
    return {}
