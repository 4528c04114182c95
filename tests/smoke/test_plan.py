"""`task=plan` by the command line: any model, no weights, no network."""

import json
from pathlib import Path

import pytest

from vlmscope.app import main

ROOT = Path(__file__).resolve().parents[2]


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


def test_an_experiment_is_planned_as_its_card_says(tmp_path: Path) -> None:
    metrics = plan(tmp_path / "run", "experiment=paper_gemma3_4b")
    assert metrics["plan/parameters/transcoders"] == 34 * (2 * 163_840 * 2560 + 163_840 + 2560)
    # Two concepts under each of four questions: 8 cells of 20 pictures with 22 draws, baselines and five strengths.
    assert (metrics["plan/experiment/graphs"], metrics["plan/experiment/runs"]) == (8, 8 * 20 * (77 + 8 + 20))
    card = (ROOT / "experiments" / "paper_gemma3_4b.md").read_text(encoding="utf-8")
    for words in ("8 graphs", "16,800 runs", f"{metrics['plan/sweep/seconds']:.3g} s each"):
        assert words in card
    assert f"{metrics['plan/memory/trace'] / 1e9:.0f} GB" in card
