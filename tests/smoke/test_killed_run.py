"""`kill -9` of a training run and its continuation: one run in MLflow, whose curves go on."""

import signal
import time
from pathlib import Path

import pytest
from tests.processes import command_line
from tests.smoke.test_launch import MIX

from vlmscope.app import main
from vlmscope.tracking.client import open_client


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
