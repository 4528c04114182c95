"""One measurement of `benchmarks/training.py`, alone in a process: reads a job as JSON, prints a record as JSON.

A run's clock is read whenever its next batch is asked for, by both trainers, so a step is all that lies between:
fetching, forward, backward, optimiser and bookkeeping. Judging on other tokens stops the clock.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import training_data
import training_kernels
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from training_clock import Clock, Judge, fvu_judge
from training_data import Activations
from training_peer import ReplayModel, peer

from vlmscope.training.config import (
    OptimConfig,
    RecipeConfig,
    TrainerConfig,
    TranscoderArchConfig,
    TranscoderTrainingConfig,
)

# `optim=short` at a rate chosen on seed 0 of one layer, pictures, 60 steps: 0.106; 1e-2 0.110, 2.5e-2 0.112.
LEARNING_RATE, BETAS, SCHEDULE = 1.5e-2, (0.5, 0.95), "linear"


def memory(field: str) -> int:
    """VmRSS or VmHWM (its peak) of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


# Ours


class _Ticking(IterableDataset[Any]):
    """Batches of a stream, reading the clock before each."""

    def __init__(self, stream: Callable[[], Iterator[Any]], clock: Callable[[], Clock]) -> None:
        self.stream, self.clock = stream, clock

    def __iter__(self) -> Iterator[Any]:
        batches = self.stream()
        while True:
            self.clock().read()
            try:
                yield next(batches)
            except StopIteration:
                return


