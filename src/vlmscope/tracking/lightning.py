"""A Lightning logger for a tracked run.

Lightning's own MLFlowLogger cuts parameters at 250 characters, drops text, and ends the run by itself. This one only
passes metrics on: the app logs the configuration and ends the run.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning.loggers.logger import Logger

if TYPE_CHECKING:
    from vlmscope.tracking.run import TrackedRun


class RunLogger(Logger):
    """Logger that writes a Trainer's metrics into `run`, on the first process only."""

    def __init__(self, run: "TrackedRun") -> None:
        super().__init__()
        self._run = run

    @property
    def name(self) -> str:
        """A fixed name, which Lightning requires."""
        return "vlmscope"

    @property
    def version(self) -> str:
        """The run's id."""
        return self._run.run_id or "untracked"

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers at a step, without Lightning's `epoch`, which means nothing in step-based training."""
        kept = {key: float(value) for key, value in metrics.items() if key != "epoch"}
        if kept:
            self._run.log_metrics(kept, step)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the resolved configuration is logged when the run is opened."""
