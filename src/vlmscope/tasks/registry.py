"""Finds the tasks: every module of this package that defines a `Config` class and a `run` function."""

import ast
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from vlmscope import tasks
from vlmscope.config import AppConfig
from vlmscope.core.errors import UserError
from vlmscope.tracking import TrackedRun

# Groups of settings that only some tasks read; all others (model, trainer, tracking, ...) are for every task.
OPTIONAL = (
    "data", "optim", "attribution", "intervention", "interchange", "discovery", "study", "where", "trials", "settings",
    "association", "circuit", "circuit_spec", "pairs", "images", "query", "analyses", "analysis", "report", "headline",
    "paper", "figure",
)  # fmt: skip

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
    """`recorded` is False for a task that only prints: it gets no configuration file, metrics or tracked run.

    `ranks` is True for one that several processes can run together (docs/scaling.md), `resumes` for one that always
    resumes in its folder. `memory` names the settings to lower when memory runs out, `uses` the groups of `OPTIONAL`
    that it reads.
    """

    name: str
    summary: str
    config: type
    run: Callable[[AppConfig, RunContext], dict[str, float]]
    recorded: bool
    ranks: bool
    resumes: bool
    memory: str
    uses: tuple[str, ...]

    def check_used(self, overrides: Sequence[str]) -> None:
        """Refuse settings that would change nothing, as in `task=trace study.limit=5`."""
        for override in overrides:
            group = override.lstrip("+~").partition("=")[0].partition(".")[0].partition("@")[0]
            if group in OPTIONAL and group not in self.uses:
                raise UserError(f"{override}: task={self.name} does not use {group}; leave it out")

    def settings(self, app: AppConfig) -> dict[str, Any]:
        """The settings that this run can use, for config.yaml and MLflow."""
        unused = {key for key in OPTIONAL if key not in self.uses or getattr(app, key) in (None, {}, [])}
        unused |= {key for key, subject in SUBJECTS.items() if subject in unused} | {"limits"}  # which were applied
        return {key: value for key, value in asdict(app).items() if key not in unused}

    def parameters(self, app: AppConfig) -> dict[str, Any]:
        """The settings that decide this run's result, for MLflow, where runs are compared; config.yaml has all.

        A setting without a value is left out, and so is the default of a group that only tunes the task.
        """
        unused = {*_SHOWN, *(() if "optim" in self.uses else ("trainer",))}  # the trainer's only where one trains
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
    for path in sorted(file for folder in tasks.__path__ for file in Path(folder).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        names = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        if {"Config", "run"} <= names:
            lines[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return lines


def load(name: str) -> Task:
    """Import one task by name; a name that is not in `summaries()` is a `KeyError`."""
    summary = summaries()[name]
    module: Any = importlib.import_module(f"{tasks.__name__}.{name}")
    defaults = {"RECORDED": True, "RANKS": False, "RESUMES": False, "MEMORY": "", "USES": ()}
    options = {key.lower(): getattr(module, key, default) for key, default in defaults.items()}
    return Task(name, summary, module.Config, module.run, **options)


def configs() -> dict[str, type]:
    """The `Config` dataclass of every task."""
    return {name: load(name).config for name in summaries()}
