"""A nested configuration as the flat, bounded strings that MLflow takes as parameters."""

import re
from collections.abc import Mapping
from typing import Any

MAX_KEY = 250
MAX_VALUE = 6000
_FORBIDDEN = re.compile(r"[^\w\-. :/]")
_CUT = " ... (cut; whole in config.yaml)"


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; lists and empty mappings stay values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def clean_text(text: str) -> str:
    """`text` as UTF-8 can hold it: a file name's other bytes, such as 0xe9, become `\\udce9`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def clean_key(key: str) -> str:
    """`key` with the characters that MLflow refuses replaced by `_`, cut to its limit."""
    return _FORBIDDEN.sub("_", key)[:MAX_KEY] or "_"


def to_params(config: Mapping[str, Any]) -> dict[str, str]:
    """Every leaf of `config` as one parameter. Keys that become equal by cleaning get a number; long values are cut."""
    params: dict[str, str] = {}
    for key, value in flatten(config).items():
        name = base = clean_key(str(key))
        number = 2
        while name in params:
            name = f"{base[: MAX_KEY - 8]}_{number}"
            number += 1
        text = clean_text(str(value))
        params[name] = text if len(text) <= MAX_VALUE else text[: MAX_VALUE - len(_CUT)] + _CUT
    return params
