"""Training by eai-sparsify's own Trainer, for `benchmarks/training.py`."""

import contextlib
import io
import sys
import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from training_clock import Clock, Judge


class _Batches:
    """Rows of ids as the peer's dataset, reading the clock before each batch."""

    def __init__(self, ids: Tensor, batch: int, clock: Clock) -> None:
        self.ids, self.batch, self.clock = ids, batch, clock

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if i % self.batch == 0:
            self.clock.read()
        return {"input_ids": self.ids[i]}


class _Memory(nn.Module):
    """An MLP that looks its output up: [1, N, d], for the numbers of the batch's tokens that the model was given."""

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.y, self.rows = y, torch.zeros(1, dtype=torch.long)

    def forward(self, x: Tensor) -> Tensor:
        return self.y[self.rows][None]


class ReplayModel(nn.Module):
    """What the peer's Trainer asks of a model; `input_ids` [1, N] are numbers of captured tokens."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__()
        self.x, self.mlp = x, _Memory(y)
        self.dummy_inputs = {"input_ids": torch.zeros(1, 4, dtype=torch.long)}
        self.device = torch.device("cpu")

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        self.mlp.rows = input_ids[0]
        return self.mlp(self.x[input_ids[0]][None])


def peer(
    job: dict[str, Any], model: Any, ids: Tensor, batch: int, hookpoints: dict[str, int], judge: Judge
) -> dict[str, Any]:
    """Train by sparsify's own Trainer: its defaults, or its Adam with our warm-up (its own 1,000 steps outlast us)."""
    sys.path.insert(0, job["peer_site"])
    with contextlib.redirect_stdout(io.StringIO()):
        from sparsify import SparseCoderConfig, TrainConfig, Trainer  # pyright: ignore[reportMissingImports]

    coder = SparseCoderConfig(num_latents=job["latents"], k=job["k"], transcode=True)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            coder,
            batch_size=batch,
            optimizer=job["optimizer"],
            lr=job.get("lr"),
            lr_warmup_steps=max(1, job["steps"] // 10),
            hookpoints=list(hookpoints),
            log_to_wandb=False,
            save_every=10**9,
            save_dir=folder,
        )

        def judged() -> float:
            averaged = job["optimizer"] == "signum"  # schedule-free: judged and saved with its averaged weights
            if averaged:
                trainer.optimizers[0].eval()
            found = judge(lambda layer, x: trainer.saes[names[layer]](x).sae_out)
            if averaged:
                trainer.optimizers[0].train()
            return found

        names = {layer: name for name, layer in hookpoints.items()}
        clock = Clock(job, judged)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer = Trainer(config, _Batches(ids, batch, clock), model)
            trainer.save = clock.read
            trainer.fit()
    assert len(clock.seconds) == job["steps"] + 1, len(clock.seconds)
    return clock.record()
