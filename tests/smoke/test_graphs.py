"""Many rows, comparisons and aggregates from the command line, on Orrery."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from PIL import Image

import vlmscope
from vlmscope.app import main
from vlmscope.attribution.export import load_graph, load_merged
from vlmscope.core.graph import AggregateGraph, GraphComparison
from vlmscope.data.orrery.dataset import concept_scenes

SCHEMA = Path(vlmscope.__file__).parent / "attribution" / "schema" / "neuronpedia-graph.schema.json"
ROOT = Path(__file__).parents[2]
QUESTION = "what planet is this ?"
QUICK = ["tracking=none", "attribution.max_nodes=150", "trainer.threads=1"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for planet in ("mars", "earth"):
        for number, scene in enumerate(concept_scenes(planet, "test", 2, seed=99)):
            assert scene.image is not None
            Image.fromarray(scene.image).save(folder / f"{planet}_{number}.png")
    lines = [{"id": path.stem, "image": path.name, "prompt": QUESTION} for path in sorted(folder.glob("*.png"))] + [
        {"id": "words", "prompt": "what colour is mars ?"}
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def rows_command(pictures: Path, run: Path, *more: str) -> list[str]:
    return [
        "task=trace",
        f"task.rows={pictures / 'rows.jsonl'}",
        f"hydra.run.dir={run}",
        "task.figure=false",
        *QUICK,
        *more,
    ]


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows") / "run"
    assert main(rows_command(pictures, folder)) == 0
    return folder


def test_every_row_has_its_folder_and_metrics_are_means(run: Path) -> None:
    index = [json.loads(line) for line in (run / "graphs.jsonl").read_text().splitlines()]
    assert [line["id"] for line in index] == ["earth_0", "earth_1", "mars_0", "mars_1", "words"]
    metrics = json.loads((run / "metrics.json").read_text())
    assert (metrics["rows/traced"], metrics["rows/resumed"], metrics["rows/skipped"]) == (5, 0, 0)
    for name in ("graph/nodes", "graph/replacement_score"):
        assert metrics[name] == pytest.approx(np.mean([line["metrics"][name] for line in index]))
    # Text alone has no such figure, so the mean is over the others.
    seen = [
        line["metrics"]["graph/answer_sees_image"] for line in index if "graph/answer_sees_image" in line["metrics"]
    ]
    assert len(seen) == 4 and metrics["graph/answer_sees_image"] == np.mean(seen)
    for line in index:
        body = json.loads((run / line["folder"] / "graph.json").read_text())
        assert body["metadata"]["slug"] == line["id"]
        assert load_graph(run / line["folder"] / "graph.safetensors").graph.prompt == line["prompt"]


def test_a_run_goes_on_where_it_was_cut_off(pictures: Path, run: Path, tmp_path: Path) -> None:
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
    assert main(rows_command(pictures, second)) == 2  # not without being asked to
    assert main(rows_command(pictures, second, "trainer.resume=true")) == 0
    assert (second / "rows" / "mars_0" / "graph.safetensors").stat().st_mtime_ns == kept
    assert not list((second / "rows").glob(".*"))
    metrics = json.loads((second / "metrics.json").read_text())
    assert (metrics["rows/traced"], metrics["rows/resumed"]) == (5, 3)
    ids = [[json.loads(line)["id"] for line in (r / "graphs.jsonl").read_text().splitlines()] for r in (run, second)]
    assert ids[0] == ids[1]
    again = load_graph(second / "rows" / "words" / "graph.safetensors").graph
    assert np.array_equal(again.weights, load_graph(run / "rows" / "words" / "graph.safetensors").graph.weights)


def test_other_settings_do_not_go_on_with_the_folders(
    pictures: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*rows_command(pictures, run, "trainer.resume=true"), "attribution.max_nodes=9"]) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_goes_on(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    program = [sys.executable, str(ROOT / "run.py"), *rows_command(pictures, folder)]
    process = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 240
    while not list(folder.glob("rows/*/row.json")):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "metrics.json").exists()
    assert main(rows_command(pictures, folder, "trainer.resume=true")) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["rows/traced"] == 5
    assert metrics["rows/resumed"] >= 1
    assert len((folder / "graphs.jsonl").read_text().splitlines()) == 5


def test_bad_rows_stop_all_before_work_or_are_skipped_and_counted(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"id": "good", "image": str(pictures / "mars_0.png"), "prompt": QUESTION}
    bad = [
        {"image": "nowhere.png", "prompt": QUESTION},
        {"prompt": "what zebra is this ?"},
        {"prompt": " ".join(["what"] * 600)},
    ]
    file = tmp_path / "rows.jsonl"
    command = ["task=trace", f"task.rows={file}", "task.figure=false", *QUICK]
    for number, (row, words) in enumerate(zip(bad, ("no such file", "zebra", "too long"), strict=True)):
        file.write_text("\n".join(map(json.dumps, [good, row])))
        assert main([*command, f"hydra.run.dir={tmp_path / str(number)}"]) == 2
        (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
        assert words in line and "rows.jsonl row 2: " in line
        assert not list((tmp_path / str(number) / "rows").glob("*"))
    file.write_text("\n".join(map(json.dumps, [good, *bad])))
    assert main([*command, f"hydra.run.dir={tmp_path / 'r'}", "task.skip_bad=true"]) == 0
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert (metrics["rows/traced"], metrics["rows/skipped"]) == (1, 3)


def test_two_runs_are_compared(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "c"
    sides = [f"task.first={run / 'rows' / 'mars_0'}", f"task.second={run / 'rows' / 'earth_0' / 'graph.safetensors'}"]
    assert main(["task=compare", *sides, f"hydra.run.dir={folder}", "tracking=none"]) == 0
    assert "GraphComparison of 'mars_0' and 'earth_0', nodes matched by position" in capsys.readouterr().out
    found = load_merged(folder / "comparison.safetensors")
    assert isinstance(found, GraphComparison)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["compare/nodes_both"] == found.kept.all(0).sum() > 10
    body = json.loads((folder / "graph.json").read_text())
    jsonschema.validate(body, json.loads(SCHEMA.read_text()))
    assert len(body["links"]) == len(found.sources)
    for name in ("difference", "shares"):
        assert Image.open(folder / "figures" / f"{name}.png").width > 900


def test_a_question_as_text_and_as_picture_is_compared_on_the_spot(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    command = ["task=compare", f"image={pictures / 'mars_0.png'}", "prompt=what colour is this planet ?"]
    more = ["task.second_prompt=what colour is mars ?", "task.second_image=[]", "task.names=[picture,text]"]
    assert main([*command, *more, f"hydra.run.dir={folder}", "task.figure=false", *QUICK]) == 0
    found = load_merged(folder / "comparison.safetensors")
    assert found.match == "role"
    assert found.prompts == ["what colour is this planet ?", "what colour is mars ?"]
    assert (folder / "first" / "graph.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to compare"),
        (["prompt=what colour is mars ?"], "nothing to compare with"),
        (["task.first=/no/run", "task.second=/no/run"], "/no/run is neither"),
        (["prompt=what colour is mars ?", "task.second_prompt=what ?", "task.names=[a]"], "two different names"),
        (["task.second=a", "prompt=a", "task.second_prompt=b"], "give one of them"),
    ],
)
def test_mistakes_of_a_comparison_are_one_line(
    tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["task=compare", "tracking=none", f"hydra.run.dir={tmp_path / 'r'}", *arguments]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert words in line


def test_a_run_of_rows_is_aggregated(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    assert main(["task=aggregate", f"task.runs=[{run}]", f"hydra.run.dir={folder}", "tracking=none"]) == 0
    found = load_merged(folder / "aggregate.safetensors")
    assert isinstance(found, AggregateGraph)
    assert found.n_graphs == 5
    assert json.loads((folder / "metrics.json").read_text())["aggregate/nodes_in_all"] == (found.count == 5).sum() > 0
    jsonschema.validate(json.loads((folder / "graph.json").read_text()), json.loads(SCHEMA.read_text()))
    assert (folder / "figures" / "aggregate.png").is_file()
    assert main(["task=aggregate", f"hydra.run.dir={tmp_path / 'b'}", "tracking=none"]) == 2


def test_the_python_calls_show_small_tables(run: Path, pictures: Path) -> None:
    scope = vlmscope.load(check=False)
    traced = vlmscope.trace(scope, QUESTION, [pictures / "mars_0.png"], max_nodes=150)
    assert "mars  p = " in repr(traced) and "completeness score" in repr(traced)
    assert repr(traced).count("\n") < 14
    assert traced._repr_html_().startswith("<table>")
    same = vlmscope.compare(traced, run / "rows" / "mars_0", names=("call", "command"))
    assert same.summary().edge_jaccard == pytest.approx(1.0)
    both = vlmscope.aggregate([run / "rows" / "mars_1", traced.pruned])
    assert both.n_graphs == 2
