"""Settings of analyses, general or an experiment's own: wrong keys, wrong types and senseless values are refused."""

from typing import Any

import pytest
from tests.configs.composing import composed

from vlmscope.config import catalog
from vlmscope.core.errors import UserError
from vlmscope.tasks.experiment import checked_settings, general_analysis, own_analysis

EXPERIMENTS = list(catalog.options("experiment"))


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("size", [(), ("debug=fast",)])
def test_the_settings_of_every_experiment_are_those_of_its_analyses(name: str, size: tuple[str, ...]) -> None:
    cfg = composed(f"experiment={name}", *size)
    checked_settings(getattr(own_analysis(name), "Settings", None), cfg.analysis, "analysis")
    for analysis, given in cfg.analyses.items():
        general_analysis(analysis, given)


@pytest.mark.parametrize(
    ("name", "changed", "words"),
    [
        ("linear_story", {"factor": [2.0]}, "analysis.factor: no such setting; there are inputs"),
        ("linear_story", {"inputs": "two"}, "analysis.inputs: .*could not be converted to Integer"),
        ("linear_story", {"least": 1}, "analysis.least=1: it must be at least 2"),
        ("linear_story", {"shares": [0.8, 0.5]}, "ascending shares"),
        ("linear_story", {"shares": [0.5, 1.5]}, "at most 1"),
        ("linear_story", {"factors": [], "add": False}, "nothing to do"),
        ("linear_story", {"factors": [1.0]}, "changes nothing"),
        ("hallucination_prediction", {"levels": [0.6, 0.0]}, "give two levels"),
        ("hallucination_prediction", {"folds": 1}, "at least 2"),
        ("modality_by_layer", {"folds": 1}, "analysis.folds: no such setting; there are none at all"),
    ],
)
def test_settings_without_sense_are_one_line(name: str, changed: dict[str, Any], words: str) -> None:
    given = composed(f"experiment={name}").analysis | changed
    with pytest.raises(UserError, match=words) as raised:
        checked_settings(getattr(own_analysis(name), "Settings", None), given, "analysis")
    assert "\n" not in str(raised.value)


def test_a_setting_without_a_value_and_an_unknown_analysis_are_named() -> None:
    with pytest.raises(UserError, match="analysis.inputs has no value"):
        checked_settings(own_analysis("linear_story").Settings, {}, "analysis")
    with pytest.raises(UserError, match="analyses=modalty: no such choice; did you mean 'modality'"):
        general_analysis("modalty", {})
