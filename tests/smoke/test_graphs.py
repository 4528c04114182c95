"""Many rows and comparisons from the command line, on Orrery."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vlmscope.app import main
from vlmscope.attribution.export import load_graph
from vlmscope.data.orrery.dataset import concept_scenes

QUESTION = "what planet is this ?"
QUICK = ("tracking=none", "attribution.max_nodes=150", "trainer.threads=1", "task.figure=false")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for planet in ("mars", "earth"):
        for number, scene in enumerate(concept_scenes(planet, "test", 2, seed=99)):
            assert scene.image is not None
            Image.fromarray(scene.image).save(folder / f"{planet}_{number}.png")
    lines = [{"id": path.stem, "image": path.name, "prompt": QUESTION} for path in sorted(folder.glob("*.png"))]
    lines.append({"id": "words", "prompt": "what colour is mars ?"})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def rows_command(pictures: Path, run: Path, *more: str) -> list[str]:
    return ["task=trace", f"task.rows={pictures / 'rows.jsonl'}", f"hydra.run.dir={run}", *QUICK, *more]


def read(path: Path) -> Any:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows") / "run"
    assert main(rows_command(pictures, folder)) == 0
    return folder


def test_every_row_has_its_folder_and_metrics_are_means(run: Path) -> None:
    index, metrics = read(run / "graphs.jsonl"), read(run / "metrics.json")
    assert [line["id"] for line in index] == ["earth_0", "earth_1", "mars_0", "mars_1", "words"]
    assert (metrics["rows/traced"], metrics["rows/resumed"], metrics["rows/skipped"]) == (5, 0, 0)
    # Text alone says nothing of the picture, so that mean is over the others.
    for name, count in {"graph/nodes": 5, "graph/replacement_score": 5, "graph/answer_sees_image": 4}.items():
        values = [line["metrics"][name] for line in index if name in line["metrics"]]
        assert len(values) == count and metrics[name] == pytest.approx(np.mean(values))
    scores = [line["metrics"]["graph/completeness_score_no_bias"] for line in index]
    shown = [metrics[f"graph/completeness_score_no_bias_{name}"] for name in ("q25", "median", "q75")]
    assert shown == pytest.approx(np.quantile(scores, [0.25, 0.5, 0.75])) and metrics["graph/graphs"] == 5
    assert shown[0] < shown[1] < shown[2] < 1
    for line in index:
        shares = (line["metrics"][f"graph/{name}_share"] for name in ("image", "text", "error", "bias", "left_out"))
        assert sum(shares) == pytest.approx(1)
        assert read(run / line["folder"] / "graph.json")["metadata"]["slug"] == line["id"]
        assert load_graph(run / line["folder"] / "graph.safetensors").graph.prompt == line["prompt"]


def test_a_run_goes_on_where_it_was_cut_off(
    pictures: Path, run: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    second = tmp_path / "again"
    assert main(rows_command(pictures, second)) == 0
    kept = (second / "rows" / "mars_0" / "graph.safetensors").stat().st_mtime_ns
    for name in ("earth_1", "words"):
        for file in sorted((second / "rows" / name).glob("**/*"), reverse=True):
            file.unlink()
        (second / "rows" / name).rmdir()
    half = second / "rows" / ".earth_1.99999999.0123abcd.tmp"
    half.mkdir()
    (half / "graph.json").write_text("{")
    text = (second / "graphs.jsonl").read_text()
    (second / "graphs.jsonl").write_text(text[: len(text) - 40])
    assert "holds rows already" in refusal(*rows_command(pictures, second))
    resume = rows_command(pictures, second, "trainer.resume=true")
    assert "other settings" in refusal(*resume, "attribution.max_nodes=9")
    assert main(resume) == 0
    assert (second / "rows" / "mars_0" / "graph.safetensors").stat().st_mtime_ns == kept
    assert not list((second / "rows").glob(".*"))
    metrics = read(second / "metrics.json")
    assert (metrics["rows/traced"], metrics["rows/resumed"]) == (5, 3)
    first_ids, second_ids = ([line["id"] for line in read(one / "graphs.jsonl")] for one in (run, second))
    assert first_ids == second_ids
    again, before = (load_graph(one / "rows" / "words" / "graph.safetensors").graph for one in (second, run))
    assert np.array_equal(again.weights, before.weights)


def test_bad_rows_stop_all_before_work_or_are_skipped_and_counted(
    pictures: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    good = {"id": "good", "image": str(pictures / "mars_0.png"), "prompt": QUESTION}
    bad = {
        "no such file": {"image": "nowhere.png", "prompt": QUESTION},
        "zebra": {"prompt": "what zebra is this ?"},
        "too long": {"prompt": " ".join(["what"] * 600)},
    }
    file = tmp_path / "rows.jsonl"
    command = ["task=trace", f"task.rows={file}", *QUICK]
    for words, row in bad.items():
        file.write_text("\n".join(map(json.dumps, [good, row])))
        line = refusal(*command, f"hydra.run.dir={tmp_path / words}")
        assert words in line and "rows.jsonl row 2: " in line
        assert not list((tmp_path / words / "rows").glob("*"))
    file.write_text("\n".join(map(json.dumps, [good, *bad.values()])))
    assert main([*command, f"hydra.run.dir={tmp_path / 'r'}", "task.skip_bad=true"]) == 0
    metrics = read(tmp_path / "r" / "metrics.json")
    assert (metrics["rows/traced"], metrics["rows/skipped"]) == (1, 3)


def test_two_runs_are_compared(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = [f"task.first={run / 'rows' / 'mars_0'}", f"task.second={run / 'rows' / 'earth_0' / 'graph.safetensors'}"]
    assert main(["task=compare", *sides, f"hydra.run.dir={tmp_path}", "tracking=none"]) == 0
    assert "GraphComparison of 'mars_0' and 'earth_0', nodes matched by position" in capsys.readouterr().out
    kept_by = pd.read_csv(tmp_path / "nodes.csv").kept_by
    assert read(tmp_path / "metrics.json")["compare/nodes_both"] == (kept_by == "both").sum() > 10
    for name in ("difference", "shares"):
        assert Image.open(tmp_path / "figures" / f"{name}.png").width > 900
