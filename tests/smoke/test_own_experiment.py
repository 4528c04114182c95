"""`docs/experiments.md` run as it is written: its files, its commands, its keys."""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from vlmscope.app import main
from vlmscope.circuits.config import MarkConfig, SettingConfig, TrialConfig
from vlmscope.data.orrery.dataset import colour_scenes, pictures
from vlmscope.report.marks import MARKS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "experiments.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def my(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The document's folder /my with its experiments and the pictures that they name."""
    folder = tmp_path_factory.mktemp("my")
    (folder / "conf" / "experiment").mkdir(parents=True)
    (folder / "pictures").mkdir()
    for text in blocks("yaml"):
        (name,) = re.findall(r"^name: (\w+)$", text, re.M)
        assert len(text.splitlines()) <= 30
        (folder / "conf" / "experiment" / f"{name}.yaml").write_text(text.replace("/my/", f"{folder}/"))
    for colour in ("red", "blue"):
        for split in ("train", "test"):
            for number, picture in enumerate(pictures(colour_scenes(colour, split, 3)), 1):
                Image.fromarray(picture).save(folder / "pictures" / f"{colour}_{split}_{number}.png")
    return folder


@pytest.fixture(scope="module")
def runs(my: Path) -> list[Path]:
    """Every command at the size of debug=fast, and their folders."""
    found = []
    for number, line in enumerate(line for block in blocks("bash") for line in block.splitlines()):
        words = [word.replace("/my/", f"{my}/") for word in shlex.split(line)]
        assert words[:2] == ["python", "run.py"], line
        given = [word.partition("=")[2] for word in words if word.startswith("hydra.run.dir=")]
        found.append(Path(given[0]) if given else my / f"run{number}")
        arguments = words[2:]
        if "task=report" not in words:
            arguments += ["tracking=none", *({"debug=fast"} - set(words))]
            arguments += [] if given else [f"hydra.run.dir={found[-1]}"]
        assert main(arguments) == 0, line
    return found


def test_every_command_does_what_it_says(my: Path, runs: list[Path]) -> None:
    assert [path.name for path in runs] == ["run0", "tried", "run", "run3", "settled", "run5", "red_blue"]
    for path in (my / "run", my / "run3", my / "red_blue"):
        assert (path / "report.html").stat().st_size > 100_000
    first, other, own = (pd.read_parquet(my / name / "trials.parquet") for name in ("run", "run3", "red_blue"))
    assert set(first.operation) == {"steer", "patch"}
    assert set(first.cases) == {"test", "third", "unrelated"}
    assert sorted(other[other.setting == "dose"].strength.unique()) == [1, 8]
    assert {case.split()[0] for case in other[other.cases == "test"].case} == {"moon"}
    assert set(own[own.cases == "test"].question) == {"colour"}
    assert set(own["mode"]) == {"free", "generate"}
    assert set(own[own.setting == "early"].layers) == {"0-3"}
    metrics = json.loads((my / "run" / "metrics.json").read_text())
    assert {"steer/main", "steer/main_ci_low", "patch/main_control", "steer/main/name", "steer/unrelated_kl"} <= set(
        metrics
    )
    assert 0 < json.loads((my / "red_blue" / "metrics.json").read_text())["base/colour/accuracy"] <= 1


def test_the_run_says_on_which_pictures_it_chose_and_tested(my: Path, runs: list[Path]) -> None:
    planets, own, settled = (json.loads((path / "pictures.json").read_text()) for path in (runs[2], runs[-1], runs[4]))
    assert set(planets["chosen"]) == {"contrast", "confirming graphs", "evidence"}
    assert set(planets["tested"]) == {"trials", "unrelated"}
    assert set(planets["chosen"]["confirming graphs"]) <= set(planets["chosen"]["contrast"])
    assert "jupiter train 0 0" in planets["chosen"]["contrast"] and "saturn test 0 0" in planets["tested"]["trials"]
    assert {"red_train 0", "blue_train 0"} <= set(own["chosen"]["contrast"])
    assert set(own["tested"]["trials"]) == {"red 0", "red 1", "red 2", "blue 0", "blue 1"}
    assert "jupiter val 0 0" in settled["chosen"]["strengths"]
    assert json.loads((runs[4] / "metrics.json").read_text())["settled/name"] in (1, 2, 3)
    for used in (planets, own, settled):
        keys = [{key for names in used[use].values() for key in names.values()} for use in ("chosen", "tested")]
        assert keys[0] and keys[1] and not keys[0] & keys[1]


def test_the_grammar_has_every_key() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    keys = [item.name for kind in (TrialConfig, SettingConfig, MarkConfig) for item in fields(kind)]
    assert [key for key in (*keys, *MARKS) if f"`{key}`" not in text and f"`{key}:" not in text] == []


def test_a_report_that_fails_costs_no_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ["experiment=planet_matrix", "debug=fast", "tracking=none", f"hydra.run.dir={run}"]
    with monkeypatch.context() as broken:
        broken.setattr("vlmscope.analyses.run_report.draw_report", lambda *_: 1 / 0)
        assert main(command) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: the report was not drawn (division by zero); its numbers are recorded;")
    assert json.loads((run / "metrics.json").read_text()) and (run / "trials.parquet").is_file()
    assert main(["task=report", f"task.run={run}"]) == 0
    assert (run / "report.html").is_file()
