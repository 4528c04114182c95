"""Settings of the tracking of runs."""

from dataclasses import dataclass


@dataclass
class TrackingConfig:
    """`uri` is an MLflow tracking URI, such as `sqlite:///outputs/mlflow.db` (relative to the current folder)."""

    enabled: bool = True
    uri: str = "sqlite:///outputs/mlflow.db"
