"""Checkpoints without pickle: safetensors for every tensor, JSON for the rest, replaced atomically.

`<folder>/step_00000200/` holds a file for each part of the module (`module.safetensors`; for transcoders
`layer_07.safetensors`, written by the layer's owner: parameters, coordinates, clocks, moments) and, written last and
only by rank 0, `complete.json` with settings and origin: a folder without it is incomplete. Older folders are removed
after that, so a complete one always exists. Since each layer is a file, any number of ranks can resume.

A module counts its optimiser steps in `steps_done`, draws its data from the step number, so that a resumed run
continues with the next batch, changes its state only inside `uninterrupted`, and names its parts.
"""

from __future__ import annotations

import shutil
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.rank_zero import rank_zero_only
from pytorch_lightning.loggers.logger import Logger
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlmscope.core.artifacts import atomic_path, plain, read_json, refuse_other, write_json
from vlmscope.core.errors import UserError, is_out_of_memory
from vlmscope.tracking import TrackedRun
from vlmscope.training.ranks import STOP_SIGNALS, Ranks

_MARKER = "complete.json"


class Resumable(Protocol):
    """A Lightning module with checkpoints; `counters` names the integers to save next to its tensors."""

    steps_done: int
    counters: tuple[str, ...]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser, which exists before fitting so that a checkpoint can be loaded into it."""
        ...

    def parts(self) -> Mapping[str, nn.Module]:
        """The parts of the module that this process writes, by file name."""
        ...


class RunLogger(Logger):
    """Passes a Trainer's metrics on to `run`, on the first process only; the app ends the run.

    Lightning's own MLFlowLogger cuts parameters at 250 characters, drops text, and ends the run by itself.
    """

    def __init__(self, run: TrackedRun) -> None:
        super().__init__()
        self._run = run

    @property
    def name(self) -> str:
        """A fixed name, which Lightning requires."""
        return "vlmscope"

    @property
    def version(self) -> str:
        """The run's id."""
        return self._run.run_id or "untracked"

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers at a step, without Lightning's `epoch`, which means nothing in step-based training."""
        kept = {key: float(value) for key, value in metrics.items() if key != "epoch"}
        if kept:
            self._run.log_metrics(kept, step)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the configuration is logged when the run is opened."""


class _RestoreCtrlC(pl.Callback):
    """Restores the handler of Ctrl-C, since Lightning ignores a second one while it shuts down."""

    def __init__(self, handler: Any) -> None:
        self.handler = handler

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            signal.signal(signal.SIGINT, self.handler)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C and SIGTERM back until the block has ended, so that a state is changed as a whole or not at all."""
    if threading.current_thread() is not threading.main_thread():  # Python runs handlers only there
        yield
        return
    held: list[int] = []
    before = {number: signal.signal(number, lambda number, _: held.append(number)) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in held:
            signal.raise_signal(number)


def fit_or_interrupt(trainer: pl.Trainer, module: pl.LightningModule, batches: Any) -> None:
    """`trainer.fit`, in which Ctrl-C stays a `KeyboardInterrupt`, and SIGTERM a `Terminated`.

    Lightning turns both into `SystemExit(1)` and leaves Ctrl-C ignored, which would lose exit codes 130 and 143.
    """
    handler = signal.getsignal(signal.SIGINT)
    trainer.callbacks.insert(0, _RestoreCtrlC(handler))  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with warnings.catch_warnings():
            # Batches are made in this process on purpose, from the step number; LeafSpec is internal to Lightning.
            warnings.filterwarnings("ignore", message=".*num_workers.*|.*IterableDataset.*|.*LeafSpec.*")
            trainer.fit(module, batches)
    except SystemExit as end:
        signal.signal(signal.SIGINT, handler)
        stop = end.__context__
        raise (stop if isinstance(stop, KeyboardInterrupt) else KeyboardInterrupt()) from None


class Checkpoints(pl.Callback):
    """Writes a checkpoint after every N-th step (0: never) and the last, and in a single process on an interrupt."""

    def __init__(
        self,
        folder: Path,
        every: int,
        last: int,
        settings: Mapping[str, Any],
        origin: Mapping[str, Any],
        ranks: Ranks | None = None,
    ) -> None:
        """`settings` and `origin` decide the result, by name: a run resumes only with the same."""
        self.folder, self.every, self.last = Path(folder), every, last
        self.settings, self.origin = plain(settings), plain(origin)
        self.ranks = ranks if ranks is not None else Ranks.single(1)
        self.saved_step: int | None = None  # that this run has written or restored

    def newest(self) -> Path | None:
        """The folder of the newest complete checkpoint."""
        return max((marker.parent for marker in self.folder.glob(f"step_*/{_MARKER}")), default=None)

    def save(self, module: Resumable) -> None:
        """Write this rank's parts and, after those of all ranks, the marker."""
        folder = self.folder / f"step_{module.steps_done:08d}"
        if self.saved_step == module.steps_done:  # not looked up on disk, where ranks may see different states
            return
        for name, part in module.parts().items():
            state = part_state(part, module.optimizer)
            with atomic_path(folder / f"{name}.safetensors") as temporary:
                save_file(state, temporary)
        self.ranks.barrier()
        if self.ranks.main:
            counters = {name: getattr(module, name) for name in module.counters}
            write_json(folder / _MARKER, {**counters, "settings": self.settings, "origin": self.origin})
            self._remove_others(folder)
        self.ranks.barrier()
        self.saved_step = module.steps_done

    def _remove_others(self, kept: Path | None) -> None:
        for folder in self.folder.glob("step_*"):
            if folder != kept:
                (folder / _MARKER).unlink(missing_ok=True)  # first, so that a half-removed folder is incomplete
                shutil.rmtree(folder, ignore_errors=True)

    def restart(self) -> None:
        """Remove the checkpoints of an earlier run in this folder, from which this run must never resume."""
        if self.ranks.main:
            self._remove_others(None)

    def restore(self, module: Resumable) -> bool:
        """Load the newest complete checkpoint into `module`; False if there is none.

        UserError if it was written with other settings, another model or other data; the message names them.
        """
        folder = self.newest()
        if folder is None:
            return False
        marker = read_json(folder / _MARKER)
        # A setting that is new since the checkpoint counts as unchanged, and one that no longer exists is ignored.
        then = {name: marker["settings"].get(name, value) for name, value in self.settings.items()}
        now = self.settings
        if self.ranks.main:  # only the main rank's origin is compared
            then, now = then | marker["origin"], now | self.origin
        refuse_other(str(self.folder), then, now, "train into a new run folder")
        for name, part in module.parts().items():
            load_part(folder / f"{name}.safetensors", part, module.optimizer)
        for name in module.counters:
            setattr(module, name, int(marker[name]))
        self.saved_step = module.steps_done
        if self.ranks.main:
            self._remove_others(folder)  # incomplete ones, and older ones left after a kill
        return True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save after every N-th step and after the last."""
        done = pl_module.steps_done
        if (self.every and done % self.every == 0) or done == self.last:
            self.save(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Save on Ctrl-C, SIGTERM or a damaged picture.

        Several ranks save when they have agreed to stop (`vlmscope.training.ranks`).
        """
        kept = isinstance(exception, KeyboardInterrupt | UserError)
        if kept and pl_module.steps_done and self.ranks.layout.world == 1:
            self.save(pl_module)

    def check_space(self, module: nn.Module) -> None:
        """UserError unless the disk has room for the new checkpoint next to the old one, and for the finished set."""
        if not self.ranks.main:
            return
        # Parameters and two moments, in float32; the finished set at most as large as the parameters.
        local = sum(4 * p.numel() for p in module.parameters())
        needed = local * self.ranks.layout.n_layers / len(self.ranks.layers) * (3 * (1 if self.newest() else 2) + 1)
        place = next(folder for folder in (self.folder, *self.folder.resolve().parents) if folder.exists())
        free = shutil.disk_usage(place).free
        if free < needed:
            raise UserError(
                f"{place} has {free / 1e9:.3g} GB free, and checkpoints and set take {needed / 1e9:.3g} GB; "
                "make room, or choose another hydra.run.dir"
            )


def part_state(part: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state that the coming steps of a part depend on: parameters, buffers and the optimiser's moments."""
    state: dict[str, Tensor] = {}
    stored: set[int] = set()
    for name, tensor in part.state_dict().items():
        value = tensor.detach().contiguous()
        # safetensors refuses to store shared memory twice, as that of tied weights.
        state[f"module.{name}"] = value.clone() if value.data_ptr() in stored and value.numel() else value
        stored.add(value.data_ptr())
    for name, parameter in part.named_parameters():
        for moment, value in optimizer.state.get(parameter, {}).items():
            state[f"optimizer.{moment}.{name}"] = torch.as_tensor(value).contiguous()
    return state


def load_part(path: Path, part: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load a file of `part_state` into the part and its optimiser."""
    try:
        state = load_file(path)
        part.load_state_dict(
            {name.removeprefix("module."): t for name, t in state.items() if name.startswith("module.")}
        )
    except (SafetensorError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            raise
        first = str(error).splitlines()[0][:200]
        raise UserError(f"checkpoint {path} does not fit this run ({first}): remove it or change the config") from error
    parameters = dict(part.named_parameters())
    for key, value in state.items():
        if key.startswith("optimizer."):
            _, moment, name = key.split(".", 2)
            parameter = parameters[name]
            optimizer.state[parameter][moment] = value.to(parameter.device)
