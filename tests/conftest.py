"""Settings for all tests: no network, no thread pools that fight over the cores; an empty tracking store to copy."""

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

for _key, _value in {
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
}.items():
    os.environ.setdefault(_key, _value)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/*.json and print what changed")


def _back_to_one_thread() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A training run sets the threads of the whole process; with two, all later tests would fight over the cores."""
    _back_to_one_thread()
    yield
    _back_to_one_thread()


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables and no runs, made once for all workers; to be copied."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    path = shared / "empty_store.db"
    with (shared / "empty_store.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            from vlmscope.tracking.client import open_client

            open_client(f"sqlite:///{path}.part")
            Path(f"{path}.part").rename(path)
    return path


@pytest.fixture
def store(empty_store: Path, tmp_path: Path) -> str:
    """The URI of a database of the test's own, `m.db` in its folder."""
    shutil.copy(empty_store, tmp_path / "m.db")
    return f"sqlite:///{tmp_path}/m.db"
