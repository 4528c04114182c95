"""`benchmarks/gpu.py`: the whole path at toy sizes on the CPU, and what stops a part."""

import json
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    return gpu


def test_every_part_runs_on_a_cpu_and_holds(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert gpu.main(["--tiny", "--device", "cpu", "--out", str(tmp_path / "gpu.json")]) == 0
    record = json.loads((tmp_path / "gpu.json").read_text())
    rows = record["rows"]
    assert list(dict.fromkeys(row["part"] for row in rows)) == [part.__name__ for part in gpu.PARTS]
    measured = {row["part"] for row in rows if row["value"] is not None}
    assert measured == {part.__name__ for part in gpu.PARTS}
    (identities,) = [row for row in rows if row["part"] == "identities"]
    assert identities["holds"] and 0 < identities["value"] < 1e-9
    graph = {row["what"]: row for row in rows if row["part"] == "graph"}
    assert graph["replayed logits against Hugging Face's"]["holds"]
    assert next(row for what, row in graph.items() if what.startswith("resident graph"))["expected"] > 0
    assert capsys.readouterr().out.count("\n| ") == len(rows) + 2
    assert record["about"]["torch"] == torch.__version__


def test_a_part_without_time_memory_or_success_stops_no_other(gpu: ModuleType, monkeypatch, tmp_path: Path) -> None:
    def slow(_bench):
        yield gpu.Row("first", 1.0)
        time.sleep(30)

    def large(_bench):
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    def broken(_bench):
        raise ValueError("no such kernel")
        yield

    def inapplicable(_bench):
        raise gpu.Skipped("there is one device")
        yield

    monkeypatch.setattr(gpu, "PARTS", {slow: 0.004, large: 0.1, broken: 0.1, inapplicable: 0.1})
    assert gpu.main(["--tiny", "--device", "cpu", "--out", str(tmp_path / "gpu.json")]) == 1
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert [(row["part"], row["value"], row["holds"]) for row in rows] == [
        ("slow", 1.0, None), ("slow", None, None), ("large", None, None), ("broken", None, False),
        ("inapplicable", None, None),
    ]  # fmt: skip
    assert "memory" in rows[2]["note"] and "no such kernel" in rows[3]["note"] and "one device" in rows[4]["note"]


def test_a_cpu_is_refused_at_full_size(gpu: ModuleType, capsys: pytest.CaptureFixture) -> None:
    assert gpu.main(["--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("error: ") and not capsys.readouterr().out
