"""An MLflow client that is quiet, offline, safe to open from several processes, and retries on a locked database.

Importing MLflow takes 2 to 3 s on a slow core and its SQLite store 1 s more (3 s when the database is created), so both
happen when the first run is opened, not at import.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import re
import sqlite3
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vlmscope.core.artifacts import flat
from vlmscope.core.errors import UserError
from vlmscope.core.launch import import_quickly

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

# MLflow's own limits, in characters
MAX_KEY = 250
MAX_VALUE = 6000
_FORBIDDEN = re.compile(r"[^\w\-. :/]")
_CUT = " ... (cut; whole in config.yaml)"
WAIT = 1.0  # seconds to wait for the store while work is held up
PATIENCE = 60.0  # the same at the end of a run
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "GIT_PYTHON_REFRESH": "quiet",
    # By default each call retries an unreachable server for minutes.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
_PACKAGES = (
    "vlmscope",
    "torch",
    "transformers",
    "tokenizers",
    "pytorch-lightning",
    "hydra-core",
    "mlflow",
    "numpy",
    "safetensors",
)
T = TypeVar("T")


class Unreachable(Exception):
    """The tracking store does not answer or refuses what it is given; the message is the reason in a few words."""


def clean_text(text: str) -> str:
    """`text` as UTF-8 can hold it: a file name's other bytes, such as 0xe9, become `\\udce9`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def clean_key(key: str) -> str:
    """`key` with the characters that MLflow refuses replaced by `_`, cut to its limit."""
    return _FORBIDDEN.sub("_", key)[:MAX_KEY] or "_"


def to_params(config: Mapping[str, Any]) -> dict[str, str]:
    """Every leaf of `config` as one parameter. Keys that become equal by cleaning get a number; long values are cut."""
    params: dict[str, str] = {}
    leaves = {key: leaf for group, inner in config.items() for key, leaf in flat(str(group), inner).items()}
    for key, value in leaves.items():
        name = base = clean_key(key)
        number = 2
        while name in params:
            name = f"{base[: MAX_KEY - 8]}_{number}"
            number += 1
        text = clean_text(str(value))
        params[name] = text if len(text) <= MAX_VALUE else text[: MAX_VALUE - len(_CUT)] + _CUT
    return params


def git_state() -> tuple[str, bool]:
    """The commit of this code and whether tracked files differ from it; ("none", False) without git."""
    folder = Path(__file__).resolve().parent
    try:
        commit, changes = (
            subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True, timeout=20).stdout
            for args in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError):
        return "none", False
    return commit.strip(), bool(changes.strip())


def package_versions() -> dict[str, str]:
    """Versions of Python and of each package that can change a number."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def tags() -> dict[str, str]:
    """Provenance as tags of a tracked run."""
    commit, dirty = git_state()
    provenance = {"git_commit": commit, "git_dirty": str(dirty).lower()}
    if commit != "none":
        provenance["mlflow.source.git.commit"] = commit
    return provenance | {f"version.{name}": version for name, version in package_versions().items()}


def patiently(uri: str, work: Callable[[], T], seconds: float) -> T:
    """Return `work()`, retried from its start while the store is locked, for about `seconds`.

    Raises:
        UserError: from `work`.
        Unreachable: on any other failure of the store.
    """
    deadline = time.monotonic() + seconds
    path = sqlite_file(uri)
    while True:
        try:
            if path is not None:  # look at the lock first: MLflow itself would wait 20 s in each call
                wait = min(max(deadline - time.monotonic(), 0.0), WAIT)
                with closing(sqlite3.connect(path, timeout=wait, isolation_level=None)) as connection:
                    connection.execute("BEGIN IMMEDIATE")
                    connection.execute("ROLLBACK")
            return work()
        except UserError:
            raise
        except Exception as error:  # MLflow passes on errors of its database, its server and its files as they are
            if "locked" not in str(error) or time.monotonic() >= deadline:
                raise Unreachable(_reason(error)) from error
            time.sleep(0.05)


def _reason(error: Exception) -> str:
    """The first words of an error, without the SQL, addresses and advice that may follow."""
    text = (error.strerror if isinstance(error, OSError) and error.strerror else str(error)) or type(error).__name__
    return " ".join(text.partition("[SQL")[0].split()).rpartition("OperationalError) ")[2][:200].strip()


def sqlite_file(uri: str) -> Path | None:
    """The database file of an `sqlite:///` URI (relative to the current folder), or None for another kind of URI."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


@contextmanager
def _first_use_lock(uri: str) -> Iterator[None]:
    """Lock around the first use: MLflow creates its tables without one, so two jobs starting together would clash."""
    digest = hashlib.sha256(os.fsencode(f"{Path.cwd()}:{uri}")).hexdigest()[:16]
    with open(Path(tempfile.gettempdir()) / f"vlmscope-mlflow-{os.getuid()}-{digest}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def check_store(uri: str) -> None:
    """Check that the file can be written as a database; MLflow would retry for a minute and then print a page.

    Raises:
        UserError: the file cannot be written or is not a SQLite database.
    """
    path = sqlite_file(uri)
    if path is None:
        return
    whole = str(path.absolute())
    if clean_text(whole) != whole:  # MLflow would put the artifacts into a folder with another name
        raise UserError(
            f"tracking.uri={clean_text(uri)}: the path {clean_text(whole)} is not UTF-8, as MLflow needs it; choose "
            f"another database or tracking=none"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise UserError(
            f"tracking.uri={uri}: cannot write {path}: {error.strerror}; choose another file or tracking=none"
        ) from error
    with path.open("rb") as file:
        head = file.read(16)
    if head and not head.startswith(b"SQLite format 3"):
        raise UserError(f"tracking.uri={uri}: {path} is not a SQLite database; choose another file or tracking=none")


def open_client(uri: str) -> MlflowClient:
    """A client for `uri`, after creating or checking its database.

    Raises:
        UserError: the store cannot be used.
    """
    for key, value in _QUIET.items():
        os.environ.setdefault(key, value)
    check_store(uri)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = () if sqlite_file(uri) is None else ("mlflow.store.tracking.sqlalchemy_store",)
        import_quickly("mlflow.tracking", *store)
        import mlflow.exceptions
        from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # MLflow logs a traceback of what it also raises
    try:
        with _first_use_lock(uri):
            return MlflowClient(uri)
    except mlflow.exceptions.MlflowException as error:
        if "locked" in str(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"tracking.uri={uri} cannot be used ({reason}); correct it or use tracking=none") from error
