"""The workbench: runs, graphs, features and interventions in the browser (docs/workbench.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmscope.core.errors import Terminated, UserError

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.tasks.registry import RunContext

RECORDED = False
PORT = 8600


@dataclass
class Config:
    """Serves the run folders below `root` at `host`, by default to this computer alone.

    Another host, such as 0.0.0.0, asks for a random token, which the printed address holds. `port` null takes 8600,
    or a free one where that is in use.
    """

    root: str = "outputs"
    host: str = "127.0.0.1"
    port: int | None = None

    def __post_init__(self) -> None:
        if self.port is not None and not 0 <= self.port < 65536:
            raise UserError(f"task.port={self.port}: choose a port from 0 (any free one) to 65535")


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Serve until Ctrl-C."""
    from pathlib import Path

    from vlmscope.tasks.job import remove_empty
    from vlmscope.viewer.server import serve

    remove_empty(context.run_dir)  # this task writes nothing itself
    root, asked = Path(cfg.task.root).absolute(), cfg.task.port is not None
    try:
        if cfg.task.root == Config.root:
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
