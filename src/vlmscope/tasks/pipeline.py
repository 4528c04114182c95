"""Run the steps of an experiment in order; each reads and writes the run folder."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vlmscope.core.errors import UserError

if TYPE_CHECKING:
    from vlmscope.config import AppConfig
    from vlmscope.tasks.context import RunContext

KINDS: tuple[str, ...] = ()  # none is left: experiments declare their trials (docs/experiments.md)


@dataclass
class Config:
    """`steps`: name -> whether to run it, in the order of the file; a command line can switch one off."""

    steps: dict[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [name for name in self.steps if name not in KINDS]
        if unknown:
            raise UserError(f"task.steps: no step {unknown[0]!r}; experiments declare trials (docs/experiments.md)")


def run(cfg: "AppConfig", context: "RunContext") -> dict[str, float]:
    """Run the steps that are switched on; each that has a `check(cfg)` is asked before the first one runs."""
    import importlib
    import time

    from vlmscope.data.images import check_image
    from vlmscope.tasks.studies.feature_labels import look_for_labels

    chosen = [name for name, wanted in cfg.task.steps.items() if wanted]
    if not chosen:
        raise UserError("task.steps is empty: choose an experiment, such as experiment=mars_earth_patch")
    look_for_labels(cfg)
    for path in (path for own in cfg.images.values() for path in own):
        check_image(path)

    from tqdm import tqdm

    from vlmscope.tasks.steps.bench import Bench

    steps = {name: importlib.import_module(f"vlmscope.tasks.steps.{name}") for name in chosen}
    for step in steps.values():
        if hasattr(step, "check"):
            step.check(cfg)
    bench = Bench(cfg, context.run_dir)
    with tqdm(steps.items(), desc="steps", unit="step") as bar:
        for name, step in bar:
            bar.set_postfix_str(name)
            start = time.perf_counter()
            step.run(bench)
            bench.metrics[f"perf/{name}_seconds"] = time.perf_counter() - start
    return bench.metrics
