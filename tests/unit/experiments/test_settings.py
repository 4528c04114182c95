"""Settings of an experiment's own analysis: a misspelt key, a wrong type and values without sense are refused."""

from typing import Any

import pytest
from tests.configs.composing import composed

from vlmscope.config import catalog
from vlmscope.core.errors import UserError
from vlmscope.tasks.experiment import own_analysis, own_settings

NAMES = [name for name in catalog.options("experiment") if own_analysis(name) is not None]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(), ("debug=fast",)])
def test_the_settings_of_every_analysis_are_those_of_its_module(name: str, size: tuple[str, ...]) -> None:
    own_settings(composed(f"experiment={name}", *size).analysis, own_analysis(name))


@pytest.mark.parametrize(
    ("name", "changed", "words"),
    [
        ("linear_story", {"factor": [2.0]}, "analysis.factor: no such setting; this experiment has inputs"),
        ("linear_story", {"inputs": "two"}, "analysis.inputs: .*could not be converted to Integer"),
        ("linear_story", {"least": 1}, "analysis.least=1: it must be at least 2"),
        ("linear_story", {"shares": [0.8, 0.5]}, "ascending shares"),
        ("linear_story", {"shares": [0.5, 1.5]}, "at most 1"),
        ("linear_story", {"factors": [], "add": False}, "nothing to do"),
        ("linear_story", {"factors": [1.0]}, "changes nothing"),
        ("hallucination_prediction", {"levels": [0.6, 0.0]}, "give two levels"),
        ("hallucination_prediction", {"folds": 1}, "at least 2"),
        ("modality_by_layer", {"folds": 1}, "analysis.folds: this experiment has no such setting"),
    ],
)
def test_settings_without_sense_are_one_line(name: str, changed: dict[str, Any], words: str) -> None:
    given = composed(f"experiment={name}").analysis | changed
    with pytest.raises(UserError, match=words) as raised:
        own_settings(given, own_analysis(name))
    assert "\n" not in str(raised.value)


def test_a_setting_without_a_value_is_named() -> None:
    with pytest.raises(UserError, match="analysis.inputs has no value"):
        own_settings({}, own_analysis("linear_story"))
