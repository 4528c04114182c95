"""The index of a folder of shards, looked at before anything heavy is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmscope.core.artifacts import read_json
from vlmscope.core.errors import UserError

INDEX = "index.json"


def read_index(folder: Path, key: str) -> dict[str, Any]:
    """What `task=build_data` wrote about its shards.

    Args:
        folder: of the shards.
        key: of the configuration, by which the folder was named.

    Raises:
        UserError: there is no index.
    """
    if not (folder / INDEX).is_file():
        raise UserError(f"no {INDEX} in {folder}: run python run.py task=build_data first, or correct {key}")
    return read_json(folder / INDEX)
