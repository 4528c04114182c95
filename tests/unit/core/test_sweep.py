"""The table of a sweep: what its jobs set beside each other, repetitions, failures."""

import csv
from pathlib import Path

from vlmscope.config.callbacks import summarise
from vlmscope.config.store import job_settings
from vlmscope.core.artifacts import write_json, write_yaml
from vlmscope.core.runs import SweepJob, differing, read_jobs, write_table


def test_only_what_differs_names_a_job() -> None:
    found = [("trainer.max_steps=9", "k=4", "seed=0"), ("trainer.max_steps=9", "k=8", "seed=0")]
    assert differing(found) == [("k=4",), ("k=8",)]
    assert differing([("k=4",)]) == [("k=4",)]
    overrides = ["experiment=x", "+task.batch={a:1}", "tracking.uri=y", "data.path=/d", "hydra.sweep.dir=/s", "k=4"]
    assert job_settings(overrides) == ["task.batch={a:1}", "k=4"]


def test_seeds_are_repetitions() -> None:
    assert SweepJob(("k=4", "seed=3"), {}).group == SweepJob(("k=4", "seed=9"), {}).group == "k=4"
    assert SweepJob(("seed=3",), {}).group == "all"


def test_a_failed_job_is_a_row_and_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    write_json(tmp_path / "b" / "metrics.json", {"val/fvu": 0.5, "val/ce": None})
    jobs = read_jobs({tmp_path / "a": ["k=4"], tmp_path / "b": ["k=8"]})
    assert jobs == [SweepJob(("k=4",), None), SweepJob(("k=8",), {"val/fvu": 0.5})]
    write_table(jobs, tmp_path / "t.csv")
    rows = list(csv.reader((tmp_path / "t.csv").read_text().splitlines()))
    assert rows == [["settings", "status", "val/fvu"], ["k=4", "failed", ""], ["k=8", "finished", "0.5"]]


def test_jobs_stand_in_their_order_and_other_tasks_get_no_figure(tmp_path: Path) -> None:
    for number in (0, 2, 10):
        write_yaml(tmp_path / str(number) / "overrides.yaml", [f"seed={number}"])
        write_json(tmp_path / str(number) / "metrics.json", {"val/fvu": float(number)})
    (tmp_path / "figures").mkdir()
    assert summarise(tmp_path) == [tmp_path / "sweep.csv"]
    rows = list(csv.DictReader((tmp_path / "sweep.csv").read_text().splitlines()))
    assert [row["settings"] for row in rows] == ["seed=0", "seed=2", "seed=10"]
    assert summarise(tmp_path / "figures") == []
