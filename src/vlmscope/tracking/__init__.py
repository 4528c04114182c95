"""Tracking with MLflow. No other package imports MLflow, and this one does so only when a run is opened."""

from vlmscope.tracking.run import RunInfo, TrackedRun, TrackingConfig, open_run

__all__ = ["RunInfo", "TrackedRun", "TrackingConfig", "open_run"]
