"""vlmscope opens up vision-language models: transcoders, attribution graphs, proof that a circuit causes an answer."""

import importlib
from typing import Any

__version__ = "0.1.0"

_API = ("load", "trace", "compare", "aggregate", "steer", "patch", "where", "study", "study_data", "open_study")

# pyright cannot see names that __getattr__ provides.
__all__ = [*_API, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """The public functions of `vlmscope.api`, imported when first used: `import vlmscope` itself must stay quick."""
    if name in _API:
        return getattr(importlib.import_module("vlmscope.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