def settings(job: dict[str, Any], width: int) -> TranscoderTrainingConfig:
    """Our recipe for a job: `optim=short` at that rate, its warm-up cut to a tenth of the run."""
    warmup = max(1, min(100, job["steps"] // 10))
    return TranscoderTrainingConfig(
        TranscoderArchConfig(expansion_factor=job["latents"] // width, k=job["k"]),
        OptimConfig(lr=LEARNING_RATE, betas=list(BETAS), schedule=SCHEDULE, warmup=warmup),
        TrainerConfig(max_steps=job["steps"], precision=job.get("precision", "32")),
        RecipeConfig(pool_batches=job.get("pool", 8), steps_per_batch=job.get("each", 2)),
    )


def ours(
    job: dict[str, Any],
    adapter: Any,
    first: Callable[[], list[Any]],
    stream: Callable[[Any, TranscoderTrainingConfig], Iterator[Any]],
    judge: Judge,
) -> dict[str, Any]:
    """Train by `TranscoderModule` under Lightning; `first` gives the batches of the starting point."""
    import pytorch_lightning as pl

    from vlmscope.training.transcoder_training import TranscoderModule

    config = settings(job, adapter.d_model)
    module = TranscoderModule(adapter, config)

    def reconstruct(layer: int, x: Tensor) -> Tensor:
        if layer not in folded:
            folded[layer] = module.layer(layer).folded()
        return folded[layer](x).reconstruction

    def judged() -> float:
        folded.clear()
        return judge(reconstruct)

    folded: dict[int, Any] = {}
    clock = Clock(job, judged)
    module.initialise(first())
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, DataLoader(_Ticking(lambda: stream(adapter, config), lambda: clock), batch_size=None))
    assert len(clock.seconds) == config.trainer.max_steps + 1
    return clock.record()


class Replay:
    """Stands for the frozen model where activations come from disk: what `TranscoderModule` asks an adapter."""

    def __init__(self, n_layers: int, d_model: int) -> None:
        self.n_layers, self.d_model, self.site = n_layers, d_model, "decoder"
        self.model, self.device = nn.Module(), torch.device("cpu")


def replayed(by_layer: dict[int, tuple[Tensor, Tensor]], order: Tensor) -> Iterator[Any]:
    """A batch for each row of token numbers [steps, N]."""
    from vlmscope.training.batches import LayerActivations

    for rows in order:
        parts = {layer: (x[rows], y[rows]) for layer, (x, y) in by_layer.items()}
        yield LayerActivations(parts, torch.zeros(len(rows), dtype=torch.bool))


# Jobs


def on_pictures(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One layer on captured activations; both trainers see the same tokens in the same order."""
    data: Activations = training_data.pictures(folder)
    if job["width"] != data.x.shape[1]:
        data = data.wide(job["width"])
    g = torch.Generator().manual_seed(job["rep"])
    epochs = -(-job["steps"] * job["batch"] // len(data.x))
    order = torch.cat([torch.randperm(len(data.x), generator=g) for _ in range(epochs)])
    order = order[: job["steps"] * job["batch"]].view(job["steps"], job["batch"])
    judge = fvu_judge({0: (data.x_val, data.y_val)})
    before = memory("VmRSS")
    if job["who"] == "peer":
        found = peer(job, ReplayModel(data.x, data.y), order, 1, {"mlp": 0}, judge)
    else:
        by_layer = {0: (data.x, data.y)}
        first = lambda: list(replayed(by_layer, order[:8]))  # noqa: E731
        adapter = Replay(1, job["width"])
        found = ours(job, adapter, first, lambda _adapter, _config: replayed(by_layer, order), judge)
    return {**found, "tokens": job["batch"], "before": before, "peak": memory("VmHWM")}


def on_text(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """All layers of Orrery, end to end on packed text."""
    from vlmscope.api import load
    from vlmscope.training.batches import collect
    from vlmscope.training.captures import ActivationStream, Captures

    vlm = load("orrery").vlm
    train, val = training_data.text(folder)
    rows = job["batch"] // train.shape[1]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(job["rep"]))
    ids = train[order[torch.arange(job["steps"] * rows) % len(train)]]
    with torch.no_grad():
        judge = fvu_judge(collect(vlm.adapter, {"input_ids": val}).by_layer)
    before = memory("VmRSS")
    if job["who"] == "peer":
        modules = {id(vlm.adapter.mlp(layer)): layer for layer in range(vlm.adapter.n_layers)}
        named = vlm.model.base_model.named_modules()
        hookpoints = {name: modules[id(module)] for name, module in named if id(module) in modules}
        found = peer(job, vlm.model, ids, rows, hookpoints, judge)
    else:
        batch_of = lambda n: {"input_ids": ids[n * rows : (n + 1) * rows]}  # noqa: E731
        stream = lambda adapter, config: iter(ActivationStream(Captures(adapter, batch_of), config, lambda: 0))  # noqa: E731
        first = lambda: [collect(vlm.adapter, batch_of(n)) for n in range(8)]  # noqa: E731
        found = ours(job, vlm.adapter, first, stream, judge)
    return {**found, "tokens": job["batch"], "before": before, "peak": memory("VmHWM")}


def layers_together(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Seconds a step of all layers at once, and the sum of those of each layer alone; no model's forward in either."""
    data = training_data.layers(folder)
    order = torch.arange(job["steps"] * job["batch"]).view(job["steps"], -1) % len(data[0][0])

    def step_s(by_layer: dict[int, tuple[Tensor, Tensor]]) -> float:
        adapter = Replay(len(by_layer), by_layer[0][0].shape[1])
        first = lambda: list(replayed(by_layer, order[:4]))  # noqa: E731
        return ours(job, adapter, first, lambda *_: replayed(by_layer, order), lambda _f: 0.0)["step_s"]

    together = step_s(data)
    return {"together_s": together, "alone_s": sum(step_s({0: pair}) for pair in data.values())}


def kernels(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The coder's step without the optimiser against what it must multiply and move, and against the peer's."""
    data = training_data.pictures(folder)
    data = data if job["width"] == data.x.shape[1] else data.wide(job["width"])
    return training_kernels.measure(job, data)


STAGES = {"pictures": on_pictures, "text": on_text, "layers": layers_together, "kernels": kernels}

if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    torch.manual_seed(asked["rep"])
    result = STAGES[asked["stage"]](asked, Path(asked["folder"]))
    print("RECORD " + json.dumps({**asked, **result}))
