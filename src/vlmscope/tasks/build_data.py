"""Write Orrery's scenes as WebDataset shards, which later runs read instead of rendering; a killed build resumes."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlmscope.data.orrery.scenes import COUNTS

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.tasks.registry import RunContext

USES = ("data",)
MEMORY = "task.shard_size"


@dataclass
class Config:
    """Contents of `data.path`: scenes of each kind of `data.scenes` in each split."""

    train: dict[str, int] = field(default_factory=lambda: dict(COUNTS["train"]))
    val: dict[str, int] = field(default_factory=lambda: dict(COUNTS["val"]))
    test: dict[str, int] = field(default_factory=lambda: dict(COUNTS["test"]))
    shard_size: int = 1000


def run(cfg: "AppConfig", context: "RunContext") -> dict[str, float]:
    """Write the shards that are missing in `data.path`."""
    from pathlib import Path

    from vlmscope.core.errors import UserError
    from vlmscope.data.orrery.dataset import build
    from vlmscope.data.orrery.scenes import COMPOSED, KINDS
    from vlmscope.tasks.job import claimed

    task: Config = cfg.task
    if cfg.data.path is None:
        raise UserError("data.path is not set: give the folder that the shards shall go to")
    folder = Path(cfg.data.path)
    if cfg.data.name != "orrery":
        raise UserError(f"data={cfg.data.name}: shards are written of Orrery's scenes alone (docs/data.md)")
    with claimed(folder, "data.path"):
        counts = {}
        for split in ("train", "val", "test"):
            kinds = dict(getattr(task, split))
            for kind, count in kinds.items():
                if kind not in (*KINDS, *COMPOSED) or count < 0:
                    known = ", ".join((*KINDS, *COMPOSED))
                    raise UserError(f"task.{split}.{kind}={count}: kinds are {known}, counts 0 or more")
            counts[split] = {kind: count for kind, count in kinds.items() if kind in cfg.data.scenes}
        return build(folder, counts, cfg.seed, task.shard_size)
