"""Status, resume, sweeps, limits: against a real MLflow store in SQLite."""

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from vlmscope.core.errors import UserError
from vlmscope.core.results import SweepJob
from vlmscope.tracking import RunInfo, TrackingConfig, open_run
from vlmscope.tracking import run as tracked_run
from vlmscope.tracking.client import MAX_KEY, MAX_VALUE, open_client, to_params
from vlmscope.training.resume import RunLogger


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    """One database for the module: making one takes seconds."""
    return TrackingConfig(True, f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db")


@pytest.fixture(autouse=True)
def no_sweep_left_open() -> Iterator[None]:
    before = dict(os.environ)
    yield
    assert {key for key in os.environ if key.startswith("VLMSCOPE_MLFLOW")} <= before.keys()


def folder(tmp_path: Path, name: str = "run") -> Path:
    path = tmp_path / name
    path.mkdir(exist_ok=True)
    return path


def stored(config: TrackingConfig, run_id: str | None) -> Any:
    assert run_id is not None
    return open_client(config.uri).get_run(run_id)


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "FINISHED"), (RuntimeError("x"), "FAILED"), (UserError("x"), "FAILED"), (KeyboardInterrupt(), "KILLED")],
)
def test_the_status_says_how_the_work_ended(config, tmp_path, error, status) -> None:
    run_id = None
    try:
        with open_run(config, folder(tmp_path), RunInfo("status", "r")) as run:
            run_id = run.run_id
            assert stored(config, run_id).info.status == "RUNNING"
            if error is not None:
                raise error
    except BaseException as raised:
        assert raised is error
    assert stored(config, run_id).info.status == status


def test_everything_that_was_logged_is_there(config, tmp_path) -> None:
    run_dir = folder(tmp_path)
    (run_dir / "figures").mkdir()
    (run_dir / "figures" / "a.png").write_bytes(b"1")
    (run_dir / "config.yaml").write_text("a: 1\n")
    params = {"model": {"name": "orrery"}, "images": {"my pictures?": ["a.png"]}, "betas": [0.9, 0.999]}
    info = RunInfo("study", "job", params, ["seed=1", 'prompt="a, b"'])
    with open_run(config, run_dir, info) as run:
        run.log_metrics({"val/fvu": 0.5}, step=10)
        run.log_metrics({"val/fvu": 0.25, "layers/fvu/layer_07": 1.0}, step=20)
        run.log_artifacts(run_dir)
    client = open_client(config.uri)
    found = stored(config, run.run_id)
    assert client.get_experiment(found.info.experiment_id).name == "study"
    assert found.info.run_name == "job"
    assert found.data.metrics == {"val/fvu": 0.25, "layers/fvu/layer_07": 1.0}
    assert [m.step for m in client.get_metric_history(found.info.run_id, "val/fvu")] == [10, 20]
    assert found.data.params == {"model.name": "orrery", "images.my pictures_": "['a.png']", "betas": "[0.9, 0.999]"}
    assert found.data.tags["overrides"] == 'seed=1 prompt="a, b"'
    assert found.data.tags["git_commit"]
    assert found.data.tags["version.torch"].startswith("2.")
    assert {item.path for item in client.list_artifacts(found.info.run_id)} == {"config.yaml", "figures"}
    assert [item.path for item in client.list_artifacts(found.info.run_id, "figures")] == ["figures/a.png"]
    assert not (Path.cwd() / "mlruns").exists()


def test_a_resumed_run_goes_on_and_a_new_one_does_not(config, tmp_path) -> None:
    run_dir = folder(tmp_path)
    with pytest.raises(RuntimeError), open_run(config, run_dir, RunInfo("resume", "r", {"a": 1, "b": 2})) as first:
        raise RuntimeError
    with open_run(config, run_dir, RunInfo("resume", "r", {"a": 1, "b": 3, "c": 4}), resume=True) as second:
        assert stored(config, second.run_id).info.status == "RUNNING"
    assert second.run_id == first.run_id
    found = stored(config, second.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"a": "1", "b": "2", "c": "4"}
    assert found.data.tags["changed.b"] == "3"
    with open_run(config, run_dir, RunInfo("resume", "r")) as third:
        assert third.run_id != first.run_id


def test_a_sweep_shows_its_jobs_as_a_table_and_as_curves_over_what_was_swept(config, tmp_path) -> None:
    parent = tracked_run.open_parent(config, tmp_path / "sweep", "tables", ["k=4,16"])
    jobs = [
        SweepJob(("k=4",), {"val/fvu": 0.5, "layers/fvu/layer_00": 0.4}),
        SweepJob(("k=8",), None),
        SweepJob(("k=16",), {"val/fvu": 0.25, "layers/fvu/layer_00": 0.2}),
    ]
    for _ in range(2):  # a sweep that is run again replaces its table
        assert f"/runs/{parent}" in tracked_run.log_to_parent(jobs, [], tmp_path / "sweep")
    tracked_run.close_parent()
    client = open_client(config.uri)
    history = client.get_metric_history(parent, "val/fvu")
    assert {(point.step, point.value) for point in history} == {(4, 0.5), (16, 0.25)}
    table = json.loads(Path(client.download_artifacts(parent, "sweep.json")).read_text())
    assert table["columns"] == ["k", "status", "val/fvu"]
    assert table["data"] == [["4", "finished", 0.5], ["8", "failed", None], ["16", "finished", 0.25]]
    assert client.get_run(parent).data.tags["sweep"] == "sweep"


