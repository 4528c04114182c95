"""A finished run's report is drawn again from its folder; what it cannot draw is one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from vlmscope.app import main
from vlmscope.circuits.config import MarkConfig, SettingConfig, TrialConfig
from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId
from vlmscope.core.results import CircuitFeature, Rate, Supernode
from vlmscope.report import marks
from vlmscope.report.marks import (
    LISTED,
    Folder,
    cards,
    check_marks,
    flip_rows,
    matrix,
    sections_of,
    write_evidence,
    write_rows,
)
from vlmscope.report.page import Figure, Percent, Table, Text

MARKS = {
    "result": {"mark": "cards", "trials": ["steer/main"]},
    "rates": {"mark": "bars", "trials": ["main"]},
    "all": {"mark": "table", "trials": ["main"]},
    "dose": {"mark": "curve", "x": "strength", "trials": ["dose"]},
    "layers": {"mark": "curve", "x": "layers", "trials": ["layers"]},
    "said": {"mark": "table", "file": "captions.parquet"},
    "words": {"mark": "text", "says": "One.\n\nTwo."},
    "evidence": {"mark": "features"},
}
SETTINGS = {"main": {}, "dose": {"strength": [1.0, 2.0]}, "layers": {"layers": ["0-0", "0-1"]}}
TRIALS: dict[str, dict[str, Any]] = {"steer": {"do": "exchange"}, "ablate": {"do": "ablate", "measure": "changed"}}


def rows(
    operation: str, setting: str, question: str, hits: int, changed: int, control: str = "", **axes
) -> pd.DataFrame:
    """Ten cases, of which some are hit and some changed."""
    common = {"operation": operation, "setting": setting, "question": question, "control": control, "draw": 0}
    where = {"mode": "free", "positions": "all", "layers": "all", "strength": 1.0, "limit": None, "features": 3}
    cases = pd.DataFrame({"hit": np.arange(10) < hits, "changed": np.arange(10) < changed})
    return cases.assign(**common, **(where | axes))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The folder of a finished run without its model."""
    table = [rows("steer", "main", question, hits, 10) for question, hits in (("name", 9), ("colour", 4))]
    table += [rows("steer", "main", question, some, 2, "matched") for question, some in (("name", 1), ("colour", 0))]
    table += [rows("ablate", "main", question, 1, some) for question, some in (("name", 5), ("colour", 6))]
    table += [rows("steer", "dose", "name", hits, 0, strength=x) for x, hits in ((1.0, 2), (2.0, 8))]
    table += [rows("steer", "layers", "name", hits, 0, layers=x) for x, hits in (("0-0", 0), ("0-1", 7))]
    pd.concat(table, ignore_index=True).to_parquet(tmp_path / "trials.parquet")
    write_rows(tmp_path / "captions.parquet", [{"before": "a red planet", "after": "a blue one"}])
    members = [CircuitFeature(FeatureId(1, i), "last", 1.0, 1.0 - i / 100) for i in range(30)]
    write_evidence(tmp_path / "evidence.parquet", [Supernode("mars", tuple(members))])
    settings = {name: vars(SettingConfig(**one)) for name, one in SETTINGS.items()}
    trials = {name: vars(TrialConfig(**one)) for name, one in TRIALS.items()}
    whole = {"name": "mine", "model": {"name": "tiny"}, "headline": {}, "trials": trials, "settings": settings}
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump(whole | {"report": {k: vars(MarkConfig(**v)) for k, v in MARKS.items()}})
    )
    (tmp_path / "metrics.json").write_text(json.dumps({"steer/main": 0.4}))
    (tmp_path / "figures").mkdir()
    return tmp_path


def test_a_report_is_drawn_again_without_the_model(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["task=report", f"task.run={run_dir}"]) == 0
    assert str(run_dir / "report.html") in capsys.readouterr().out
    page = (run_dir / "report.html").read_text()
    for word in ("a red planet", "a blue one", "L1/0", "L1/23", "The 24 most influential of 30"):
        assert word in page, word
    assert f"L1/{LISTED}" not in page
    assert {path.stem for path in (run_dir / "figures").iterdir()} == {"rates", "dose", "layers"}


