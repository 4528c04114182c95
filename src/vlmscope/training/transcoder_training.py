"""Training of the transcoders of all layers at once, on activations that the frozen model computes on the fly.

Layers share only the forward of the model: each has its own parameters, loss and gradient norm
(`vlmscope.training.layer_trainer`), so different ranks may own them (`vlmscope.training.ranks`), and one that diverges
stops alone. The layers of a cross-layer set share a loss, so they are on one rank and stop together.

`train_transcoders` does it all: start or resume, fit with Lightning, evaluate.
"""

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
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from vlmscope.core.errors import NotMainRank, UserError
from vlmscope.models.base import Stack, stack_of
from vlmscope.models.checkpoint import model_fingerprint, tensors_fingerprint
from vlmscope.models.loading import VLM
from vlmscope.scope import Scope
from vlmscope.training.batches import Batch, LayerActivations, OwnPart, forwards
from vlmscope.training.captures import ActivationStream, Captures
from vlmscope.training.config import TranscoderTrainingConfig, rate_factor
from vlmscope.training.evaluation import ErrorMeter, evaluate_transcoders
from vlmscope.training.layer_trainer import LayerStep, LayerTrainer, cross_layer_losses, differentiate
from vlmscope.training.ranks import AgreedStop, Ranks
from vlmscope.training.resume import Checkpoints, fit_or_interrupt, uninterrupted
from vlmscope.transcoders.config import HOOKS, TranscoderConfig, TranscoderSetConfig
from vlmscope.transcoders.transcoder import Transcoder, TranscoderSet

_LOG = logging.getLogger(__name__)
_LR_FLOOR = 0.01  # of the peak rate, at the last step


