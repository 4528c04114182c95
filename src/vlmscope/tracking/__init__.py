"""The one seam to MLflow: nothing else imports it, and here it is imported only when a run is opened."""

from vlmscope.tracking.config import TrackingConfig
from vlmscope.tracking.run import NullRun, RunInfo, TrackedRun, open_run

__all__ = ["NullRun", "RunInfo", "TrackedRun", "TrackingConfig", "open_run"]
