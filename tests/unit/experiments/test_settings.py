"""Settings of analyses, general or an experiment's own: wrong keys, wrong types and senseless values are refused."""

from typing import Any

import pytest
from tests.configs.composing import composed

from vlmscope.config import catalog
from vlmscope.core.errors import UserError
from vlmscope.tasks.experiment import checked_settings, general_analysis, own_analysis

EXPERIMENTS = list(catalog.options("experiment"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_settings_of_every_experiment_are_those_of_its_analyses(name: str) -> None:
    """Those of debug=fast are checked where it runs, in tests/golden."""
    cfg = composed(f"experiment={name}")
    checked_settings(getattr(own_analysis(name), "Settings", None), cfg.analysis, "analysis")
    for analysis, given in cfg.analyses.items():
        general_analysis(analysis, given)


LINEAR = composed("experiment=linear_story").analyses["predicted_effects"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"factor": [2.0]}, "analyses.predicted_effects.factor: no such setting; there are inputs"),
        ({"inputs": "two"}, "analyses.predicted_effects.inputs: .*could not be converted to Integer"),
        ({"least": 1}, "analyses.predicted_effects.least=1: it must be at least 2"),
        ({"shares": [0.8, 0.5]}, "ascending shares"),
        ({"shares": [0.5, 1.5]}, "at most 1"),
        ({"factors": [], "add": False}, "nothing to do"),
        ({"factors": [1.0]}, "changes nothing"),
    ],
)
def test_settings_without_sense_are_one_line(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        general_analysis("predicted_effects", LINEAR | changed)
    assert "\n" not in str(raised.value)


def test_settings_of_an_experiments_own_module_are_checked_too() -> None:
    own, given = own_analysis("hallucination_prediction"), composed("experiment=hallucination_prediction").analysis
    for changed, words in (({"levels": [0.6, 0.0]}, "give two levels"), ({"folds": 1}, "at least 2")):
        with pytest.raises(UserError, match=words):
            checked_settings(own.Settings, given | changed, "analysis")
    with pytest.raises(UserError, match="analysis.folds: no such setting; there are none at all"):
        checked_settings(None, {"folds": 1}, "analysis")


def test_a_setting_without_a_value_and_an_unknown_analysis_are_named() -> None:
    with pytest.raises(UserError, match="analyses.predicted_effects.inputs has no value"):
        general_analysis("predicted_effects", {})
    with pytest.raises(UserError, match="analyses=modalty: no such choice; did you mean 'modality'"):
        general_analysis("modalty", {})
