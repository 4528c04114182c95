"""Headline numbers: what holds, what is refused, what an experiment that is run again must say, how they are shown."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from vlmscope.config import AppConfig, catalog
from vlmscope.config.catalog import conf_dir, register
from vlmscope.config.resolve import CONFIG_ERRORS, to_app_config
from vlmscope.config.schema import HeadlineConfig
from vlmscope.core.errors import UserError
from vlmscope.tasks.settings import TASKS
from vlmscope.tracking.client import to_params

GOOD = """# @package _global_
# Does it work?
reproduce: true
paper: 9 of 10
headline:
  steer/free/flip_rate: {low: 0.9, high: 1, says: it flips}
"""


@pytest.fixture(autouse=True)
def hydra() -> Iterator[None]:
    register(TASKS)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        yield


def experiment(folder: Path, text: str) -> AppConfig:
    (folder / "experiment").mkdir(exist_ok=True)
    (folder / "experiment" / "one.yaml").write_text(text)
    arguments = ["experiment=one", f"hydra.searchpath=[file://{folder}]"]
    return to_app_config(compose("config", arguments), arguments)


def test_an_experiment_says_what_must_come_out(tmp_path: Path) -> None:
    app = experiment(tmp_path, GOOD)
    assert app.reproduce and app.paper == "9 of 10"
    assert app.headline == {"steer/free/flip_rate": HeadlineConfig(0.9, 1.0, "it flips")}
    params = to_params(asdict(app))
    assert params["headline.steer/free/flip_rate.low"] == "0.9" and params["reproduce"] == "True"
    assert catalog.first_comment(tmp_path / "experiment" / "one.yaml") == "Does it work?"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("low: 0.9, high: 1,", "low: 1.1, high: 1,", "low=1.1 and high=1 leave no range"),
        ("low: 0.9,", "low: .nan,", "leave no range"),
        ("says: it flips", "says: ' '", "fill in says"),
        ("low: 0.9, ", "", "headline.steer/free/flip_rate.low has no value"),
        ("low: 0.9", "lwo: 0.9", "lwo"),
        ("low: 0.9", "low: much", "much"),
        ("paper: 9 of 10", "paper: ''", "reproduce=true needs paper"),
        ("  steer/free/flip_rate: {low: 0.9, high: 1, says: it flips}", "  {}", "needs numbers to check"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in GOOD
    with pytest.raises((UserError, *CONFIG_ERRORS), match=words):
        experiment(tmp_path, GOOD.replace(old, new))
