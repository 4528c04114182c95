"""Ctrl-C, or the signal that ends a job, among processes that train together: all stop after the same step.

Each process may be told at another moment, or only one is, and one that stopped at once would leave the others waiting.
So a signal is noted, and after each step the processes ask each other. A second Ctrl-C stops at once.
"""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytorch_lightning as pl

from vlmscope.training.process_group import joint_sum

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class AgreedStop(pl.Callback):
    """Calls `save` and raises `KeyboardInterrupt` on every process after the step in which one was told to stop."""

    def __init__(self, save: Callable[[Any], None]) -> None:
        self.save = save
        self.told = False
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """From here on signals are noted."""
        self._before = {one: signal.signal(one, self._note) for one in SIGNALS}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Ask whether any process was told."""
        if joint_sum([float(self.told)])[0] > 0:
            self.save(pl_module)
            raise KeyboardInterrupt

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Signals do again what they did before."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Signals do again what they did before."""
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.told and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.told = True

    def _restore(self) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)
        self._before = {}
