"""Checkpoints without pickle: safetensors for every tensor, JSON for the rest, replaced atomically.

A module takes part by counting its optimiser steps in `steps_done`, by drawing its data from the step number, so that
a resumed run continues with the very next batch, and by telling when it is `committing` a step. A checkpoint records
the run's origin, what decides the result by name (`vlmscope.core.artifacts`), and is continued only with the same.

Orrery: `checkpoint.safetensors` in the folder of a stage. Transcoders: `<run_dir>/transcoder_checkpoint/step_00000200/`
holds `layer_07.safetensors` (parameters, coordinates, clocks, moments) for every layer, written by its owner, and,
written last and by rank 0 alone, `complete.json` with the settings: a folder without it is no checkpoint. Only after
that are older folders removed, so a whole one always stands. Since layers are files, any number of ranks can go on.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from vlmscope.core.artifacts import atomic_path, plain, read_json, refuse_other, write_json
from vlmscope.core.errors import UserError, is_out_of_memory
from vlmscope.training.config import TranscoderTrainingConfig

if TYPE_CHECKING:
    from vlmscope.training.transcoder_training import TranscoderModule

_LOG = logging.getLogger(__name__)
_MARKER = "complete.json"
_UNRECORDED = "%s does not record its model and data: whether they are the same is not checked"


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


@contextmanager
def _fitting(path: Path) -> Iterator[None]:
    """Around reading a checkpoint: one line for a file that is missing, corrupt or of another shape."""
    try:
        yield
    except (SafetensorError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            raise
        first = str(error).splitlines()[0][:200]
        raise UserError(f"checkpoint {path} does not fit this run ({first}): remove it or change the config") from error


def _of_module(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): t for name, t in state.items() if name.startswith("module.")}


class ResumableCheckpoint(pl.Callback):
    """Save module and optimiser to `<folder>/checkpoint.safetensors` every `every` steps and when interrupted."""

    def __init__(self, folder: Path, every: int, resume: bool, origin: Mapping[str, Any]) -> None:
        self.path = Path(folder) / "checkpoint.safetensors"
        self.every, self.resume, self.origin = every, resume, origin

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
            self.save(trainer, pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Ctrl-C or SIGTERM keeps what was learnt, unless it came in the middle of a change of the weights."""
        if isinstance(exception, KeyboardInterrupt) and not pl_module.committing:
            self.save(trainer, pl_module)


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
    """Restore what `save_checkpoint` wrote (without an optimiser: parameters and step count only)."""
    with _fitting(path):
        state = load_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        if "origin" in metadata:
            refuse_other(str(path), json.loads(metadata["origin"]), origin)
        else:
            _LOG.warning(_UNRECORDED, path)
        module.load_state_dict(_of_module(state))
    if optimizer is not None:
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in state.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                moments.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
    module.steps_done = int(metadata["steps_done"])


