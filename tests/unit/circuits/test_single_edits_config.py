"""Settings of single edits that make no sense are named."""

from typing import Any

import pytest

from vlmscope.circuits.single_edits_config import SingleEditsConfig
from vlmscope.core.errors import UserError


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"least": 1}, "single_edits.least=1: it must be at least 2"),
        ({"shares": [0.8, 0.5]}, "ascending shares"),
        ({"shares": [0.5, 1.5]}, "at most 1"),
        ({"factors": [], "add": False}, "nothing to do"),
        ({"factors": [1.0]}, "changes nothing"),
    ],
)
def test_bad_settings_are_named(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        SingleEditsConfig(**changed)
