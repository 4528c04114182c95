"""Do pictures and words recall facts by the same features? The same search and tests for several sets of concepts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmscope.core.errors import UserError
from vlmscope.tasks.steps.cross_modal import associate

if TYPE_CHECKING:
    from vlmscope.tasks.steps.bench import Bench


def run(bench: Bench) -> None:
    """Leaves every set in `bench.records`, as the step cross_modal does; files go into a folder a set.

    Metrics are those of that step under association/<set>/.

    Raises:
        UserError: the experiment names no set.
    """
    if not bench.cfg.association:
        raise UserError(
            "this experiment needs sets of concepts: add one to its defaults, as in "
            "/cross_modal@association.planets: planets"
        )
    found = {}
    for name, config in bench.cfg.association.items():
        found[name] = associate(bench, config, bench.run_dir / name)
        bench.metrics |= {f"association/{name}/{key}": value for key, value in found[name].metrics.items()}
    bench.records["cross_modal"] = found
