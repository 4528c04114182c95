"""Checkpoints of transcoder training: safetensors for parameters, moments and counters, JSON for the settings.

Tokens are drawn by step number, so the step is all that resuming needs to know about the data.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from vlmscope.core.artifacts import read_json, write_json
from vlmscope.core.errors import UserError
from vlmscope.training.resume import load_checkpoint, save_checkpoint
from vlmscope.training.transcoder_config import TranscoderTrainingConfig
from vlmscope.training.transcoder_module import TranscoderModule

# Settings that may change between a run and its continuation, since no number depends on them.
_FREE = {"checkpoint_every", "val_every", "log_every"}


class TranscoderCheckpoints(pl.Callback):
    """Writes `<run_dir>/transcoder_checkpoint/` every N steps, at the end, and when the run is interrupted."""

    def __init__(self, run_dir: Path, config: TranscoderTrainingConfig) -> None:
        self.folder = Path(run_dir) / "transcoder_checkpoint"
        self.config = config

    @property
    def path(self) -> Path:
        """The tensors."""
        return self.folder / "state.safetensors"

    def save(self, module: TranscoderModule) -> None:
        """Write settings, then tensors (a folder with tensors is a whole checkpoint)."""
        write_json(self.folder / "settings.json", dataclasses.asdict(self.config))
        save_checkpoint(self.path, module, module.optimizer)

    def restore(self, module: TranscoderModule) -> bool:
        """Load the newest checkpoint into `module`; False when there is none.

        Raises:
            UserError: when it was written with other settings (each is named) or cannot be read.
        """
        if not self.path.is_file():
            return False
        then = read_json(self.folder / "settings.json")
        now = json.loads(json.dumps(dataclasses.asdict(self.config)))
        changed = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
        changed = [f"{name} {then.get(name)} -> {now.get(name)}" for name in changed if name not in _FREE]
        if changed:
            raise UserError(
                f"{self.folder} was written with other settings ({', '.join(changed)}); "
                "restore them, or train into a new run folder"
            )
        load_checkpoint(self.path, module, module.optimizer)
        return True

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save after every N-th step and after the last."""
        done = pl_module.steps_done
        every = self.config.checkpoint_every
        if (every and done % every == 0) or done == self.config.max_steps:
            self.save(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Ctrl-C or a damaged picture keeps what was learnt, unless it came in the middle of a change of the state."""
        if isinstance(exception, KeyboardInterrupt | UserError) and not pl_module.committing and pl_module.steps_done:
            self.save(pl_module)
