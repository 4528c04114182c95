"""Ctrl-C or SIGTERM among processes that train together: all stop after the same step.

Each process may be told at another moment, or only one is, and one that stopped at once would leave the others waiting.
So a signal is noted, and after each step the processes ask each other. A second signal ends the process at once.
"""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytorch_lightning as pl

from vlmscope.core.errors import Terminated
from vlmscope.training.process_group import joint_sum

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# torchrun and srun pass on a signal that the terminal or SLURM sent to every process: the same one comes twice.
SAME_SIGNAL_SECONDS = 1.0


class AgreedStop(pl.Callback):
    """Calls `save` and raises `KeyboardInterrupt`, or `Terminated` when one of them got SIGTERM, on every process after
    the step in which one was told to stop.
    """

    def __init__(self, save: Callable[[Any], None]) -> None:
        self.save = save
        self.told: dict[int, float] = {}  # when each signal first came
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """From here on signals are noted."""
        self._before = {one: signal.signal(one, self._note) for one in SIGNALS}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Ask whether any process was told."""
        interrupted, terminated = joint_sum([float(number in self.told) for number in SIGNALS])
        if interrupted or terminated:
            self.save(pl_module)
            raise Terminated if terminated else KeyboardInterrupt

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Signals do again what they did before."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Signals do again what they did before."""
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.told and now - min(self.told.values()) > SAME_SIGNAL_SECONDS:
            os._exit(128 + number)
        self.told.setdefault(number, now)

    def _restore(self) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)
        self._before = {}