class TranscoderModule(pl.LightningModule):
    """The trainers of this rank's layers, with one optimiser."""

    counters: tuple[str, ...] = ("steps_done", "tokens_seen")
    optimizer: torch.optim.Optimizer

    def __init__(
        self, stack: Stack, config: TranscoderTrainingConfig, model_name: str = "", ranks: Ranks | None = None
    ) -> None:
        super().__init__()
        self.ranks = ranks if ranks is not None else Ranks.single(stack.n_layers)
        self.cross_layer = config.transcoder.cross_layer
        if self.cross_layer and len(self.ranks.layers) < stack.n_layers:
            raise UserError("cross-layer transcoders couple all layers, so one process trains them; start one")
        self.automatic_optimization = False
        self.config, self.model_name = config, model_name
        self.steps_done, self.tokens_seen = 0, 0
        self._frozen = (stack,)  # a tuple hides the frozen model from nn.Module, which would save and count it
        stack.model.requires_grad_(False).eval()
        # Only the product is in bfloat16: float32 weights keep updates that bfloat16 would round away.
        half = torch.bfloat16 if config.trainer.precision == "bf16-mixed" else None
        layers = {str(n): LayerTrainer(self._architecture(n), config.recipe, half) for n in self.ranks.layers}
        self.trainers = nn.ModuleDict(layers)
        optim = config.optim
        betas = (optim.betas[0], optim.betas[1])
        self.optimizer = torch.optim.AdamW(
            self.parameters(), lr=optim.lr, betas=betas, weight_decay=optim.weight_decay, fused=True
        )

    def _architecture(self, layer: int) -> TranscoderConfig:
        chosen, width = self.config.transcoder, self.stack.d_model
        return TranscoderConfig(
            d_model=width,
            n_features=chosen.expansion_factor * width,
            k=chosen.k,
            layer=layer,
            activation=chosen.activation,
            skip=chosen.skip,
            bandwidth=chosen.bandwidth,
            input_hook=HOOKS[self.stack.site][0],
            output_hook=HOOKS[self.stack.site][1],
            writes=self.stack.n_layers - layer if chosen.cross_layer else 1,
        )

    @property
    def groups(self) -> list[list[int]]:
        """This rank's layers, grouped by shared loss."""
        return [self.ranks.layers] if self.cross_layer else [[layer] for layer in self.ranks.layers]

    @property
    def stack(self) -> Stack:
        """The layers of the frozen model whose MLPs are imitated."""
        return self._frozen[0]

    def layer(self, layer: int) -> LayerTrainer:
        """The trainer of one layer."""
        trainer = self.trainers[str(layer)]
        assert isinstance(trainer, LayerTrainer)
        return trainer

    def parts(self) -> dict[str, LayerTrainer]:
        """The layers' trainers, by the names of their files in a checkpoint."""
        return {f"layer_{layer:02d}": self.layer(layer) for layer in self.ranks.layers}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser, which exists before fitting so that a checkpoint can be loaded into it."""
        return self.optimizer

    def initialise(self, batches: list[LayerActivations]) -> None:
        """Set standardisation and starting point of every layer from the tokens of `batches`."""
        for group in self.groups:
            targets: list[Tensor] = []  # of the layers from the current one upwards
            for layer in reversed(group):
                trainer = self.layer(layer)
                x, y = (torch.cat([batch.by_layer[layer][side] for batch in batches]).float() for side in (0, 1))
                trainer.standardise(x, y)
                x, y = trainer.standard.apply(x, y)
                # In a cross-layer set m + 1 layers write to layer m, each with an equal share at the start.
                targets = [y / (layer + 1) if self.cross_layer else y, *targets]
                trainer.start(x, targets, self.config.trainer.seed)

    def rate(self) -> float:
        """The learning rate of the coming step."""
        optim, steps = self.config.optim, self.config.trainer.max_steps
        return optim.lr * rate_factor(self.steps_done, steps, optim.warmup, _LR_FLOOR, optim.schedule)

    def transfer_batch_to_device(
        self, batch: LayerActivations, device: torch.device, dataloader_idx: int
    ) -> LayerActivations:
        """Nothing to do: activations are already on the model's device."""
        return batch

    def training_step(self, batch: LayerActivations, batch_idx: int) -> dict[str, Any]:
        """One step of every layer that still learns; returns the figures that the callbacks log."""
        self.optimizer.zero_grad(set_to_none=True)
        steps: dict[int, LayerStep] = {}
        troubles: dict[int, str] = {}
        for group in self.groups:
            trainers = {layer: self.layer(layer) for layer in group}
            if not all(trainer.running for trainer in trainers.values()):
                continue
            # In training mode BatchTopK moves its threshold, which a refused step must not keep.
            buffers = [buffer for trainer in trainers.values() for buffer in trainer.transcoder.buffers()]
            before = [buffer.clone() for buffer in buffers]
            # Differentiate group by group, so that only one group's graph is in memory.
            taken = self._differentiated(trainers, batch.by_layer)
            wrong = self._clipped(trainers, taken)
            if not wrong:
                steps |= taken
                continue
            cause = min(wrong, key=lambda layer: math.isfinite(taken[layer].loss))
            troubles |= {layer: wrong[layer] if layer == cause else f"with layer {cause}" for layer in group}
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)
            for trainer in trainers.values():
                trainer.zero_grad(set_to_none=True)  # the optimiser skips parameters without gradients
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self._commit(steps, troubles, batch.n_tokens)
        return {"fvu": {layer: taken.fvu for layer, taken in steps.items()}, "tokens": batch.n_tokens}

    def _differentiated(
        self, trainers: Mapping[int, LayerTrainer], by_layer: Mapping[int, tuple[Tensor, Tensor]]
    ) -> dict[int, LayerStep]:
        """Add the gradients of a group's loss to its layers' parameters, from raw activations ([N, d], [N, d])."""
        backward = self.manual_backward
        if not self.cross_layer:
            return {n: differentiate(trainer, *by_layer[n], backward) for n, trainer in trainers.items()}
        losses = cross_layer_losses(trainers, by_layer)
        backward(torch.stack([loss for loss, _, _ in losses.values()]).sum())
        return {
            n: LayerStep(float(loss.detach()), float(fvu.detach()), trainers[n].fired(out), len(out.reconstruction))
            for n, (loss, fvu, out) in losses.items()
        }

    def _clipped(self, trainers: Mapping[int, LayerTrainer], steps: Mapping[int, LayerStep]) -> dict[int, str]:
        """Clip gradients; returns what is wrong with a step, for the layers with a problem."""
        wrong: dict[int, str] = {}
        for layer, trainer in trainers.items():
            norm = nn.utils.clip_grad_norm_(trainer.parameters(), self.config.recipe.clip)
            trouble = trainer.trouble(steps[layer].loss, float(norm))
            if trouble is not None:
                wrong[layer] = trouble
        return wrong

    def _commit(self, steps: dict[int, LayerStep], troubles: dict[int, str], tokens: int) -> None:
        """Change the state, here and nowhere else: an interrupt at any other point leaves a state that can be saved."""
        with uninterrupted():
            optimizer = self.optimizers()  # Lightning's wrapper, which counts the step
            assert not isinstance(optimizer, list)
            optimizer.step()
            for layer, taken in steps.items():
                self.layer(layer).note(taken, self.steps_done)
            for layer, trouble in troubles.items():
                self.layer(layer).stopped.fill_(self.steps_done)
                _LOG.warning(
                    "layer %d stopped before step %d (%s); it keeps its weights, layers not named go on",
                    layer, self.steps_done + 1, trouble,
                )  # fmt: skip
            self.tokens_seen += tokens
            self.steps_done += 1

    def figures(self, fvus: dict[int, float]) -> dict[str, float]:
        """Training figures over all layers, from the FVU of this rank's layers in a step; all ranks must call it."""
        after = self.config.recipe.dead_after_tokens
        trainers = {layer: self.layer(layer) for layer in self.ranks.layers}
        dead = self.ranks.by_layer({n: float((t.silent >= after).double().mean()) for n, t in trainers.items()})
        running = self.ranks.by_layer({n: float(trainer.running) for n, trainer in trainers.items()})
        joint = self.ranks.by_layer(fvus)
        learning = [joint[layer] for layer, runs in running.items() if runs and layer in joint]
        figures = {"train/fvu": sum(learning) / len(learning)} if learning else {}
        figures["train/dead_frac"] = sum(dead.values()) / len(dead)
        figures["train/stopped_layers"] = float(sum(not runs for runs in running.values()))
        return figures

    def finished_set(self) -> TranscoderSet:
        """The current transcoders in the model's own coordinates, without gradients; all ranks must call it.

        Rank 0 receives all layers, each other rank keeps its own. With several ranks the set is in CPU memory, since
        together the layers may not fit one device.
        """
        folded = {}
        for layer in range(self.stack.n_layers) if self.ranks.main else self.ranks.layers:
            if layer in self.ranks.layers:
                later = range(layer + 1, layer + self._architecture(layer).writes)
                folded[layer] = self.layer(layer).folded([self.layer(target).standard.y_scale for target in later])
            else:
                folded[layer] = Transcoder(self._architecture(layer)).requires_grad_(False).to(self.stack.device)
            self.ranks.to_main(folded[layer].state_dict(), layer)
            if self.ranks.layout.world > 1:
                folded[layer] = folded[layer].cpu()
        chosen = self.config.transcoder
        hooks = HOOKS[self.stack.site]
        config = TranscoderSetConfig(self.stack.n_layers, chosen.k, chosen.activation, self.model_name, *hooks)
        return TranscoderSet(folded, config)


