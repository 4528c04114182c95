"""The workbench: runs, graphs, features and interventions in the browser (docs/workbench.md)."""

from __future__ import annotations

from pathlib import Path

from vlmscope.config import AppConfig
from vlmscope.core.errors import Terminated, UserError
from vlmscope.tasks.job import remove_empty
from vlmscope.tasks.settings import RunContext, ServeSettings
from vlmscope.viewer.server import serve

PORT = 8600


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Serve until Ctrl-C."""
    remove_empty(context.run_dir)  # this task writes nothing itself
    root, asked = Path(cfg.task.root).absolute(), cfg.task.port is not None
    try:
        if cfg.task.root == ServeSettings.root:
            root.mkdir(exist_ok=True)  # of a fresh clone
        elif not root.is_dir():
            raise UserError(f"task.root={cfg.task.root}: no such folder; give one that holds run folders")
        serve(root, cfg.task.host, cfg.task.port if asked else PORT, asked, context.overrides)
    except OSError as error:
        raise UserError(f"task.root={cfg.task.root}: {error.strerror}; choose a folder that can be written") from error
    except Terminated:
        raise
    except KeyboardInterrupt:  # the usual end
        print("the workbench ended")
    return {}
