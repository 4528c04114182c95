"""The table of a sweep: what its jobs set beside each other, repetitions, failures."""

import csv
from pathlib import Path

from vlmscope.config.callbacks import printed
from vlmscope.config.catalog import job_settings
from vlmscope.core.artifacts import write_json
from vlmscope.core.results import SweepJob, read_jobs, write_table


def test_a_job_is_named_by_what_differs_and_a_failed_one_is_a_row(tmp_path: Path) -> None:
    overrides = ["experiment=x", "+task.batch={a:1}", "tracking.uri=y", "data.path=/d", "hydra.sweep.dir=/s", "k=4"]
    assert job_settings(overrides) == ["task.batch={a:1}", "k=4"]
    (tmp_path / "b").mkdir()
    write_json(tmp_path / "b" / "metrics.json", {"val/fvu": 0.5, "val/ce": None})
    jobs = read_jobs({tmp_path / "a": ["steps=9", "k=4"], tmp_path / "b": ["steps=9", "k=8", "seed=1"]})
    assert jobs == [SweepJob(("k=4",), None), SweepJob(("k=8", "seed=1"), {"val/fvu": 0.5})]
    assert [job.group for job in jobs] == ["k=4", "k=8"]  # seeds are repetitions
    write_table(jobs, tmp_path / "t.csv")
    rows = list(csv.reader((tmp_path / "t.csv").read_text().splitlines()))
    assert rows == [["k", "seed", "status", "val/fvu"], ["4", "", "failed", ""], ["8", "1", "finished", "0.5"]]
    assert [line.split() for line in printed(jobs).splitlines()] == [
        ["k", "seed", "status", "val/fvu"], ["4", "failed"], ["8", "1", "finished", "0.5"],
    ]  # fmt: skip
