"""What a cache of captured activations is told of the data that a run is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.training.captures import CacheSettings


def cache_settings(cfg: AppConfig, settings: str | None) -> CacheSettings | None:
    """The cache that `task.cache` names; None when it names none.

    Args:
        cfg: of the run.
        settings: what resuming must find unchanged about the data.
    """
    from vlmscope.core.origin import folder_digest
    from vlmscope.training.captures import CacheSettings

    task, data = cfg.task, cfg.data
    if task.cache is None:
        return None
    words = [data.name, settings or f"{dict(sorted(task.batch.items()))}"]
    if not data.sources:
        words.append(f"{data.val_share:g} held out")
    paths = [data.path, *(source.path for source in data.sources.values())]
    words += [f"files {folder_digest(path)}" for path in dict.fromkeys(paths) if path is not None]
    return CacheSettings(Path(task.cache), task.cache_dtype, ", ".join(words), f"seed {cfg.seed}")


def rounding(cfg: AppConfig) -> str | None:
    """What the cache's dtype does to the activations that are trained on, in words; None: nothing."""
    task = cfg.task
    if task.cache is None or task.cache_dtype in (None, cfg.model.dtype):
        return None
    return f"activations in {task.cache_dtype}"
