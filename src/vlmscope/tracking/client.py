"""An MLflow client: quiet, offline, safe to open from several processes at once, patient with a locked database.

Importing MLflow takes 2 to 3 s on a slow core and its SQLite store 1 s more (3 s when the database is made), so both
happen here, when the first run is opened, and never at import.
"""

import fcntl
import hashlib
import logging
import os
import sqlite3
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vlmscope.core.errors import UserError
from vlmscope.tracking.params import clean_text

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
    # MLflow would try a server that is gone for minutes, within each call.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
WAIT = 1.0  # seconds for a store that does not answer while work waits for it
PATIENCE = 60.0  # and where nothing else is left to do
T = TypeVar("T")


class Unreachable(Exception):
    """The tracking store does not answer or refuses what it is given; the reason in a few words."""


def _check_lock(uri: str, seconds: float) -> None:
    """Raise `Unreachable` where another connection has locked the database for that long: MLflow waits 20 s a call."""
    path = sqlite_file(uri)
    if path is not None:
        with closing(sqlite3.connect(path, timeout=seconds, isolation_level=None)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")


def patiently(uri: str, work: Callable[[], T], seconds: float) -> T:
    """Return `work()`, tried again while the store is locked, for about `seconds`; it may be repeated from its start.

    Raises:
        UserError: from `work`.
        Unreachable: anything else went wrong with the store.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            _check_lock(uri, min(max(deadline - time.monotonic(), 0.0), WAIT))
            return work()
        except UserError:
            raise
        except Exception as error:  # MLflow lets those of its database, its server and its files through
            if "locked" not in str(error) or time.monotonic() >= deadline:
                raise Unreachable(_reason(error)) from error
            time.sleep(0.05)


def _reason(error: Exception) -> str:
    """The first words of an error that may show SQL, addresses and advice."""
    text = (error.strerror if isinstance(error, OSError) and error.strerror else str(error)) or type(error).__name__
    return " ".join(text.partition("[SQL")[0].split()).rpartition("OperationalError) ")[2][:200].strip()


def sqlite_file(uri: str) -> Path | None:
    """The database file of an `sqlite:///` URI (relative to the current folder), or None for another kind of URI."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


@contextmanager
def _first_use_lock(uri: str) -> Iterator[None]:
    """MLflow creates its tables without a lock, so two jobs that start together would break each other."""
    digest = hashlib.sha256(os.fsencode(f"{Path.cwd()}:{uri}")).hexdigest()[:16]
    with open(Path(tempfile.gettempdir()) / f"vlmscope-mlflow-{os.getuid()}-{digest}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def check_store(uri: str) -> None:
    """Check that a database can be written; MLflow retries one that cannot for a minute and then prints a page.

    Raises:
        UserError: it cannot, or is none.
    """
    path = sqlite_file(uri)
    if path is None:
        return
    whole = str(path.absolute())
    if clean_text(whole) != whole:  # MLflow would put the artifacts into a folder of another name
        raise UserError(
            f"tracking.uri={clean_text(uri)}: the path {clean_text(whole)} is not UTF-8, as MLflow needs it; choose "
            f"another database or tracking=none"
        )
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
    check_store(uri)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow.exceptions
        from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # MLflow logs the traceback of what it raises
    try:
        with _first_use_lock(uri):
            return MlflowClient(uri)
    except mlflow.exceptions.MlflowException as error:
        if "locked" in str(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"tracking.uri={uri} cannot be used ({reason}); correct it or use tracking=none") from error