def test_tables_have_the_worst_question_and_its_controls(run_dir: Path) -> None:
    folder = Folder(run_dir, {"ablate/main": "changed"})
    found = {(row.method, row.question): row for row in flip_rows(folder, MarkConfig("table", trials=["main"]))}
    worst = found["steer", "worst"]
    assert (worst.rate.value, worst.rate.control, worst.q) == (0.4, 0.1, None)
    # Of ablation the worst question is the one that changes least, and its hits are shown all the same.
    ablated = found["ablate", "worst"]
    assert ablated.changed is not None and (ablated.changed.value, ablated.rate.value) == (0.5, 0.1)
    assert (found["steer", "name"].rank, found["steer", "name"].q, worst.rank) == ("1 of 2", None, "1 of 2")
    assert (found["ablate", "name"].rank, found["ablate", "name"].q) == ("", None)
    places = [row.scope for row in flip_rows(folder, MarkConfig("table", trials=["layers", "dose"]))]
    assert places == ["dose, strength 1.0", "dose, strength 2.0", "layers, layers 0-0", "layers, layers 0-1"]


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        ({"mark": "pie"}, "report.mine.mark=pie: no such mark; choose from cards"),
        ({"mark": "bars", "trials": ["stear/main"]}, "report.mine.trials: 'stear/main' is not declared"),
        ({"mark": "bars", "x": "strength", "trials": ["main"]}, "report.mine.x=strength: bars stand for question"),
        ({"mark": "curve", "x": "dosis"}, "no column 'dosis'"),
        ({"mark": "table", "file": "mine.parquet"}, "mine.parquet: no such file"),
        ({"mark": "table", "trials": ["main"], "y": "recovered"}, "no column 'recovered'"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(mark: dict, words: str, run_dir: Path) -> None:
    marks = {"mine": MarkConfig(**mark)}
    with pytest.raises(UserError, match=words):
        check_marks(marks, {"main": ["steer"]})  # before anything runs
        sections_of(Folder(run_dir), marks)


@pytest.mark.parametrize("kind", ["curve", "table", "matrix", "bars", "cards"])
def test_a_mark_of_a_case_set_without_cases_says_so(kind: str, run_dir: Path) -> None:
    shown = sections_of(Folder(run_dir), {"mine": MarkConfig(kind, trials=["hallucinated"])})
    assert shown == [Text("mine", ("This run has no case of hallucinated.",))]


def test_a_folder_without_a_report_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for run, words in ((None, "task.run is not given"), (tmp_path, "config.yaml")):
        assert main(["task=report", *([f"task.run={run}"] if run else [])]) == 2
        assert words in capsys.readouterr().err


HITS = {("a", "b"): 4, ("b", "a"): 3, ("a", "c"): 0}  # of 4 cases; the other cells have no question


def matrix_folder(path: Path) -> Folder:
    same = {"operation": "steer", "setting": "main", "mode": "free", "question": "name", "features": 2, "draw": 0}
    same |= {"positions": "all", "layers": "all", "strength": 1.0, "limit": None}
    rows = [
        same | {"recipient": r, "donor": d, "control": control, "case": i, "hit": not control and i < hits}
        for (r, d), hits in HITS.items()
        for control in ("", "matched")
        for i in range(4)
    ]
    pd.DataFrame(rows).to_parquet(path / "trials.parquet")
    return Folder(path)


def test_a_matrix_has_recipients_down_and_its_lowest_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}

    def draw(names: list[str], panels: dict[str, pd.DataFrame], path: Path) -> Path:
        drawn.update({title: np.asarray(of, float) for title, of in panels.items()}, names=names)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"png")
        return path

    monkeypatch.setattr(marks, "share_matrices", draw)
    folder, nan = matrix_folder(tmp_path), np.nan
    figure, table = matrix(folder, "cells", MarkConfig("matrix", top=2))
    assert drawn["names"] == ["a", "b", "c"] and isinstance(figure, Figure) and isinstance(table, Table)
    np.testing.assert_array_equal(drawn["name"], [[nan, 1, 0], [0.75, nan, nan], [nan, nan, nan]])
    first, second = table.rows
    assert first[:4] == ("a", "c", "name", 4) and second[:2] == ("b", "a")
    assert isinstance(second[4], Rate) and second[4].value == 0.75
    assert second[5] == Percent(0.0) and second[6] == "1 of 2"
    ((card,),) = (section.cards for section in cards(folder, "result", MarkConfig("cards")))  # type: ignore[attr-defined]
    # The card is the mean over cells.
    assert isinstance(card.value, Rate) and (card.value.value, card.value.cases) == (pytest.approx(1.75 / 3), 3)
