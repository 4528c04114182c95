"""`task=plan` by the command line: any model, no weights, no network."""

import json
from pathlib import Path

import pytest

from vlmscope.app import main


def plan(run_dir: Path, *arguments: str) -> dict[str, float]:
    assert main(["task=plan", *arguments, "tracking=none", f"hydra.run.dir={run_dir}"]) == 0
    return json.loads((run_dir / "metrics.json").read_text())


def test_gemma_4b_is_planned_without_weights_or_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = plan(tmp_path / "run", "model=gemma3_4b_it", "transcoder=arch", "transcoder.k=48")
    assert metrics["plan/parameters/total"] == 4_300_079_472
    assert metrics["plan/memory/weights_bfloat16"] == 2 * 4_300_079_472
    features, tokens = 16 * 2560, 256 + 64
    assert metrics["plan/parameters/transcoders"] == 34 * (2 * features * 2560 + features + 2560)
    assert metrics["plan/memory/patterns"] == 34 * 8 * tokens**2 * 2
    assert metrics["plan/graph/active_features"] == 34 * 48 * tokens
    assert metrics["plan/graph/rows"] == 7500
    out = capsys.readouterr().out
    for words in ("320 tokens, 256 of them soft", "vision", "416,866,032", "8.6 GB", "H100"):
        assert words in out
    assert "Tracing needs more than" not in out


def test_settings_change_the_plan(tmp_path: Path) -> None:
    base = plan(tmp_path / "a", "model=gemma3_1b_it")
    assert base["plan/parameters/vision"] == 0
    longer = plan(
        tmp_path / "b", "model=gemma3_1b_it", "task.tokens=128", "transcoder=random", "attribution.dtype=model"
    )
    assert longer["plan/memory/patterns"] == 4 * base["plan/memory/patterns"]
    assert (base["plan/memory/copies"] > 0, longer["plan/memory/copies"]) == (True, 0)
    assert longer["plan/graph/active_features"] == 26 * 128 * 8
    assert plan(tmp_path / "d", "model=orrery2")["plan/parameters/transcoders"] == 8 * (2 * 2048 * 128 + 2048 + 128)
    slow = plan(tmp_path / "c", "model=gemma3_1b_it", "task.device=cpu")
    assert slow["plan/sweep/seconds"] > 100 * base["plan/sweep/seconds"]


def test_what_does_not_fit_names_what_to_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = plan(tmp_path / "trace", "model=gemma3_27b_it", "task.device=a100")
    assert metrics["plan/memory/trace"] > 80e9
    assert "Tracing needs more than the 80.0 GB of a100" in capsys.readouterr().out
