"""The one call that trains a transcoder set: start or resume, fit with Lightning, evaluate."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader
from tqdm import tqdm

from vlmscope.core.errors import NotMainRank
from vlmscope.models.loading import VLM
from vlmscope.models.placement import model_fingerprint, tensors_fingerprint
from vlmscope.scope import Scope
from vlmscope.training.batches import Batch, OwnPart, forwards
from vlmscope.training.captures import ActivationStream, CacheSettings, Captures, open_captures
from vlmscope.training.config import TranscoderTrainingConfig
from vlmscope.training.evaluation import evaluate_transcoders
from vlmscope.training.ranks import AgreedStop, Ranks
from vlmscope.training.resume import TranscoderCheckpoints, fit_or_interrupt
from vlmscope.training.transcoder_module import TranscoderModule
from vlmscope.transcoders.transcoder import TranscoderSet

_LOG = logging.getLogger(__name__)


def train_transcoders(
    vlm: VLM,
    train_batch: Callable[[int], Batch],
    val_batches: Sequence[Batch],
    config: TranscoderTrainingConfig,
    run_dir: str | Path,
    logger: Logger | None = None,
    resume: bool = False,
    model_name: str | None = None,
    per_host: int | None = None,
    data_figures: Callable[[], Mapping[str, float]] = dict,
    cache: CacheSettings | None = None,
    origin: Mapping[str, Any] | None = None,
) -> tuple[TranscoderSet, dict[str, float]]:
    """Train the transcoders of all layers of a frozen model.

    Args:
        vlm: a loaded model; its parameters are frozen and it is set to evaluation.
        train_batch: batch number 0, 1, ... of the data, a pure function of the number, so that a resumed run sees the
            same data. What a batch is: `vlmscope.training.batches`.
        val_batches: batches for the figures of `vlmscope.training.evaluation`.
        config: settings.
        run_dir: where checkpoints go.
        logger: a Lightning logger, or None.
        resume: continue from the checkpoint in `run_dir` if there is one.
        model_name: written into the set; by default the loaded model's own name.
        per_host: processes that share a host, where a `torch.distributed` group is open (docs/scaling.md); None: all.
        data_figures: what is to be logged about the data that were drawn so far, such as each source's share.
        origin: what decides the result besides `config`, by name; the same is needed to resume (`vlmscope.core.origin`;
            the main rank's counts). None: the model's weights and batch 0.
        cache: where captured activations are kept for this and other runs (`vlmscope.training.captures`).

    Returns:
        The set in the model's own coordinates, and its final figures with `perf/tokens_per_s` and `train/tokens`, those
        of all sessions of the run.

    Raises:
        UserError: for impossible settings, a checkpoint or a cache that does not belong to them, or a full disk.
        NotMainRank: on every rank but 0 when training is done, since rank 0 alone has the set.
        KeyboardInterrupt: after Ctrl-C; the state is saved and `resume` goes on from it.
    """
    config.check()
    adapter = vlm.adapter
    name = model_name if model_name is not None else vlm.name
    ranks = Ranks.current(adapter, per_host)
    module = TranscoderModule(adapter, config, name, ranks).to(adapter.device)
    if origin is None:
        first = train_batch(0)
        # A rank's own part of it depends on how many ranks there are.
        known = {} if isinstance(first, OwnPart) else {"batch 0": tensors_fingerprint(forwards(first))}
        origin = {"model": model_fingerprint(adapter.model), **known}
    checkpoints = TranscoderCheckpoints(Path(run_dir), config, origin)
    restored = resume and checkpoints.restore(module)
    if not restored:
        checkpoints.restart(module)
    captures = open_captures(adapter, train_batch, config, ranks, cache, data_figures)
    if not restored:
        module.initialise([captures(number) for number in range(config.init_batches)])
    checkpoints.check_space(module)
    logger = logger if ranks.main else None
    progress = _Progress(vlm, config, val_batches, logger, captures.figures)
    if module.steps_done < config.max_steps:
        # The stop is asked for last, when the step has been written if it was to be.
        stop = [AgreedStop(checkpoints.save)] if ranks.layout.world > 1 else []
        _fit(module, captures, [progress, checkpoints, *stop], logger)
    last = module.figures({})
    stopped = last["train/stopped_layers"]
    transcoders = module.finished_set()
    if ranks.layout.world == 1:
        transcoders = transcoders.to(adapter.device)  # Lightning leaves the module on the CPU
    if restored:  # figures are those up to the last batches, which an earlier session may have drawn
        for number in dict.fromkeys((config.batches - 1, (config.max_steps - 1) // config.steps_per_batch)):
            captures(number)
    drawn = captures.figures()  # of all ranks, so all ask
    if not ranks.main:
        raise NotMainRank
    metrics = evaluate_transcoders(Scope(vlm, transcoders), val_batches) if val_batches else {}
    metrics |= {**progress.speed(), **drawn, "train/tokens": float(module.tokens_seen)}
    metrics |= {name: last[name] for name in ("train/stopped_layers", "train/filtered_frac") if name in last}
    if stopped:
        _LOG.warning("%d layers stopped early; the set has their last good weights", int(stopped))
    if logger is not None:
        logger.log_metrics(metrics, step=module.steps_done)
    return transcoders, metrics


def _fit(
    module: TranscoderModule,
    captures: Captures,
    callbacks: list[pl.Callback],
    logger: Logger | None,
) -> None:
    stream = ActivationStream(captures, module.config, lambda: module.steps_done)
    device = module.adapter.device  # activations are captured there, so the transcoders must be there too
    on_gpu = device.type == "cuda"
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="gpu" if on_gpu else "cpu",
        devices=[device.index or 0] if on_gpu else 1,
        # Each rank is a run of its own to Lightning: its layers are not those of the others (docs/adr/001).
        strategy=SingleDeviceStrategy(torch.device(device)) if module.ranks.layout.world > 1 else "auto",
        plugins=[LightningEnvironment()] if module.ranks.layout.world > 1 else None,
        callbacks=callbacks,
        logger=logger if logger is not None else False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    fit_or_interrupt(trainer, module, DataLoader(stream, batch_size=None, num_workers=0))


class _Progress(pl.Callback):
    """A bar with rate and remaining time, training figures every `log_every` steps, validation every `val_every`."""

    def __init__(
        self,
        vlm: VLM,
        config: TranscoderTrainingConfig,
        val_batches: Sequence[Batch],
        logger: Logger | None,
        data_figures: Callable[[], Mapping[str, float]],
    ) -> None:
        self.vlm, self.config, self.val_batches = vlm, config, val_batches
        self.logger, self.data_figures = logger, data_figures
        self.tokens, self.seconds, self.began = 0, 0.0, 0.0
        self.bar: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Open the bar at the step where training goes on."""
        self.bar = tqdm(
            total=self.config.max_steps,
            initial=pl_module.steps_done,
            desc="transcoders",
            unit="step",
            mininterval=1.0,
            disable=not pl_module.ranks.main,
        )
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count, log and validate; the time of validation is not training time."""
        self.seconds += time.perf_counter() - self.began
        self.tokens += outputs["tokens"]
        self.bar.update()
        done = pl_module.steps_done
        if self.config.log_every and done % self.config.log_every == 0:
            figures = pl_module.figures(outputs["fvu"])
            fvu, dead = figures.get("train/fvu", math.nan), figures["train/dead_frac"]
            self.bar.set_postfix(fvu=f"{fvu:.4f}", dead=f"{dead:.3f}")
            self._log({**figures, **self.speed(), **self.data_figures()}, done)
        due = self.config.val_every and done % self.config.val_every == 0 and done < self.config.max_steps
        if due and self.val_batches:
            transcoders = pl_module.finished_set()
            if pl_module.ranks.main:
                self._log(evaluate_transcoders(Scope(self.vlm, transcoders), self.val_batches), done)
        if pl_module.ranks.layout.world == 1 and not any(pl_module.layer(n).running for n in pl_module.ranks.layers):
            trainer.should_stop = True  # nothing is left to learn
        self.began = time.perf_counter()

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Close the bar."""
        self.bar.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Close the bar, so that the message stands on its own line."""
        if self.bar is not None:
            self.bar.close()

    def speed(self) -> dict[str, float]:
        """Tokens a second of training, data and forward included; nothing when no step was taken."""
        return {"perf/tokens_per_s": self.tokens / self.seconds} if self.seconds else {}

    def _log(self, figures: dict[str, float], step: int) -> None:
        if self.logger is not None:
            self.logger.log_metrics(figures, step=step)