@pytest.mark.parametrize(
    ("errors", "status"),
    [([None, None], "FINISHED"), ([RuntimeError(), None], "FAILED"), ([None, KeyboardInterrupt()], "KILLED")],
)
def test_a_sweep_is_a_parent_with_its_jobs_status(config, tmp_path, errors, status) -> None:
    parent = tracked_run.open_parent(config, tmp_path / "sweep", "sweeps", ["seed=1,2"])
    assert tracked_run.parent_id() == parent
    for number, error in enumerate(errors):
        try:
            info = RunInfo("sweeps", str(number), parent_id=tracked_run.parent_id())
            with open_run(config, folder(tmp_path, str(number)), info) as job:
                assert stored(config, job.run_id).data.tags["mlflow.parentRunId"] == parent
                if error is not None:
                    raise error
        except BaseException as raised:
            assert raised is error
    tracked_run.close_parent()
    assert stored(config, parent).info.status == status
    with pytest.raises(UserError, match="no tracked parent"):
        tracked_run.parent_id()
    tracked_run.close_parent()


def test_parameters_keep_mlflows_limits() -> None:
    long = "k" * 400
    params = to_params({"a": {"b?": 1, "b!": 2, long: 3, long + "x": 4}, "text": "x" * 10_000, "empty": {}})
    assert params["a.b_"] == "1"
    assert params["a.b__2"] == "2"
    assert params["empty"] == "{}"
    assert sorted(params.values())[:4] == ["1", "2", "3", "4"]
    assert max(map(len, params)) <= MAX_KEY
    assert len(params["text"]) == MAX_VALUE
    assert "config.yaml" in params["text"]


def test_a_store_that_cannot_be_used_is_one_line(tmp_path) -> None:
    (tmp_path / "text.db").write_text("this is no database")
    for uri, words in [
        ("sqlite:////proc/none/x.db", "cannot write"),
        (f"sqlite:///{tmp_path}/text.db", "not a SQLite"),
        (f"sqlite:///{tmp_path}/caf\udce9/x.db", "not UTF-8"),
    ]:
        with (
            pytest.raises(UserError, match=words) as raised,
            open_run(TrackingConfig(True, uri), tmp_path, RunInfo("a", "b")),
        ):
            pass
        assert "\n" not in str(raised.value)


def test_the_lightning_logger_writes_into_the_open_run(config, tmp_path) -> None:
    with open_run(config, folder(tmp_path), RunInfo("lightning", "r")) as run:
        logger = RunLogger(run)
        logger.log_metrics({"train/loss": 2.0, "epoch": 0.0}, step=7)
        logger.finalize("success")
        assert stored(config, run.run_id).info.status == "RUNNING"
    history = open_client(config.uri).get_metric_history(str(run.run_id), "train/loss")
    assert [(item.step, item.value) for item in history] == [(7, 2.0)]
    assert "epoch" not in stored(config, run.run_id).data.metrics


@pytest.fixture
def impatient(monkeypatch) -> None:
    """Waits of the store's users as short as the locks below."""
    monkeypatch.setattr(tracked_run, "WAIT", 0.05)
    monkeypatch.setattr(tracked_run, "PATIENCE", 0.3)
    monkeypatch.setattr(tracked_run, "_PAUSE", 0.0)


@contextmanager
def locked(uri: str) -> Iterator[None]:
    """The database as another process leaves it in the middle of a transaction."""
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")


@pytest.mark.parametrize("when", ["start", "middle", "start of a resumed run"])
def test_a_locked_store_costs_no_work_and_catches_up(config, tmp_path, impatient, caplog, when) -> None:
    run_dir, steps = folder(tmp_path), []
    if "resumed" in when:
        with open_run(config, run_dir, RunInfo("locked", "r")) as run:
            run.log_metrics({"loss": 2.0}, step=5)
        steps = [5]
    with ExitStack() as lock:
        if when != "middle":
            lock.enter_context(locked(config.uri))
        with open_run(config, run_dir, RunInfo("locked", "r", {"a": 1}), resume="resumed" in when) as run:
            if when == "middle":
                lock.enter_context(locked(config.uri))
            before = time.monotonic()
            for step in (10, 20, 30):
                run.log_metrics({"loss": 1 / step}, step=step)
            (run_dir / "a.txt").write_text("1")
            run.log_artifacts(run_dir)
            assert time.monotonic() - before < 19  # MLflow itself waits 20 s a call
            lock.close()
            run.log_metrics({"loss": 0.0})
    client = open_client(config.uri)
    found = stored(config, run.run_id)
    assert (found.info.status, found.data.params) == ("FINISHED", {"a": "1"})
    history = client.get_metric_history(found.info.run_id, "loss")
    assert sorted(point.step for point in history) == [*steps, 10, 20, 30, 30]
    assert "a.txt" in {item.path for item in client.list_artifacts(found.info.run_id)}
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "database is locked" in warning and "\n" not in warning


def test_a_sweep_on_a_locked_store_is_refused(config, tmp_path, impatient) -> None:
    with locked(config.uri), pytest.raises(UserError, match="the parent of this sweep .*locked.* add tracking=none"):
        tracked_run.open_parent(config, tmp_path / "sweep", "late", ["seed=1,2"])
