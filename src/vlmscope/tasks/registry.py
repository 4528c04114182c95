"""One task of `settings.TASKS`: what it uses of a configuration, what is recorded of it, and how it is run."""

import ast
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from vlmscope import tasks
from vlmscope.config import AppConfig
from vlmscope.core.errors import UserError
from vlmscope.core.launch import import_quickly
from vlmscope.tasks.settings import OPTIONAL, TASKS, Settings
from vlmscope.tracking import TrackedRun

# Settings on which no result depends: where a run is recorded, and how it is shown and judged.
_SHOWN = ("tracking", "report", "headline", "paper", "figure", "name", "reproduce", "prompt_file", "prompt_name")
_SHOWN += ("experiment_file",)
_FREE = {"trainer": {"checkpoint_every", "log_every", "val_every", "threads", "resume", "rank_timeout"}}
_WHOLE = ("task", "model", "transcoder", "optim", "trainer")  # of these, defaults are parameters too
_NOTHING = (None, {}, [], "")

SUBJECTS = {"intervention": "circuit", "interchange": "pairs", "discovery": "pairs"}  # groups that say nothing alone


@dataclass(frozen=True)
class RunContext:
    """One run: its folder (it exists), where it is tracked, and the overrides that the user typed.

    `job` names the run by its settings within a sweep, "" outside of one.
    """

    run_dir: Path
    tracked: TrackedRun
    overrides: tuple[str, ...] = ()
    job: str = ""


class Task(NamedTuple):
    """A task: its name, what it does in one line, and its settings."""

    name: str
    summary: str
    config: type[Settings]

    def run(self, app: AppConfig, context: RunContext) -> dict[str, float]:
        """Import the task, which may take seconds, and run it; returns flat metrics."""
        app.task.look(app)
        name = f"{tasks.__name__}.{self.name}"
        import_quickly(name)
        return sys.modules[name].run(app, context)

    def check_used(self, overrides: Sequence[str]) -> None:
        """Refuse settings that would change nothing, as in `task=trace study.limit=5`."""
        for override in overrides:
            group = override.lstrip("+~").partition("=")[0].partition(".")[0].partition("@")[0]
            if group in OPTIONAL and group not in self.config.uses:
                raise UserError(f"{override}: task={self.name} does not use {group}; leave it out")

    def settings(self, app: AppConfig) -> dict[str, Any]:
        """The settings that this run can use, for config.yaml and MLflow."""
        unused = {key for key in OPTIONAL if key not in self.config.uses or getattr(app, key) in (None, {}, [])}
        unused |= {key for key, subject in SUBJECTS.items() if subject in unused} | {"limits"}  # which were applied
        return {key: value for key, value in asdict(app).items() if key not in unused}

    def parameters(self, app: AppConfig) -> dict[str, Any]:
        """The settings that decide this run's result, for MLflow, where runs are compared; config.yaml has all.

        A setting without a value is left out, and so is the default of a group that only tunes the task.
        """
        trains = "optim" in self.config.uses
        unused = {*_SHOWN, *(() if trains else ("trainer",))}
        kept = {}
        for key in self.settings(app).keys() - unused:
            value = chosen(getattr(app, key), key in _WHOLE)
            if key in _FREE:
                value = {name: item for name, item in value.items() if name not in _FREE[key]}
            if value not in _NOTHING:
                kept[key] = value
        return kept


def chosen(value: Any, whole: bool) -> Any:
    """Settings as plain mappings without empty values; and, unless `whole`, without those that equal their default."""
    if isinstance(value, Mapping):
        inner = {key: chosen(item, whole) for key, item in value.items()}
        return {key: item for key, item in inner.items() if item not in _NOTHING}
    if not is_dataclass(value):
        return value
    kept = {}
    for item in fields(value):
        own = getattr(value, item.name)
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        if whole or own != default:
            kept[item.name] = chosen(own, whole)
    return {key: item for key, item in kept.items() if item not in _NOTHING}


@cache
def summaries() -> dict[str, str]:
    """Name and one-line description of every task, read from the source without importing it."""
    lines: dict[str, str] = {}
    for name in TASKS:
        path = next(file for folder in tasks.__path__ if (file := Path(folder) / f"{name}.py").is_file())
        lines[name] = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
    return lines


def load(name: str) -> Task:
    """One task by name; a name that is not in `TASKS` is a `KeyError`."""
    return Task(name, summaries()[name], TASKS[name])


def configs() -> dict[str, type]:
    """The dataclass of every task's settings."""
    return dict(TASKS)
