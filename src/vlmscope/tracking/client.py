"""An MLflow client that is quiet, offline and safe to open from several processes at once.

Importing MLflow takes 2 to 3 s on a slow core and its SQLite store 1 s more (3 s when the database is made), so both
happen here, when the first run is opened, and never at import.
"""

import fcntl
import hashlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vlmscope.core.errors import UserError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
}


def sqlite_file(uri: str) -> Path | None:
    """The database file of an `sqlite:///` URI (relative to the current folder), or None for another kind of URI."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


@contextmanager
def _first_use_lock(uri: str) -> Iterator[None]:
    """MLflow creates its tables without a lock, so two jobs that start together would break each other."""
    digest = hashlib.sha256(f"{Path.cwd()}:{uri}".encode()).hexdigest()[:16]
    with open(Path(tempfile.gettempdir()) / f"vlmscope-mlflow-{os.getuid()}-{digest}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _check_sqlite(uri: str) -> None:
    """MLflow retries an unusable file for a minute and then prints a page; say at once what is wrong."""
    path = sqlite_file(uri)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
    except OSError as error:
        raise UserError(
            f"tracking.uri={uri}: cannot write {path}: {error.strerror}; choose another file or tracking=none"
        ) from error
    with path.open("rb") as file:
        head = file.read(16)
    if head and not head.startswith(b"SQLite format 3"):
        raise UserError(f"tracking.uri={uri}: {path} is not a SQLite database; choose another file or tracking=none")


def open_client(uri: str) -> "MlflowClient":
    """A client for `uri`, its database made or checked.

    Raises:
        UserError: when the store cannot be used.
    """
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    _check_sqlite(uri)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow.exceptions
        from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with _first_use_lock(uri):
            return MlflowClient(uri)
    except mlflow.exceptions.MlflowException as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"tracking.uri={uri} cannot be used ({reason}); correct it or use tracking=none") from error
