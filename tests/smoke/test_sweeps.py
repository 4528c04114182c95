"""Sweeping experiments end to end with tiny limits: their jobs, the table, the figure, and the parent that has both."""

import csv
from pathlib import Path

import pytest
from tests.smoke.test_experiments import PICTURES, SWEEPS

from vlmscope.app import main
from vlmscope.data.orrery.dataset import OrreryDataConfig, build
from vlmscope.data.orrery.scene import KINDS

TINY = ["trainer.threads=1", "transcoder.k=4", "task.val_scenes=2", "task.pool_batches=1", "trainer.max_steps=2"]
SMALL = [f"task.batch={{{PICTURES},text:1}}", *TINY]
# What each sweeps, in two jobs; a modality is what says how many scenes a batch has.
JOBS = {
    "cross_layer": ["transcoder.cross_layer=False,True", "transcoder.expansion_factor=1", *SMALL],
    "expansion_sweep": ["transcoder.expansion_factor=1,2", *SMALL],
    "modality_mix": ["modality=image", "seed=0,1", "transcoder.expansion_factor=1", *TINY],
    "sparsity_frontier": ["transcoder.activation=topk,jumprelu", "transcoder.expansion_factor=1", *SMALL],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    counts = dict.fromkeys(KINDS, 24)
    build(OrreryDataConfig(folder=str(folder), train=counts, val=counts, test=counts))
    return folder


def test_every_sweep_has_its_smoke_test() -> None:
    assert set(JOBS) == SWEEPS


@pytest.mark.parametrize("name", sorted(JOBS))
def test_a_sweep_is_one_parent_with_a_table_and_a_figure(
    name: str, data: Path, store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sweep"
    where = [f"data.path={data}", f"hydra.sweep.dir={folder}", f"tracking.uri={store}"]
    assert main([f"experiment={name}", *JOBS[name], *where]) == 0
    out = capsys.readouterr()
    assert out.out.strip().splitlines() == [str(folder / "0"), str(folder / "1"), str(folder)]
    rows = list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))
    assert [row["status"] for row in rows] == ["finished", "finished"]
    swept = next(setting for setting in JOBS[name] if setting.partition("=")[2].count(",") == 1 and "{" not in setting)
    key, _, values = swept.partition("=")
    assert [row["settings"] for row in rows] == [f"{key}={value}" for value in values.split(",")]
    assert all(float(row["val/fvu"]) > 0 and float(row["layers/fvu/layer_07"]) > 0 for row in rows)
    assert (folder / "figures" / "sweep.png").stat().st_size > 10_000

    from vlmscope.tracking.client import open_client

    client = open_client(store)
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert len(runs) == 3 and parent.info.status == "FINISHED"
    assert {item.path for item in client.list_artifacts(parent.info.run_id)} == {"sweep.csv", "figures"}
