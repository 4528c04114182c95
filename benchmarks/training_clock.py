"""Time and FVU of a training run, for both trainers of `benchmarks/training.py`."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmscope.metrics.dictionary import FvuAccumulator

Judge = Callable[[Callable[[int, Tensor], Tensor]], float]


class Clock:
    """Seconds of a run at each batch, by the wall or of the process's own CPU time, and its FVU at some of them."""

    def __init__(self, job: dict[str, Any], judge: Callable[[], float]) -> None:
        steps, marks = job["steps"], job["marks"]
        self.now = time.process_time if job["clock"] == "cpu" else time.perf_counter
        self.marks = {round(steps * (i + 1) / marks) for i in range(marks)} if marks else set()
        self.judge = judge
        self.seconds: list[float] = []
        self.curve: list[tuple[int, float, float]] = []
        self._paused, self._began = 0.0, self.now()

    def read(self) -> None:
        """A batch is asked for (or, after the last, the run is over): as many steps are done as reads before."""
        now, done = self.now(), len(self.seconds)
        self.seconds.append(now - self._began - self._paused)
        if done in self.marks:
            self.curve.append((done, self.seconds[-1], self.judge()))
            self._paused += self.now() - now

    def record(self) -> dict[str, Any]:
        """Median seconds a step after the first three, seconds of the whole run, and its curve."""
        steps = [after - before for before, after in zip(self.seconds, self.seconds[1:], strict=False)][3:]
        return {"step_s": statistics.median(steps), "run_s": self.seconds[-1], "curve": self.curve}


def fvu_judge(val: dict[int, tuple[Tensor, Tensor]]) -> Judge:
    """Mean FVU over layers of what a function (layer, x) -> reconstruction makes of tokens not trained on."""

    @torch.no_grad()
    def judge(reconstruct: Callable[[int, Tensor], Tensor]) -> float:
        found = []
        for layer, (x, y) in val.items():
            sums = FvuAccumulator()
            for part, target in zip(x.split(2048), y.split(2048), strict=True):
                sums.update(target, reconstruct(layer, part))
            found.append(sums.compute())
        return statistics.mean(found)

    return judge
