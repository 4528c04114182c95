"""`docs/bring_your_own.md` run as it is written, on a tiny random model of another family saved to disk."""

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from vlmscope.app import main
from vlmscope.attribution.export import load_graph
from vlmscope.models.tiny import tiny_image, tiny_vlm
from vlmscope.transcoders.formats import load_set

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "bring_your_own.md"
# What keeps a run short; the commands are otherwise those of the document.
LIMITS = {
    "check": ["task.sources=2", "task.positions=2", "task.new_tokens=2", "task.targets=10"],
    "train_transcoders": ["trainer.max_steps=3", "task.tokens_per_batch=60", "transcoder.expansion_factor=4"],
    "evaluate": [],
    "trace": [],
    "steer": ["task.new_tokens=3", "task.controls=2"],
    "patch": ["task.new_tokens=3", "task.controls=2"],
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.M | re.S)


def commands() -> list[list[str]]:
    lines = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]
    return [words for words in lines if words[:2] != ["hf", "download"]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """The run folders of every task of the document, in order: on a model, the document's own data, and pictures."""
    folder = tmp_path_factory.mktemp("my")
    vlm = tiny_vlm("smolvlm", 3)
    vlm.model.save_pretrained(folder / "model")
    vlm.processor.save_pretrained(folder / "model")
    (folder / "data" / "pictures").mkdir(parents=True)
    for name, copies in (("train", 3), ("val", 1)):
        (folder / "data" / f"{name}.jsonl").write_text(blocks("json")[0] * copies, encoding="utf-8")
    for number, name in enumerate(("data/pictures/a.png", "data/pictures/b.png", "a.png", "b.png")):
        tiny_image(number).resize((40, 30)).save(folder / name)
    runs: dict[str, list[Path]] = {}
    for number, words in enumerate(commands()):
        assert words[:2] == ["python", "run.py"], words
        arguments = [word.replace("/my/", f"{folder}/") for word in words[2:]]
        task = arguments[0].removeprefix("task=")
        given = [word.partition("=")[2] for word in arguments if word.startswith("hydra.run.dir=")]
        run_dir = Path(given[0]) if given else folder / f"run{number}"
        arguments += [*LIMITS[task], "tracking=none", *([] if given else [f"hydra.run.dir={run_dir}"])]
        assert main(arguments) == 0, words
        runs.setdefault(task, []).append(run_dir)
    return runs


def metrics(run_dir: Path) -> dict[str, float]:
    return json.loads((run_dir / "metrics.json").read_text())


def test_the_document_shows_every_step(runs: dict[str, list[Path]]) -> None:
    assert {task: len(found) for task, found in runs.items()} == {
        "check": 1, "train_transcoders": 2, "evaluate": 1, "trace": 1, "steer": 2, "patch": 1,
    }  # fmt: skip
    assert metrics(runs["check"][0])["check/failed"] == 0
    downloads = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("hf ")]
    assert len(downloads) == 1 and "--revision" in downloads[0]


def test_transcoders_come_out_and_the_second_command_resumes(runs: dict[str, list[Path]]) -> None:
    first, again = runs["train_transcoders"]
    assert first == again
    found = load_set(first / "transcoders", n_layers=3, d_model=24)
    assert found[0].config.n_features == 96
    numbers = metrics(first)
    assert 0 < numbers["val/fvu"] < 2 and numbers["val/fvu_image"] > 0
    assert {"val/fvu_text", "val/l0", "val/dead_frac", "val/ce_delta", "layers/fvu/layer_02"} <= numbers.keys()
    assert "perf/tokens_per_s" not in numbers  # the last command found nothing left to train
    assert (first / "figures" / "fvu_by_layer.png").stat().st_size > 0
    evaluated = metrics(runs["evaluate"][0])  # of the saved set, in bfloat16
    assert {name: numbers[name] for name in evaluated} == pytest.approx(evaluated, rel=0.02, abs=0.01)
    assert {"val/fvu_token_text", "val/fvu_last", "val/ce_delta"} <= evaluated.keys()
    for name in re.findall(r"^\| `([^|]*)` \|", DOCUMENT.read_text(encoding="utf-8"), re.M):
        for key in name.replace("`", "").split(", "):
            assert key.replace("layer_07", "layer_02") in numbers, key


def test_a_graph_and_interventions_come_out_with_their_controls(runs: dict[str, list[Path]]) -> None:
    graph = load_graph(runs["trace"][0] / "graph.safetensors").graph
    assert graph.is_image.sum() > 0 and graph.residual.max() < 1e-3
    assert (runs["trace"][0] / "figures" / "graph.png").stat().st_size > 0
    ablated, named = runs["steer"]
    assert metrics(ablated)["steer/features"] == metrics(ablated)["steer/features_active"] == 20
    assert metrics(named)["steer/features"] == 2
    for name, run_dir, modes in (
        ("steer", ablated, ["free"]),
        ("steer", named, ["direct", "frozen_attention", "free"]),
        ("patch", runs["patch"][0], ["free"]),
    ):
        numbers, written = metrics(run_dir), json.loads((run_dir / f"{name}.json").read_text())
        assert list(written["modes"]) == modes and set(written["answer"]) == {"before", "after"}
        for mode in modes:
            assert numbers[f"{name}/{mode}/kl"] > 0 and numbers[f"{name}/{mode}/kl_control"] > 0
            assert 0 <= numbers[f"{name}/{mode}/top1_changed_control"] <= 1
            rows = written["modes"][mode]["next_token"]
            assert len(rows) >= 5 and all(0 <= row["before"] <= 1 for row in rows)
            assert any(row["before"] != row["after"] for row in rows)
        assert numbers[f"{name}/free/kl_random_direction"] > 0 and math.isfinite(sum(numbers.values()))
    assert yaml.safe_load((named / "config.yaml").read_text())["task"]["features"] == {"L1/7": 8.0, "L2/30": 0.0}


def test_the_python_of_the_document_runs(runs: dict[str, list[Path]]) -> None:
    folder = runs["trace"][0].parent
    names: dict[str, Any] = {}
    for code in blocks("python"):
        exec(code.replace("/my/", f"{folder}/"), names)
    assert [row.draws for row in names["result"].controls] == [5, 5]
    saved, written = folder / "trace_in_python", runs["trace"][0]
    ours, theirs = (load_graph(path / "graph.safetensors").graph.weights for path in (saved, written))
    assert np.array_equal(ours, theirs)
