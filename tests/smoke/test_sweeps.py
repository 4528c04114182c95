"""A sweep from the command line: its jobs, the table, the figure, and the parent in MLflow that has both."""

import csv
from pathlib import Path

import pytest

from vlmscope.app import main

SWEPT = ["transcoder.expansion_factor=1,2", "model=tiny", "model.family=llava", "data=folder", "task.max_tokens=60"]


def test_a_sweep_is_one_parent_with_a_table_and_a_figure(
    data: Path, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    where = [f"data.path={data}", f"hydra.sweep.dir={folder}", f"tracking.uri={store}", "trainer.threads=1"]
    assert main(["experiment=expansion_sweep", "debug=fast", *SWEPT, *where]) == 0
    out = capsys.readouterr()
    assert out.out.strip().splitlines() == [str(folder / "0"), str(folder / "1"), str(folder)]
    rows = list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))
    assert [row["status"] for row in rows] == ["finished", "finished"]
    assert [row["settings"] for row in rows] == [f"transcoder.expansion_factor={factor}" for factor in (1, 2)]
    assert all(float(row["val/fvu"]) > 0 and float(row["layers/fvu/layer_01"]) > 0 for row in rows)
    assert (folder / "figures" / "sweep.png").stat().st_size > 10_000

    from vlmscope.tracking.client import open_client

    client = open_client(store)
    experiment = client.get_experiment_by_name("expansion_sweep")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(runs) == 3 and parent.info.status == "FINISHED"
    assert {item.path for item in client.list_artifacts(parent.info.run_id)} == {"sweep.csv", "figures"}
