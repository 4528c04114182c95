"""`task=anatomy` on tiny models and on the user's own rows, and the line of `task=trace`."""

import json
from pathlib import Path

import pandas as pd
import pytest

from vlmscope.app import main
from vlmscope.models.tiny import tiny_image


def run(folder: Path, *arguments: str) -> dict[str, float]:
    assert main(["task=anatomy", "tracking=none", f"hydra.run.dir={folder}", *arguments]) == 0
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_vl"])
def test_a_tiny_model_is_asked_orrerys_questions(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["task.cases=3", "task.graphs=1", "task.parts=3", "attribution.max_nodes=40"]
    metrics = run(tmp_path, "model=tiny", f"model.family={family}", *small)
    table = pd.read_parquet(tmp_path / "anatomy.parquet")
    assert set(table.measure) == {"accuracy", "same", "kl", "influence"}
    assert "text_sum" in set(table.question) and ("name" in set(table.question)) == (family == "qwen3_vl")
    assert len(set(table.layers)) == 4  # all, and three parts
    assert metrics["anatomy/text_sum/prior/kl"] > 0
    assert "with the outputs of all MLPs averaged" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} >= {"report.html", "anatomy.parquet", "figures"}


def test_ones_own_rows_with_answers_and_without(tmp_path: Path) -> None:
    for n in range(9):
        tiny_image(n).save(tmp_path / f"{n}.png")
    lines = [{"image": f"{n}.png", "prompt": "what is this ?", "answer": "red" if n % 2 else "blue"} for n in range(9)]
    lines += [{"prompt": f"what is {word} ?", "question": "words"} for word in ("red", "the other one", "blue")]
    lines += [{"prompt": "red and blue ?"}, {"prompt": "one and two and the other ?"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(tmp_path / "run", "model=tiny", f"task.rows={tmp_path / 'rows.jsonl'}", "task.graphs=0")
    table = pd.read_parquet(tmp_path / "run" / "anatomy.parquet")
    assert list(dict.fromkeys(table.question)) == ["what is this ?", "words", "other"]
    assert set(table[table.measure == "accuracy"].question) == {"what is this ?"}
    kl = table[(table.measure == "kl") & (table.blocks == "mlp") & (table.positions == "all") & (table.layers == "all")]
    cases = kl.set_index(["question", "method"]).cases
    assert cases["what is this ?", "mean"] == 9 and cases["other", "mean"] == 2
    assert cases["words", "resample"] == 2 and ("other", "resample") not in cases  # no two of these align
    assert "influence" not in set(table.measure)


def test_settings_that_make_no_sense_are_refused(tmp_path: Path, refusal) -> None:
    (tmp_path / "one.csv").write_text("prompt,answer\nwhat is this ?,red\n")
    where = f"hydra.run.dir={tmp_path / 'run'}"
    assert "leave out prompt=" in refusal("task=anatomy", "prompt=what is this ?", where)
    assert "task.cases" in refusal("task=anatomy", "task.cases=1", where)
    assert "two or more" in refusal("task=anatomy", "model=tiny", f"task.rows={tmp_path / 'one.csv'}", where)


def test_a_trace_says_so_when_its_answer_hardly_needs_mlps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    from vlmscope.data.orrery.rendering import make_scene

    said, after = [], []
    for number, prompt in enumerate(["which shape is this ?", "how many shapes are there ?"] * 2):
        image = make_scene("test", "shapes", number // 2).image
        assert image is not None
        Image.fromarray(image).save(tmp_path / "x.png")
        asked = [f"image={tmp_path / 'x.png'}", f"prompt={prompt}", "task.figure=false", "attribution.max_nodes=100"]
        asked += ["model=orrery", "transcoder=orrery"]  # Orrery 2 was trained to need its MLPs
        assert main(["task=trace", *asked, "tracking=none", f"hydra.run.dir={tmp_path / str(number)}"]) == 0
        said.append("when the output of every MLP is its mean over 8 other pictures" in capsys.readouterr().out)
        metrics = json.loads((tmp_path / str(number) / "metrics.json").read_text())
        after.append(metrics["graph/answer_without_mlps"])
    assert all(after[n] > 0.4 for n, line in enumerate(said) if line)
    assert any(said[::2]) and not all(said)
