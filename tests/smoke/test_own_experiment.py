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


def blocks() -> list[tuple[str, str, str]]:
    """Language, text and the words before it, of every block of code that is written or run."""
    text = DOCUMENT.read_text(encoding="utf-8")
    found = re.finditer(r"^```(yaml|python|bash)\n(.*?)^```", text, re.M | re.S)
    return [(block[1], block[2], text[: block.start()]) for block in found]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The document followed from top to bottom: its files written, its commands run at the size of debug=fast."""
    my = tmp_path_factory.mktemp("my")
    for colour in ("red", "blue"):
        (my / colour).mkdir()
        for number, picture in enumerate(pictures(colour_scenes(colour, "test", 6)), 1):
            Image.fromarray(picture).save(my / colour / f"{number}.png")
    found: dict[str, Path] = {"my": my}
    for language, text, before in blocks():
        if language != "bash":
            name = re.findall(r"`/my/([\w.]+)`", before)[-1]
            assert name.endswith({"yaml": ".yaml", "python": ".py"}[language]) and len(text.splitlines()) <= 30
            (my / name).write_text(text)
            continue
        for line in text.splitlines():
            words = [word.replace("/my/", f"{my}/") for word in shlex.split(line)]
            assert words[:2] == ["python", "run.py"], line
            given = [word.partition("=")[2] for word in words if word.startswith("hydra.run.dir=")]
            folder = Path(given[0]) if given else my / f"run{len(found)}"
            arguments = words[2:]
            if "task=report" not in words:
                arguments += ["tracking=none", *({"debug=fast"} - set(words))]
                arguments += [] if given else [f"hydra.run.dir={folder}"]
            assert main(arguments) == 0, line
            found[folder.name] = folder
    return found


def table(runs: dict[str, Path], name: str) -> pd.DataFrame:
    return pd.read_parquet(runs[name] / "trials.parquet")


def metrics(runs: dict[str, Path], name: str) -> dict[str, float]:
    return json.loads((runs[name] / "metrics.json").read_text())


def test_every_command_does_what_it_says(runs: dict[str, Path]) -> None:
    assert list(runs) == ["my", "run1", "tried", "run", "run4", "settled", "run6", "red_blue", "sentence", "measured"]
    for name in ("tried", "run", "run4", "red_blue", "measured"):
        assert (runs[name] / "report.html").stat().st_size > 100_000
    assert {case.split()[0] for case in table(runs, "tried").query("cases == 'test'").case} == {"jupiter"}
    first, other, own = (table(runs, name) for name in ("run", "run4", "red_blue"))
    assert set(first.operation) == {"steer", "patch"}
    assert set(first.cases) == {"test", "third", "unrelated"}
    assert sorted(other[other.setting == "dose"].strength.unique()) == [1, 8]
    assert {case.split()[0] for case in other[other.cases == "test"].case} == {"moon"}
    assert set(own[own.cases == "test"].question) == {"colour"}
    assert set(own["mode"]) == {"free", "generate"}
    assert set(own[own.setting == "early"].layers) == {"0-3"}
    names = {"steer/main", "steer/main_ci_low", "steer/main/name", "steer/unrelated_kl"}
    assert names <= set(metrics(runs, "run")) and {"", "matched"} <= set(first.control)
    assert 0 < metrics(runs, "red_blue")["base/colour/accuracy"] <= 1


def test_a_sentence_is_an_answer(runs: dict[str, Path]) -> None:
    rows = table(runs, "sentence").query("control == '' and setting == 'sentence'")
    earth = "earth , a blue planet covered with water"
    assert (rows.hit == rows.text.str.startswith(earth)).all() and len(rows)
    assert (rows.changed == ~rows.text.str.startswith("mars , a red planet covered with dust")).all()
    assert metrics(runs, "sentence")["base/describe/accuracy"] > 0.5


def test_a_measure_of_ones_own_is_run_and_shown(runs: dict[str, Path]) -> None:
    assert "chances/mean" not in metrics(runs, "red_blue")  # before its Python was written
    rows = table(runs, "measured").query("operation == 'steer' and setting == 'main' and control == ''")
    assert metrics(runs, "measured")["chances/mean"] == pytest.approx(rows.p_target.mean())
    page = (runs["measured"] / "report.html").read_text()
    assert all(
        words in page for words in ("Probability of the other answer", "How probable does the other answer become?")
    )
    assert f"experiment={runs['my']}/chances.yaml" in page


def test_the_run_says_on_which_pictures_it_chose_and_tested(runs: dict[str, Path]) -> None:
    names = ("run", "red_blue", "settled")
    planets, own, settled = (json.loads((runs[name] / "pictures.json").read_text()) for name in names)
    assert set(planets["chosen"]) == {"contrast", "confirming graphs", "evidence"}
    assert set(planets["tested"]) == {"trials", "unrelated"}
    assert set(planets["chosen"]["confirming graphs"]) <= set(planets["chosen"]["contrast"])
    assert "jupiter train 0 0" in planets["chosen"]["contrast"] and "saturn test 0 0" in planets["tested"]["trials"]
    assert {"red_train 0", "blue_train 0"} <= set(own["chosen"]["contrast"])
    assert set(own["tested"]["trials"]) == {f"{colour} {number}" for colour in ("red", "blue") for number in range(3)}
    assert "jupiter val 0 0" in settled["chosen"]["strengths"]
    assert metrics(runs, "settled")["settled/name"] in (1, 2, 3)
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
        broken.setattr("vlmscope.tasks.experiment.draw_report", lambda *_: 1 / 0)
        assert main(command) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: the report was not drawn (division by zero); its numbers are recorded;")
    assert json.loads((run / "metrics.json").read_text()) and (run / "trials.parquet").is_file()
    assert main(["task=report", f"task.run={run}"]) == 0
    assert (run / "report.html").is_file()
