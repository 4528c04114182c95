"""`task=plan` by the command line: any model, no weights, no network."""

import json
from pathlib import Path

import pytest

from vlmscope.app import main
from vlmscope.core.hub import gb

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


PAPER = ("model=gemma3_4b_it", "transcoder=arch", "transcoder.k=48", "task.tokens_per_batch=8192")


def test_training_of_gemma_4b_is_planned_by_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ("task.training.tokens=362000000", "task.training.images=216000", "task.steps_per_batch=1")
    metrics = plan(tmp_path / "run", *PAPER, *data)
    layer = 2 * 40960 * 2560 + 40960 + 2560
    assert metrics["plan/training/memory/weights"] == 5 * layer * 4
    assert metrics["plan/training/memory/model"] == metrics["plan/memory/weights_bfloat16"]
    assert metrics["plan/training/peak/rank_00"] == metrics["plan/training/peak/rank_01"]  # 5 layers each
    assert metrics["plan/training/peak/rank_01"] > metrics["plan/training/peak/rank_02"]
    assert metrics["plan/training/traffic"] == 1024 * (29 * 2 * 2560 * 2 + 7)
    assert metrics["plan/training/steps"] == 44190
    seconds = sum(value for key, value in metrics.items() if key.startswith("plan/training/seconds/"))
    assert metrics["plan/training/gpu_hours"] == pytest.approx(8 * 44190 * seconds / 3600)
    out = capsys.readouterr().out
    assert [metrics[f"plan/training/layers/rank_{rank:02d}"] for rank in (0, 1, 2, 7)] == [5, 5, 4, 4]
    assert "encoder" in out and "bound by arithmetic" in out
    assert "Training needs more" not in out


def test_what_does_not_fit_names_what_to_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = plan(tmp_path / "trace", "model=gemma3_27b_it", "task.device=a100")
    assert metrics["plan/memory/trace"] > 80e9
    assert "Tracing needs more than the 80.0 GB of a100" in capsys.readouterr().out
    plan(tmp_path / "train", *PAPER[:-1], "transcoder.expansion_factor=32", "task.tokens_per_batch=65536")
    out = capsys.readouterr().out
    assert "Training needs more than the 80.0 GB of h100: choose a smaller task.tokens_per_batch" in out


def test_training_in_half_precision(tmp_path: Path) -> None:
    base, half = plan(tmp_path / "a", *PAPER), plan(tmp_path / "b", *PAPER, "trainer.precision=bf16-mixed")
    assert half["plan/training/seconds/encoder"] < base["plan/training/seconds/encoder"] / 5
    assert half["plan/training/memory/weights"] == base["plan/training/memory/weights"]  # float32 as ever


def test_the_recipes_cost_what_their_documents_say(tmp_path: Path) -> None:
    documents = [ROOT / "docs/recipes.md", *(ROOT / "experiments").glob("gemma3_4b_transcoders*.md")]
    for name, gpus in (("gemma3_4b_transcoders", 8), ("gemma3_4b_transcoders_1gpu", 1)):
        metrics = plan(tmp_path / name, f"experiment={name}", f"task.training.gpus={gpus}")
        hours, peak = f"{metrics['plan/training/hours']:.3g}", gb(metrics["plan/training/peak/rank_00"])
        for document in documents:
            if document.stem in ("recipes", name):
                text = document.read_text(encoding="utf-8")
                assert hours in text and peak in text and gb(metrics["plan/training/disk/set"]) in text, document
