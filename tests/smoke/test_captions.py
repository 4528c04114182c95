"""Captions from the command line: one swap alone, and mistakes in one line."""

import json
from pathlib import Path

import pytest

from vlmscope.app import main

ALONE = ["experiment=captioning", "task.steps.caption_words=false", "tracking=none"]
ALONE += ["captions.train=10", "captions.test=3", "captions.validation=4"]
ALONE += ["captions.features=60", "captions.steps=1", "captions.others=0", "intervention.controls=1"]
ALONE += ["~captions.swaps.mars_to_earth", "~captions.swaps.circle_to_star", "captions.strengths=[0,2]"]


def test_red_shapes_are_called_blue_while_the_caption_is_generated(tmp_path: Path) -> None:
    assert main([*ALONE, f"hydra.run.dir={tmp_path / 'run'}"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    swap = "caption_steer/red_to_blue"
    assert metrics[f"{swap}/strength"] == 2.0
    assert metrics[f"{swap}/steered/right_words"] == 1.0
    assert metrics[f"{swap}/random_direction/right_words"] == 0.0
    assert metrics[f"{swap}/counterfactuals_own/log_likelihood"] > metrics[f"{swap}/originals/log_likelihood"] + 1
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["captions.swaps.red_to_blue=[shape_colour,red]"], "write [change, original, counterfactual]"),
        (["captions.swaps.red_to_blue=[shape_colour,red,pink]"], "no value 'pink'"),
        (["captions.gate=0"], "captions.gate=0"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str) -> None:
    assert main([*ALONE, *more, f"hydra.run.dir={tmp_path / 'run'}"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert said in error[0]
