"""Checkpoints of a Lightning run without pickle: safetensors for every tensor, JSON for the rest, replaced atomically.

A module takes part by counting its optimiser steps in `steps_done`, by drawing its data from the step number, so that
a resumed run continues with the very next batch, and by saying when it is `committing` a step.
"""

from __future__ import annotations

import json
import logging
import signal
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from safetensors.torch import load_file, save_file

from vlmscope.core.artifacts import atomic_path
from vlmscope.core.errors import UserError, is_out_of_memory
from vlmscope.core.origin import plain, refuse_other

_LOG = logging.getLogger(__name__)


class ResumableCheckpoint(pl.Callback):
    """Save module and optimiser to `<folder>/checkpoint.safetensors` every `every` steps and at the end of fitting."""

    def __init__(self, folder: Path, every: int, resume: bool, origin: Mapping[str, Any]) -> None:
        """`origin`: what decides the result, by name (`vlmscope.core.origin`); a run resumes only with the same."""
        self.path = Path(folder) / "checkpoint.safetensors"
        self.every = every
        self.resume = resume
        self.origin = origin

    def restore_weights(self, module: Any) -> None:
        """Before fitting: take weights and step count, so that a finished stage is not trained again."""
        if self.resume and self.path.is_file():
            load_checkpoint(self.path, module, None, self.origin)

    def save(self, trainer: pl.Trainer, module: Any) -> None:
        """Save now, unless nothing was trained."""
        if trainer.optimizers:
            save_checkpoint(self.path, module, trainer.optimizers[0], self.origin)

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Take the optimiser's moments too."""
        if self.resume and self.path.is_file():
            load_checkpoint(self.path, pl_module, trainer.optimizers[0], self.origin)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Save after every `every`-th step."""
        if pl_module.steps_done % self.every == 0:
            save_checkpoint(self.path, pl_module, trainer.optimizers[0], self.origin)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Ctrl-C or SIGTERM keeps what was learnt, unless it came in the middle of a change of the weights."""
        if isinstance(exception, KeyboardInterrupt) and trainer.optimizers and not pl_module.committing:
            save_checkpoint(self.path, pl_module, trainer.optimizers[0], self.origin)


class _Heard(pl.Callback):
    """Puts back the handler of Ctrl-C, which Lightning ignores while it shuts down: a second one is to be heard."""

    def __init__(self, handler: Any) -> None:
        self.handler = handler

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            signal.signal(signal.SIGINT, self.handler)


def fit_or_interrupt(trainer: pl.Trainer, module: pl.LightningModule, batches: Any) -> None:
    """`trainer.fit`, in which Ctrl-C stays a `KeyboardInterrupt`, and SIGTERM a `Terminated`.

    Lightning turns both into `SystemExit(1)` and leaves Ctrl-C ignored, which would lose exit codes 130 and 143.
    """
    handler = signal.getsignal(signal.SIGINT)
    trainer.callbacks.insert(0, _Heard(handler))  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with warnings.catch_warnings():
            # Batches are made from the step number in this process on purpose; the last is a matter within Lightning.
            warnings.filterwarnings("ignore", message=".*num_workers.*|.*IterableDataset.*|.*LeafSpec.*")
            trainer.fit(module, batches)
    except SystemExit as end:
        signal.signal(signal.SIGINT, handler)
        stop = end.__context__
        raise (stop if isinstance(stop, KeyboardInterrupt) else KeyboardInterrupt()) from None


def save_checkpoint(path: Path, module: Any, optimizer: torch.optim.Optimizer, origin: Mapping[str, Any]) -> None:
    """Write parameters, buffers, optimiser moments, the step count and the run's origin in one atomic file."""
    state: dict[str, torch.Tensor] = {f"module.{k}": v.detach().contiguous() for k, v in module.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            state[f"optimizer.{index}.{name}"] = torch.as_tensor(value).clone().contiguous()
    unique: dict[int, str] = {}
    for key in list(state):  # tied weights are one tensor: safetensors refuses to store shared memory twice
        if unique.setdefault(state[key].data_ptr(), key) != key and state[key].numel():
            state[key] = state[key].clone()
    metadata = {"steps_done": str(module.steps_done), "origin": json.dumps(plain(origin))}
    with atomic_path(path, sum(t.nbytes for t in state.values())) as temporary:
        save_file(state, temporary, metadata=metadata)


def load_checkpoint(
    path: Path, module: Any, optimizer: torch.optim.Optimizer | None, origin: Mapping[str, Any]
) -> None:
    """Restore what `save_checkpoint` wrote (without an optimiser: parameters and step count only).

    Raises:
        UserError: the file is corrupt, or of a run with another origin (each difference is named).
    """
    from safetensors import SafetensorError, safe_open

    try:
        state = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        if "origin" in metadata:
            refuse_other(str(path), json.loads(metadata["origin"]), origin)
        else:
            _LOG.warning("%s does not record its settings and data: whether they are the same is not checked", path)
        module.load_state_dict({k[7:]: v for k, v in state.items() if k.startswith("module.")})
    except (SafetensorError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        first = str(error).splitlines()[0][:200]
        raise UserError(f"checkpoint {path} does not fit this run ({first}): remove it or change the config") from error
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            moments.setdefault(int(index), {})[name] = value
    if optimizer is not None:
        full = optimizer.state_dict()
        full["state"] = moments
        optimizer.load_state_dict(full)
    module.steps_done = int(metadata["steps_done"])
