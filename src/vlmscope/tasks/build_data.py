"""Write Orrery's scenes, or a mix of sources, as WebDataset shards; goes on where a killed build stopped."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from vlmscope.config import AppConfig
    from vlmscope.tasks.registry import RunContext

TRAIN = {"planets": 10000, "digits": 28000, "shapes": 10000, "hands": 5000, "text": 2000}
VAL = {"planets": 400, "digits": 400, "shapes": 400, "hands": 400, "text": 400}
TEST = {"planets": 1000, "digits": 1000, "shapes": 1000, "hands": 1000, "text": 1000}

USES = ("data",)
MEMORY = "task.shard_size or task.workers"


@dataclass
class Config:
    """What is written to `data.path`: with data=orrery, scenes of each kind in each split; with a mix, all samples.

    A mix is written in `parts` parts a source, by `workers` processes (None: one a core, four at most).
    """

    train: dict[str, int] = field(default_factory=lambda: dict(TRAIN))
    val: dict[str, int] = field(default_factory=lambda: dict(VAL))
    test: dict[str, int] = field(default_factory=lambda: dict(TEST))
    shard_size: int = 1000
    parts: int = 4
    workers: int | None = None


def run(cfg: "AppConfig", context: "RunContext") -> dict[str, float]:
    """Write the shards that `data.path` still lacks."""
    from pathlib import Path

    from vlmscope.core.errors import UserError
    from vlmscope.tasks.ranks import claimed

    if cfg.data.path is None:
        raise UserError("data.path is not set: give the folder that the shards shall go to")
    folder = Path(cfg.data.path)
    if not cfg.data.sources and cfg.data.name != "orrery":
        raise UserError(f"data={cfg.data.name}: shards are written of data=orrery and of mixes (docs/data.md)")
    with claimed(folder, "data.path"):
        return _mix(cfg, folder) if cfg.data.sources else _orrery(cfg, folder)


def _mix(cfg: "AppConfig", folder: "Path") -> dict[str, float]:
    from tqdm import tqdm

    from vlmscope.data.build import BuildSettings, build_mix, known_rows, processes_for

    data, task = cfg.data, cfg.task
    settings = BuildSettings(folder, task.shard_size, task.parts, data.val_share)
    with tqdm(initial=known_rows(folder), unit="row", desc="shards") as bar:
        return build_mix(data.sources, settings, processes_for(task.workers), lambda rows: _advance(bar, rows))


def _advance(bar: Any, rows: int) -> None:
    bar.update(rows)


def _orrery(cfg: "AppConfig", folder: "Path") -> dict[str, float]:
    from tqdm import tqdm

    from vlmscope.core.errors import UserError
    from vlmscope.data.orrery.dataset import OrreryDataConfig, build, plans_of
    from vlmscope.data.orrery.scenes import KINDS

    task: Config = cfg.task
    for split in ("train", "val", "test"):
        for kind, count in getattr(task, split).items():
            if kind not in KINDS or count < 0:
                raise UserError(f"task.{split}.{kind}={count}: kinds are {', '.join(KINDS)}, counts 0 or more")
    data = OrreryDataConfig(
        folder=str(folder), seed=cfg.seed, shard_size=task.shard_size, train=task.train, val=task.val, test=task.test
    )
    plans = plans_of(data)
    with tqdm(total=sum(p.stop - p.start for p in plans), unit="scene", desc="scenes") as bar:
        written = build(data, on_shard=lambda plan: bar.update(plan.stop - plan.start))
    size = sum(f.stat().st_size for f in folder.glob("*.tar"))
    return {
        "data/shards": float(len(plans)),
        "data/shards_written": float(written),
        "data/scenes": float(sum(p.stop - p.start for p in plans)),
        "data/bytes": float(size),
    }