def train_transcoders(
    vlm: VLM,
    train_batch: Callable[[int], Batch],
    val_batches: Sequence[Batch],
    config: TranscoderTrainingConfig,
    run_dir: str | Path,
    logger: Logger | None = None,
    model_name: str | None = None,
    data_figures: Callable[[], Mapping[str, float]] = dict,
    origin: Mapping[str, Any] | None = None,
    job: str = "",
) -> tuple[TranscoderSet, dict[str, float]]:
    """Train the transcoders of all layers of a site of a frozen model, or resume; then evaluate them.

    `trainer.resume` resumes the run in `run_dir`.

    `train_batch` returns batch number 0, 1, ... of the data (`vlmscope.training.batches`), a pure function of the
    number, so that a resumed run sees the same data; `val_batches` are for the figures of
    `vlmscope.training.evaluation`. Checkpoints go into `run_dir`. The processes of an open
    `torch.distributed` group train together. `data_figures` returns figures to log about the data drawn so
    far, such as each source's share. `origin` names what decides the result besides `config`, and must be the same to
    resume (only the main rank's is compared); None: the model's weights and batch 0. `job` names the run on its
    progress bar.

    Returns the set in the model's own coordinates, and its final figures with `perf/tokens_per_s` and `train/tokens`
    (over all sessions of the run).

    Raises:
        NotMainRank: at the end, on every rank but 0, which alone has the set.
        KeyboardInterrupt: after Ctrl-C, once the state is saved.
    """
    stack, steps = stack_of(vlm.adapter, config.transcoder.site), config.trainer.max_steps
    ranks = Ranks.current(stack)
    name = model_name if model_name is not None else vlm.name
    module = TranscoderModule(stack, config, name, ranks).to(stack.device)
    if origin is None:
        first = train_batch(0)
        # A rank's own part of batch 0 depends on the number of ranks, which may change when resuming.
        batch_0 = {} if isinstance(first, OwnPart) else {"batch 0": tensors_fingerprint(forwards(first))}
        origin = {"model": model_fingerprint(stack.model), **batch_0}
    folder, every = Path(run_dir) / "transcoder_checkpoint", config.trainer.checkpoint_every
    checkpoints = Checkpoints(folder, every, steps, config.settings(), origin, ranks)
    restored = config.trainer.resume and checkpoints.restore(module)
    if not restored:
        checkpoints.restart()
    captures = Captures(stack, train_batch, ranks)
    if not restored:
        module.initialise([captures(number) for number in range(config.recipe.init_batches)])
    checkpoints.check_space(module)
    logger = logger if ranks.main else None
    progress = _Progress(vlm, config, val_batches, logger, data_figures, job)
    if module.steps_done < steps:
        # The stop comes last, when the step's own checkpoint, if one is due, has been written.
        stop = [AgreedStop(checkpoints.save)] if ranks.layout.world > 1 else []
        stream = ActivationStream(captures, config, lambda: module.steps_done)
        trainer = _lightning_trainer(module, [progress, checkpoints, *stop], logger)
        fit_or_interrupt(trainer, module, DataLoader(stream, batch_size=None, num_workers=0))
    last = module.figures({})
    transcoders = module.finished_set()
    if ranks.layout.world == 1:
        transcoders = transcoders.to(stack.device)  # Lightning leaves the module on the CPU
    if restored:  # an earlier session may have drawn the last batches, up to which the figures must count
        captures((steps - 1) // config.recipe.steps_per_batch)
    drawn = data_figures()  # summed over ranks, so all must call it
    if not ranks.main:
        raise NotMainRank
    meter = ErrorMeter()
    metrics = evaluate_transcoders(Scope(vlm, transcoders), val_batches, meter) if val_batches else {}
    transcoders.usual_error = meter.usual() if val_batches else None
    metrics |= {**progress.speed(), **drawn, "train/tokens": float(module.tokens_seen)}
    metrics["train/stopped_layers"] = last["train/stopped_layers"]
    if last["train/stopped_layers"]:
        _LOG.warning("%d layers stopped early; the set has their last good weights", int(last["train/stopped_layers"]))
    if logger is not None:
        logger.log_metrics(metrics, step=module.steps_done)
    return transcoders, metrics


def _lightning_trainer(module: TranscoderModule, callbacks: list[pl.Callback], logger: Logger | None) -> pl.Trainer:
    device = module.stack.device  # activations are captured there, so the transcoders must be there too
    on_gpu, several = device.type == "cuda", module.ranks.layout.world > 1
    return pl.Trainer(
        max_epochs=1,
        accelerator="gpu" if on_gpu else "cpu",
        devices=[device.index or 0] if on_gpu else 1,
        # To Lightning each rank is a separate run, since ranks train different layers (docs/adr/001).
        strategy=SingleDeviceStrategy(torch.device(device)) if several else "auto",
        plugins=[LightningEnvironment()] if several else None,
        callbacks=callbacks,
        logger=logger if logger is not None else False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


class _Progress(pl.Callback):
    """A bar with rate and remaining time, training figures every `log_every` steps, validation every `val_every`."""

    def __init__(
        self,
        vlm: VLM,
        config: TranscoderTrainingConfig,
        val_batches: Sequence[Batch],
        logger: Logger | None,
        data_figures: Callable[[], Mapping[str, float]],
        job: str = "",
    ) -> None:
        self.job = job
        self.vlm, self.settings, self.val_batches = vlm, config.trainer, val_batches
        self.logger, self.data_figures = logger, data_figures
        self.tokens, self.seconds, self.began = 0, 0.0, 0.0
        self.bar: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Open the bar at the step where training continues."""
        self.bar = tqdm(
            total=self.settings.max_steps,
            initial=pl_module.steps_done,
            desc=f"transcoders {self.job}".rstrip(),
            unit="step",
            mininterval=1.0,
            disable=not pl_module.ranks.main,
        )
        self.began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count, log and validate; the clock stops meanwhile, so validation is not training time."""
        self.seconds += time.perf_counter() - self.began
        self.tokens += outputs["tokens"]
        self.bar.update()
        done, settings = pl_module.steps_done, self.settings
        if settings.log_every and done % settings.log_every == 0:
            figures = pl_module.figures(outputs["fvu"])
            fvu, dead = figures.get("train/fvu", math.nan), figures["train/dead_frac"]
            self.bar.set_postfix(fvu=f"{fvu:.4f}", dead=f"{dead:.3f}")
            self._log({**figures, **self.speed(), **self.data_figures()}, done)
        due = settings.val_every and done % settings.val_every == 0 and done < settings.max_steps
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
        """Close the bar, so that the error message starts on a new line."""
        if self.bar is not None:
            self.bar.close()

    def speed(self) -> dict[str, float]:
        """Tokens per second of training, including data and forward; empty before the first step."""
        return {"perf/tokens_per_s": self.tokens / self.seconds} if self.seconds else {}

    def _log(self, figures: dict[str, float], step: int) -> None:
        if self.logger is not None:
            self.logger.log_metrics(figures, step=step)
