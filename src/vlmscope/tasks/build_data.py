"""Write Orrery's scenes, or a mix of sources, as WebDataset shards; a killed build resumes."""

import os
from pathlib import Path

from vlmscope.config import AppConfig
from vlmscope.core.errors import UserError
from vlmscope.data.build import BuildSettings, build_mix
from vlmscope.data.orrery.dataset import build
from vlmscope.data.orrery.scenes import COMPOSED, KINDS
from vlmscope.tasks.job import claimed
from vlmscope.tasks.settings import BuildDataSettings, RunContext


def run(cfg: AppConfig, context: RunContext) -> dict[str, float]:
    """Write the shards that are missing in `data.path`."""
    task: BuildDataSettings = cfg.task
    if cfg.data.path is None:
        raise UserError("data.path is not set: give the folder that the shards shall go to")
    folder = Path(cfg.data.path)
    if not cfg.data.sources and cfg.data.name != "orrery":
        raise UserError(f"data={cfg.data.name}: shards are written of data=orrery and of mixes (docs/data.md)")
    with claimed(folder, "data.path"):
        if cfg.data.sources:
            settings = BuildSettings(folder, task.shard_size, task.parts, cfg.data.val_share)
            workers = task.workers if task.workers is not None else min(4, os.cpu_count() or 1)
            return build_mix(cfg.data.sources, settings, workers)
        counts = {}
        for split in ("train", "val", "test"):
            kinds = dict(getattr(task, split))
            for kind, count in kinds.items():
                if kind not in (*KINDS, *COMPOSED) or count < 0:
                    known = ", ".join((*KINDS, *COMPOSED))
                    raise UserError(f"task.{split}.{kind}={count}: kinds are {known}, counts 0 or more")
            counts[split] = {kind: count for kind, count in kinds.items() if kind in cfg.data.scenes}
        return build(folder, counts, cfg.seed, task.shard_size)
