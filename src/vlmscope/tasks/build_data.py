"""Render Orrery's scenes into WebDataset shards with an index; goes on where a killed build stopped."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.tasks.context import RunContext

TRAIN = {"planets": 10000, "digits": 28000, "shapes": 10000, "hands": 5000, "text": 2000}
VAL = {"planets": 400, "digits": 400, "shapes": 400, "hands": 400, "text": 400}
TEST = {"planets": 1000, "digits": 1000, "shapes": 1000, "hands": 1000, "text": 1000}


@dataclass
class Config:
    """Scenes of each kind in each split. They go to `data.path`."""

    train: dict[str, int] = field(default_factory=lambda: dict(TRAIN))
    val: dict[str, int] = field(default_factory=lambda: dict(VAL))
    test: dict[str, int] = field(default_factory=lambda: dict(TEST))
    shard_size: int = 1000


def run(cfg: "AppConfig", context: "RunContext") -> dict[str, float]:
    """Write the shards that `data.path` still lacks."""
    from pathlib import Path

    from tqdm import tqdm

    from vlmscope.core.errors import UserError
    from vlmscope.data.orrery.dataset import OrreryDataConfig, build, plans_of
    from vlmscope.data.orrery.scene import KINDS

    if cfg.data.path is None:
        raise UserError("data.path is not set: give the folder that the shards shall go to")
    task: Config = cfg.task
    for split in ("train", "val", "test"):
        for kind, count in getattr(task, split).items():
            if kind not in KINDS or count < 0:
                raise UserError(f"task.{split}.{kind}={count}: kinds are {', '.join(KINDS)}, counts 0 or more")
    data = OrreryDataConfig(
        folder=cfg.data.path, seed=cfg.seed, shard_size=task.shard_size, train=task.train, val=task.val, test=task.test
    )
    plans = plans_of(data)
    with tqdm(total=sum(p.stop - p.start for p in plans), unit="scene", desc="scenes") as bar:
        written = build(data, on_shard=lambda plan: bar.update(plan.stop - plan.start))
    size = sum(f.stat().st_size for f in Path(cfg.data.path).glob("*.tar"))
    return {
        "data/shards": float(len(plans)),
        "data/shards_written": float(written),
        "data/scenes": float(sum(p.stop - p.start for p in plans)),
        "data/bytes": float(size),
    }
