"""The one seam to MLflow: nothing else imports it, and here it is imported only when a run is opened."""

from vlmscope.tracking.run import RunInfo, TrackedRun, TrackingConfig, open_run

__all__ = ["RunInfo", "TrackedRun", "TrackingConfig", "open_run"]
