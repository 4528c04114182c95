"""Overrides that must reach the configuration exactly as they were typed, whatever Hydra's grammar makes of them.

Hydra parses the right side of an override: commas make a sweep, parentheses a function, braces a dict, `${` an
interpolation. A prompt is text, so it is quoted here before Hydra sees it.
"""

import re
from collections.abc import Sequence
from pathlib import Path

_PLUS = re.compile(r"\+{0,2}")
_TEXTS = ("prompt", "query", "prompt_file", "task.donor_prompt", "task.second_prompt")
_FILES = (
    "image",
    "task.donor_image",
    "task.from_graph",
    "task.second_image",
    "task.first",
    "task.second",
    "task.rows",
    "study.path",
    "task.hand",
    "attribution.labels",
)


def quote(text: str) -> str:
    """`text` as a quoted Hydra value that parses and resolves to exactly `text`."""
    # In OmegaConf `\\${` is a literal `${`, and backslashes before it count in pairs; in Hydra's grammar the same holds
    # for backslashes before a quote or at the end. Other backslashes stand for themselves in both.
    text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    text = re.sub(r'(\\*)"', lambda match: match[1] * 2 + r"\"", text)
    text = re.sub(r"\\+\Z", lambda match: match[0] * 2, text)
    return f'"{text}"'


def _rewrite(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if not equals or key.startswith("-"):
        return argument
    plus = _PLUS.match(key)
    name = key[plus.end() if plus else 0 :]
    if name in _TEXTS or (name in _FILES and Path(value).exists()):
        return f"{name}={quote(value)}"
    if name == "task.features" and value.lstrip().startswith("{"):
        return f"++{name}={value}"  # new names in a dict need it
    if name.startswith("images."):
        # A new name in a dict needs `++`, and one picture is a list of one.
        value = value if value.startswith(("[", '"', "'")) else quote(value)
        return f"++{name}={value if value.startswith('[') else f'[{value}]'}"
    return argument


def quote_arguments(argv: Sequence[str]) -> list[str]:
    """The command line, its texts, existing files, `images.<name>=` and `task.features={...}` safe for Hydra."""
    return [_rewrite(argument) for argument in argv]
