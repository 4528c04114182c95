"""Finds the tasks: every module of this package that defines a `Config` class and a `run` function."""

import ast
import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from vlmscope import tasks
from vlmscope.config import AppConfig
from vlmscope.tasks.context import RunContext


class Task(NamedTuple):
    """`recorded` is False for a task that only prints: it gets no configuration file, metrics or tracked run.

    `ranks` is True for one that several processes can run together (docs/scaling.md), `resumes` for one that always
    goes on in a folder where it was before. `memory` names settings that, lowered, make it take less memory.
    """

    name: str
    summary: str
    config: type
    run: Callable[[AppConfig, RunContext], dict[str, float]]
    recorded: bool
    ranks: bool
    resumes: bool
    memory: str


@cache
def summaries() -> dict[str, str]:
    """Name and one-line description of every task, read from the source without importing it."""
    found: dict[str, str] = {}
    for path in sorted(file for folder in tasks.__path__ for file in Path(folder).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        names = {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        if {"Config", "run"} <= names:
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def load(name: str) -> Task:
    """Import one task by name; a name that is not in `summaries()` is a `KeyError`."""
    summary = summaries()[name]
    module: Any = importlib.import_module(f"{tasks.__name__}.{name}")
    recorded, ranks = getattr(module, "RECORDED", True), getattr(module, "RANKS", False)
    resumes, memory = getattr(module, "RESUMES", False), getattr(module, "MEMORY", "")
    return Task(name, summary, module.Config, module.run, recorded, ranks, resumes, memory)


def configs() -> dict[str, type]:
    """The `Config` dataclass of every task."""
    return {name: load(name).config for name in summaries()}
