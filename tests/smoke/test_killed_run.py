"""A training run that is stopped or killed, and its continuation: exit codes, files, and one run in MLflow."""

import json
import signal
import time
from pathlib import Path

import pytest
from tests.processes import Forked, command_line
from tests.smoke.test_launch import MIX

from vlmscope.app import main
from vlmscope.tracking.client import open_client


def _reached(process: Forked, run: Path, pattern: str) -> None:
    """Wait until the running `process` has written a file."""
    end = time.monotonic() + 240
    while not list(run.glob(pattern)):
        assert time.monotonic() < end and process.poll() is None, process.said()
        time.sleep(0.005)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_signal_leaves_a_state_and_says_how_to_resume(tmp_path: Path, number: signal.Signals, code: int) -> None:
    run = tmp_path / "run"
    command = [*MIX, f"hydra.run.dir={run}", "tracking=none", "trainer.max_steps=100000"]
    process = command_line(*command)
    _reached(process, run, "data_states.json")
    while len(json.loads((run / "data_states.json").read_text())["states"]) < 2:  # some steps
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    assert process.wait() == code
    (line,) = [line for line in process.said()[1].splitlines() if "trainer.resume=true" in line]
    assert "Traceback" not in process.said()[1]
    (marker,) = run.glob("transcoder_checkpoint/step_*/complete.json")
    assert 0 < json.loads(marker.read_text())["steps_done"] < 100000
    assert not [path for path in run.rglob(".*") if ".tmp" in path.name]


def test_a_second_signal_ends_at_once() -> None:
    """The first is raised where the program is, which here takes its time to end; the second does not wait for that."""
    code = (
        "import sys, time, vlmscope.app as app\n"
        "def work(argv, failures):\n"
        "    try:\n        print('ready', flush=True); time.sleep(60)\n"
        "    finally:\n        print('saving', flush=True); time.sleep(60)\n"
        "app._run_hydra = work\n"
        "sys.exit(app.main(['task=list']))\n"
    )
    for first, second, expected in ((signal.SIGTERM, signal.SIGTERM, 143), (signal.SIGINT, signal.SIGTERM, 143)):
        process = Forked(code)
        for word, number in (("ready", first), ("saving", second)):
            end = time.monotonic() + 60
            while word not in process.said()[0]:
                assert time.monotonic() < end and process.poll() is None
                time.sleep(0.005)
            process.send_signal(number)
        began = time.monotonic()
        assert process.wait() == expected and time.monotonic() - began < 10


@pytest.mark.slow
def test_a_killed_run_goes_on_as_the_same_run_in_mlflow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, uri = tmp_path / "run", f"sqlite:///{tmp_path}/m.db"
    command = [*MIX, f"hydra.run.dir={run}", f"tracking.uri={uri}", "trainer.log_every=1", "trainer.checkpoint_every=3"]
    process = command_line(*command, "trainer.max_steps=40")
    end = time.monotonic() + 240
    while not list(run.glob("transcoder_checkpoint/step_*/complete.json")):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    run_id = (run / ".mlflow_run_id").read_text().strip()
    client = open_client(uri)
    assert client.get_run(run_id).info.status == "RUNNING"  # nothing could say otherwise
    before = client.get_metric_history(run_id, "train/fvu")
    reached = max(metric.step for metric in before)
    assert 3 <= reached < 40 and not (run / "metrics.json").exists()

    assert main([*command, "trainer.max_steps=40", "trainer.resume=true"]) == 0
    assert capsys.readouterr().out.splitlines() == [str(run)]
    assert (run / ".mlflow_run_id").read_text().strip() == run_id
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED" and found.data.tags["changed.trainer.resume"] == "True"
    assert len(client.search_runs([found.info.experiment_id])) == 1
    history = client.get_metric_history(run_id, "train/fvu")
    values = {metric.step: metric.value for metric in before}
    assert {metric.step for metric in history} == set(range(1, 41))
    # The steps since the last checkpoint were taken twice, to the same figures.
    again = [metric for metric in history if metric.step in values]
    assert all(metric.value == pytest.approx(values[metric.step], rel=1e-6) for metric in again)
    assert found.data.metrics["val/fvu"] > 0
