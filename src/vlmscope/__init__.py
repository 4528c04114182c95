"""vlmscope opens up vision-language models: transcoders, attribution graphs, proof that a circuit causes an answer."""

import sys
from typing import TYPE_CHECKING

from vlmscope.core import __version__

if TYPE_CHECKING:
    from vlmscope.api import compare, load, open_study, patch, steer, study, study_data, trace, where

__all__ = [
    "__version__", "compare", "load", "open_study", "patch", "steer", "study", "study_data", "trace",
    "where",
]  # fmt: skip


def __getattr__(name: str) -> object:
    """The public functions of `vlmscope.api`, imported when first used: `import vlmscope` itself must stay quick."""
    if name in __all__:
        from vlmscope.core.launch import LARGE_MODULES, import_quickly

        import_quickly(*LARGE_MODULES)
        from vlmscope import api

        return getattr(api, name)
    module = sys.modules[__name__]  # Python names the nearest function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=module)


def __dir__() -> list[str]:
    """What completion offers."""
    return list(__all__)
