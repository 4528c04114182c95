"""Training of the transcoders of a rank's layers at once, on activations made on the fly by the frozen model.

Layers share nothing but the forward of the model: each has its own parameters, loss and gradient norm
(`vlmscope.training.layer_trainer`), so they may be owned by different ranks (`vlmscope.training.ranks`), and one that
goes wrong stops alone. The layers of a cross-layer set are one group and do neither (`vlmscope.training.ranks`).
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from vlmscope.core.errors import UserError
from vlmscope.models.base import Adapter
from vlmscope.training.batches import LayerActivations
from vlmscope.training.config import TranscoderTrainingConfig, warmup_cosine
from vlmscope.training.layer_trainer import LayerStep, LayerTrainer
from vlmscope.training.ranks import Ranks, group_steps
from vlmscope.transcoders.transcoder import (
    Transcoder,
    TranscoderConfig,
    TranscoderSet,
    TranscoderSetConfig,
)

_LOG = logging.getLogger(__name__)


class TranscoderModule(pl.LightningModule):
    """All layers' trainers, one optimiser, one forward of the frozen model a step."""

    def __init__(
        self,
        adapter: Adapter,
        config: TranscoderTrainingConfig,
        model_name: str = "",
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__()
        self.ranks = ranks if ranks is not None else Ranks.single(adapter.n_layers)
        if config.cross_layer and len(self.ranks.layers) < adapter.n_layers:
            raise UserError(
                "cross-layer transcoders couple all layers, so one process of a host trains them; start one"
            )
        if self.ranks.layout.hosts > 1 and config.activation == "batchtopk":
            raise UserError("batchtopk chooses among a whole batch, which lies on one host; take one host, or topk")
        self.automatic_optimization = False
        self.config = config
        self.model_name = model_name
        self.steps_done = 0
        self.tokens_seen = 0
        self.committing = False
        # Hidden from nn.Module: the model is frozen, and neither saved nor counted.
        self._frozen = (adapter,)
        for parameter in adapter.model.parameters():
            parameter.requires_grad_(False)
        adapter.model.eval()
        # Of the product alone: float32 weights take updates that bfloat16 would round away.
        half = torch.bfloat16 if config.precision == "bf16-mixed" else None
        self.trainers = nn.ModuleDict(
            {
                str(layer): LayerTrainer(self._architecture(layer), config.max_norm_ratio, half)
                for layer in self.ranks.layers
            }
        )
        self.optimizer = torch.optim.AdamW(
            self.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )

    def _architecture(self, layer: int) -> TranscoderConfig:
        config = self.config
        width = self.adapter.d_model
        return TranscoderConfig(
            d_model=width,
            n_features=config.expansion_factor * width,
            k=config.k,
            layer=layer,
            activation=config.activation,
            skip=config.skip,
            bandwidth=config.bandwidth,
            writes=self.adapter.n_layers - layer if config.cross_layer else 1,
        )

    @property
    def groups(self) -> list[list[int]]:
        """This rank's layers, those whose losses are taken together as one (`vlmscope.training.ranks`)."""
        layers = list(self.ranks.layers)
        return [layers] if self.config.cross_layer else [[layer] for layer in layers]

    @property
    def adapter(self) -> Adapter:
        """The frozen model."""
        return self._frozen[0]

    def layer(self, layer: int) -> LayerTrainer:
        """The trainer of one layer."""
        trainer = self.trainers[str(layer)]
        assert isinstance(trainer, LayerTrainer)
        return trainer

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser, which exists before fitting so that a checkpoint can be loaded into it."""
        return self.optimizer

    def initialise(self, batches: list[LayerActivations]) -> None:
        """Standardisation and starting point of every layer from the tokens of `batches`."""
        whole = [self.ranks.all_tokens(batch) for batch in batches]

        def raw(layer: int) -> tuple[Tensor, Tensor]:
            x, y = (torch.cat([by_layer[layer][side] for by_layer in whole]).float() for side in (0, 1))
            return x, y

        for group in self.groups:
            targets: list[Tensor] = []  # of the layers from the one in work upwards
            for layer in reversed(group):
                trainer = self.layer(layer)
                x, y = raw(layer)
                trainer.standardise(x, y)
                x, y = trainer.standard.apply(*trainer.within_limits(x, y))
                # Layer m of a cross-layer set is written to from m + 1 layers.
                targets = [y / (layer + 1) if self.config.cross_layer else y, *targets]
                trainer.start(x, targets, self.config.init, self.config.seed)

    def rate(self) -> float:
        """The learning rate of the coming step."""
        config, step = self.config, self.steps_done
        if config.schedule == "cosine" or step < config.warmup:
            return config.lr * warmup_cosine(step, config.max_steps, config.warmup, config.lr_floor)
        if config.schedule == "constant":
            return config.lr
        progress = min((step - config.warmup) / max(config.max_steps - config.warmup, 1), 1.0)
        return config.lr * (1 - (1 - config.lr_floor) * progress)

    def transfer_batch_to_device(
        self, batch: LayerActivations, device: torch.device, dataloader_idx: int
    ) -> LayerActivations:
        """Nothing to do: activations are captured where the model is."""
        return batch

    def training_step(self, batch: LayerActivations, batch_idx: int) -> dict[str, Any]:
        """One step of every layer that is not stopped; returns what the callbacks log."""
        self.optimizer.zero_grad(set_to_none=True)
        steps: dict[int, LayerStep] = {}
        troubles: dict[int, str] = {}
        for group in self.groups:
            trainers = {layer: self.layer(layer) for layer in group}
            if not all(trainer.running for trainer in trainers.values()):
                continue
            # A forward of BatchTopK moves its threshold; a bad one must leave no trace.
            buffers = [buffer for trainer in trainers.values() for buffer in trainer.transcoder.buffers()]
            before = [buffer.clone() for buffer in buffers]
            # Differentiated at once, so that only one group's graph is alive.
            taken = group_steps(trainers, batch.by_layer, self.config, self.ranks.total, self.manual_backward)
            wrong = self._clipped(trainers, taken)
            if not wrong:
                steps |= taken
                continue
            # What one layer of a group learns hangs on the others: they stop together.
            cause = min(wrong, key=lambda layer: math.isfinite(taken[layer].loss))
            troubles |= {layer: wrong[layer] if layer == cause else f"with layer {cause}" for layer in group}
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)
            for trainer in trainers.values():
                for parameter in trainer.parameters():
                    parameter.grad = None  # so the optimiser passes the layer by
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self._commit(steps, troubles, batch.joint_tokens)
        return {"fvu": {layer: taken.fvu for layer, taken in steps.items()}, "tokens": batch.joint_tokens}

    def _clipped(self, trainers: Mapping[int, LayerTrainer], steps: Mapping[int, LayerStep]) -> dict[int, str]:
        """Add up and clip the gradients of each layer; layer -> what is wrong with its step, where something is."""
        wrong: dict[int, str] = {}
        for layer, trainer in trainers.items():
            self.ranks.add_up([p.grad for p in trainer.parameters() if p.grad is not None])
            norm = nn.utils.clip_grad_norm_(trainer.parameters(), self.config.clip)
            trouble = trainer.trouble(steps[layer].loss, float(norm), self.config)
            if trouble is not None:
                wrong[layer] = trouble
        return wrong

    def _commit(self, steps: dict[int, LayerStep], troubles: dict[int, str], tokens: int) -> None:
        """Everything that changes the state, in one place: an interrupt elsewhere leaves a state that can be saved."""
        self.committing = True
        # Through Lightning's wrapper, which counts the step.
        wrapped = self.optimizers()
        assert not isinstance(wrapped, list)
        wrapped.step()
        add_up = self.ranks.add_up if self.ranks.layout.hosts > 1 else None
        for layer, taken in steps.items():
            self.layer(layer).note_fired(taken.fired, taken.n_tokens, add_up)
            self.layer(layer).note_left_out(taken.n_left_out, taken.n_tokens + taken.n_left_out, add_up)
            self.layer(layer).note_loss(taken.loss, self.steps_done)
        for layer, trouble in troubles.items():
            self.layer(layer).stopped.fill_(self.steps_done)
            if self.ranks.writes:
                _LOG.warning(
                    "layer %d stopped before step %d (%s); it keeps its weights, layers not named go on",
                    layer, self.steps_done + 1, trouble,
                )  # fmt: skip
        self.tokens_seen += tokens
        self.steps_done += 1
        self.committing = False

    def figures(self, fvus: dict[int, float]) -> dict[str, float]:
        """Figures of training over all layers, from a step's FVU of each of this rank's; every rank must ask."""
        after = self.config.dead_after_tokens
        own = {layer: self.layer(layer) for layer in self.ranks.layers}
        dead = self.ranks.by_layer({n: float((one.silent >= after).double().mean()) for n, one in own.items()})
        running = self.ranks.by_layer({n: float(one.running) for n, one in own.items()})
        found = self.ranks.by_layer(fvus)
        known = [found[layer] for layer, on in running.items() if on and layer in found]
        figures = {"train/fvu": sum(known) / len(known)} if known else {}
        figures["train/dead_frac"] = sum(dead.values()) / len(dead)
        if self.config.max_norm_ratio is not None:
            counts = {n: one.left_out.tolist() for n, one in own.items()}
            shares = self.ranks.by_layer({n: out / max(seen, 1) for n, (out, seen) in counts.items()})
            figures["train/filtered_frac"] = sum(shares.values()) / len(shares)
        figures["train/stopped_layers"] = float(sum(not on for on in running.values()))
        return figures

    def finished_set(self) -> TranscoderSet:
        """The transcoders as they stand, in the model's own coordinates, detached from training.

        All layers on rank 0, which the others send theirs; their own on the other ranks. Every rank must ask. With
        several ranks the set lies in CPU memory: together the layers may not fit the device of one.
        """
        folded = {}
        for layer in range(self.adapter.n_layers) if self.ranks.main else self.ranks.layers:
            if layer in self.ranks.layers:
                later = range(layer + 1, layer + self._architecture(layer).writes)
                folded[layer] = self.layer(layer).folded([self.layer(each).standard.y_scale for each in later])
            else:
                folded[layer] = Transcoder(self._architecture(layer)).requires_grad_(False).to(self.adapter.device)
            self.ranks.to_main(folded[layer].state_dict(), layer)
            if self.ranks.layout.world > 1:
                folded[layer] = folded[layer].cpu()
        config = TranscoderSetConfig(
            n_model_layers=self.adapter.n_layers,
            k=self.config.k,
            activation=self.config.activation,
            model_name=self.model_name,
        )
        return TranscoderSet(folded, config)