class TranscoderCheckpoints(pl.Callback):
    """Writes a checkpoint every N steps, at the end, and (in a run of one process) when it is interrupted."""

    def __init__(self, run_dir: Path, config: TranscoderTrainingConfig, origin: Mapping[str, Any]) -> None:
        """`origin`: what decides the result besides `config`, by name (`vlmscope.core.artifacts`)."""
        self.folder = Path(run_dir) / "transcoder_checkpoint"
        self.config, self.origin = config, plain(origin)
        self.stands: int | None = None  # the step that this run has written or gone on from

    def newest(self) -> Path | None:
        """The folder of the newest whole checkpoint."""
        return max((marker.parent for marker in self.folder.glob(f"step_*/{_MARKER}")), default=None)

    def save(self, module: TranscoderModule) -> None:
        """Write this rank's layers; when every rank has, the marker."""
        ranks = module.ranks
        folder = self.folder / f"step_{module.steps_done:08d}"
        if self.stands == module.steps_done:  # known to every rank without a look at a disk that may lag behind
            return
        if ranks.writes:
            for layer in ranks.layers:
                state = layer_state(module, layer)
                size = sum(tensor.nbytes for tensor in state.values())
                with atomic_path(folder / f"layer_{layer:02d}.safetensors", size) as temporary:
                    save_file(state, temporary)
        ranks.barrier()
        if ranks.main:
            done = {"steps_done": module.steps_done, "tokens_seen": module.tokens_seen}
            write_json(folder / _MARKER, {**done, "settings": self.config.settings(), "origin": self.origin})
            self._remove_others(folder)
        ranks.barrier()
        self.stands = module.steps_done

    def _remove_others(self, folder: Path | None) -> None:
        for other in self.folder.glob("step_*"):
            if other != folder:
                (other / _MARKER).unlink(missing_ok=True)
                shutil.rmtree(other, ignore_errors=True)

    def restart(self, module: TranscoderModule) -> None:
        """Remove the checkpoints of an earlier run in this folder, so that none is found when this one resumes."""
        if module.ranks.main:
            self._remove_others(None)

    def restore(self, module: TranscoderModule) -> bool:
        """Load the newest whole checkpoint into `module`; False when there is none.

        One that was written with other settings, another model or other data is refused, each by name.
        """
        folder = self.newest()
        if folder is None:
            return False
        marker = read_json(folder / _MARKER)
        now = plain(self.config.settings())
        # A setting that an older version did not know is at its default; one that this version does not know is gone.
        known = TranscoderTrainingConfig().settings() | marker["settings"]
        then = {name: known[name] for name in now}
        # All ranks have the same, and the main one has looked.
        if module.ranks.main and "origin" in marker:
            then, now = then | marker["origin"], now | self.origin
        elif "origin" not in marker:
            _LOG.warning(_UNRECORDED, folder)
        refuse_other(str(self.folder), then, now, "train into a new run folder")
        for layer in module.ranks.layers:
            load_layer(folder / f"layer_{layer:02d}.safetensors", module, layer)
        module.steps_done, module.tokens_seen = int(marker["steps_done"]), int(marker["tokens_seen"])
        self.stands = module.steps_done
        if module.ranks.main:
            self._remove_others(folder)  # half ones, and older ones that a kill left
        return True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save after every N-th step and after the last."""
        done, every = pl_module.steps_done, self.config.trainer.checkpoint_every
        if (every and done % every == 0) or done == self.config.trainer.max_steps:
            self.save(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Ctrl-C or a damaged picture keeps what was learnt, unless it came in the middle of a change of the state.

        Several ranks save when they have agreed to stop (`vlmscope.training.ranks`).
        """
        kept = isinstance(exception, KeyboardInterrupt | UserError) and not pl_module.committing
        if kept and pl_module.steps_done and pl_module.ranks.layout.world == 1:
            self.save(pl_module)

    def check_space(self, module: TranscoderModule) -> None:
        """Refuse to begin what the disk cannot hold: the new checkpoint beside the old one, and the finished set."""
        if not module.ranks.main:
            return
        # Parameters and two moments, in float32; the finished set at most as large as the parameters.
        own = sum(4 * p.numel() for p in module.parameters())
        needed = own * module.ranks.layout.n_layers / len(module.ranks.layers) * (3 * (1 if self.newest() else 2) + 1)
        place = next(folder for folder in (self.folder, *self.folder.resolve().parents) if folder.exists())
        free = shutil.disk_usage(place).free
        if free < needed:
            raise UserError(
                f"{place} has {free / 1e9:.3g} GB free, and checkpoints and set take {needed / 1e9:.3g} GB; "
                "make room, or choose another hydra.run.dir"
            )


def layer_state(module: TranscoderModule, layer: int) -> dict[str, torch.Tensor]:
    """Everything that the coming steps of a layer depend on."""
    trainer = module.layer(layer)
    state = {f"module.{name}": tensor.detach().contiguous() for name, tensor in trainer.state_dict().items()}
    for name, parameter in trainer.named_parameters():
        for moment, value in module.optimizer.state.get(parameter, {}).items():
            state[f"optimizer.{moment}.{name}"] = torch.as_tensor(value).contiguous()
    return state


def load_layer(path: Path, module: TranscoderModule, layer: int) -> None:
    """Restore what `layer_state` gave."""
    trainer = module.layer(layer)
    with _fitting(path):
        state = load_file(path)
        trainer.load_state_dict(_of_module(state))
    parameters = dict(trainer.named_parameters())
    for key, value in state.items():
        if key.startswith("optimizer."):
            _, moment, name = key.split(".", 2)
            parameter = parameters[name]
            module.optimizer.state[parameter][moment] = value.to(parameter.device)
