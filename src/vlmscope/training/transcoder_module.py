"""Training of the transcoders of all layers at once, on activations made on the fly by the frozen model.

Loss of a layer, in standardised coordinates: FVU of the batch (as the paper), averaged with those of Matryoshka
prefixes where there are any, + aux_coefficient x AuxK + sparsity_coefficient x the penalty of a nonlinearity that needs
one (`vlmscope.training.losses`). Layers share nothing but the forward of the model: each has its own parameters and its
own gradient norm.

Legend: N tokens of a batch, d model width, F features.
"""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from vlmscope.core.seeds import generator
from vlmscope.metrics.reconstruction import fvu
from vlmscope.models.base import Adapter
from vlmscope.training.losses.aux_k import aux_k, dead_features
from vlmscope.training.losses.l0 import l0_penalty
from vlmscope.training.losses.l1 import l1_penalty
from vlmscope.training.losses.matryoshka import prefix_fvu, prefix_sizes
from vlmscope.training.schedule import warmup_cosine
from vlmscope.training.transcoder_config import TranscoderTrainingConfig
from vlmscope.training.transcoder_data import LayerActivations
from vlmscope.training.transcoder_start import start
from vlmscope.transcoders.init import Standardisation, fold
from vlmscope.transcoders.nonlinearities.jump_relu import JumpReLU
from vlmscope.transcoders.nonlinearities.relu import ReLU
from vlmscope.transcoders.transcoder import (
    Transcoder,
    TranscoderConfig,
    TranscoderOutput,
    TranscoderSet,
    TranscoderSetConfig,
)


class LayerTrainer(nn.Module):
    """One layer: its transcoder in standardised coordinates, the standardisation, and when each feature last fired."""

    x_mean: Tensor
    y_mean: Tensor
    scales: Tensor
    silent: Tensor

    def __init__(self, config: TranscoderConfig) -> None:
        super().__init__()
        self.transcoder = Transcoder(config).train()
        d, f = config.d_model, config.n_features
        self.register_buffer("x_mean", torch.zeros(d))
        self.register_buffer("y_mean", torch.zeros(d))
        self.register_buffer("scales", torch.ones(2, dtype=torch.float64))
        self.register_buffer("silent", torch.zeros(f, dtype=torch.long))  # tokens since the feature last fired

    @property
    def standard(self) -> Standardisation:
        """The coordinates of training."""
        return Standardisation(self.x_mean, float(self.scales[0]), self.y_mean, float(self.scales[1]))

    def initialise(self, x: Tensor, y: Tensor, method: str, seed: int) -> None:
        """Set standardisation and weights from raw activations [N, d], [N, d]."""
        standard = Standardisation.fit(x, y)
        self.x_mean.copy_(standard.x_mean)
        self.y_mean.copy_(standard.y_mean)
        self.scales.copy_(torch.tensor([standard.x_scale, standard.y_scale]))
        layer = self.transcoder.config.layer
        start(self.transcoder, *standard.apply(x, y), method, generator(seed, "transcoder_start", layer))

    def loss(self, x: Tensor, y: Tensor, config: TranscoderTrainingConfig) -> tuple[Tensor, Tensor, TranscoderOutput]:
        """Loss and FVU (scalars) of raw activations [N, d], and the output in standardised coordinates."""
        x, y = self.standard.apply(x.float(), y.float())
        one = self.transcoder
        out = one(x)
        unexplained = fvu(y, out.reconstruction)
        loss = unexplained
        sizes = prefix_sizes(config.matryoshka, one.config.n_features)
        if sizes:
            prefixes = prefix_fvu(one, out.code, x, y, sizes)
            loss = (loss + len(sizes) * prefixes) / (1 + len(sizes))
        dead = dead_features(self.silent, config.dead_after_tokens)
        if len(dead) and config.aux_coefficient:
            residual = (y - out.reconstruction).detach()
            loss = loss + config.aux_coefficient * aux_k(one, x, residual, out.pre, dead, config.aux_k)
        if config.sparsity_coefficient:
            penalty = self._penalty(out)
            loss = loss if penalty is None else loss + config.sparsity_coefficient * penalty
        return loss, unexplained, out

    def _penalty(self, out: TranscoderOutput) -> Tensor | None:
        """What keeps the number of active features low, where the nonlinearity does not."""
        match self.transcoder.activation:
            case JumpReLU() as jump:
                return l0_penalty(jump, out.at_support, out.code.indices, self.transcoder.config.k)
            case ReLU():
                return l1_penalty(out.code.values, out.code.indices, self.transcoder.W_dec)
            case _:
                return None

    def note_fired(self, out: TranscoderOutput) -> None:
        """Advance the clock of every feature by the batch's tokens and set it back where a feature fired."""
        fired = out.code.indices[out.code.values > 0]
        self.silent += out.code.values.shape[0]
        self.silent[fired] = 0


class TranscoderModule(pl.LightningModule):
    """All layers' trainers, one optimiser, one forward of the frozen model a step."""

    def __init__(self, adapter: Adapter, config: TranscoderTrainingConfig, model_name: str = "") -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config = config
        self.model_name = model_name
        self.steps_done = 0
        self.committing = False
        # Hidden from nn.Module: the model is frozen, and neither saved nor counted.
        self._frozen = (adapter,)
        width = adapter.d_model
        for parameter in adapter.model.parameters():
            parameter.requires_grad_(False)
        adapter.model.eval()
        self.trainers = nn.ModuleDict(
            {
                str(layer): LayerTrainer(
                    TranscoderConfig(
                        d_model=width,
                        n_features=config.expansion_factor * width,
                        k=config.k,
                        layer=layer,
                        activation=config.activation,
                        skip=config.skip,
                        bandwidth=config.bandwidth,
                    )
                )
                for layer in range(adapter.n_layers)
            }
        )
        # Kept in checkpoints, so that a resumed run knows what it has learnt from.
        self.register_buffer("tokens_seen", torch.zeros((), dtype=torch.long))
        self.optimizer = torch.optim.AdamW(
            self.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )

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
        for layer in range(self.adapter.n_layers):
            x = torch.cat([batch.by_layer[layer][0] for batch in batches]).float()
            y = torch.cat([batch.by_layer[layer][1] for batch in batches]).float()
            self.layer(layer).initialise(x, y, self.config.init, self.config.seed)

    def rate(self) -> float:
        """The learning rate of the coming step."""
        config, step = self.config, self.steps_done
        if config.schedule == "cosine" or step < config.warmup:
            return config.lr * warmup_cosine(step, config.max_steps, config.warmup, config.lr_floor)
        progress = min((step - config.warmup) / max(config.max_steps - config.warmup, 1), 1.0)
        return config.lr * (1 - (1 - config.lr_floor) * progress)

    def transfer_batch_to_device(
        self, batch: LayerActivations, device: torch.device, dataloader_idx: int
    ) -> LayerActivations:
        """Nothing to do: activations are captured where the model is."""
        return batch

    def training_step(self, batch: LayerActivations, batch_idx: int) -> dict[str, Any]:
        """One step of every layer; returns what the callbacks log."""
        self.optimizer.zero_grad(set_to_none=True)
        outputs: dict[int, TranscoderOutput] = {}
        fvus: list[float] = []
        for layer, (x, y) in batch.by_layer.items():
            trainer = self.layer(layer)
            loss, unexplained, outputs[layer] = trainer.loss(x, y, self.config)
            # At once, so that only one layer's graph is alive.
            self.manual_backward(loss)
            nn.utils.clip_grad_norm_(trainer.parameters(), self.config.clip)
            fvus.append(float(unexplained.detach()))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self._commit(outputs, batch.n_tokens)
        return {"fvu": sum(fvus) / len(fvus), "tokens": batch.n_tokens}

    def _commit(self, outputs: dict[int, TranscoderOutput], tokens: int) -> None:
        """Everything that changes the state, in one place: an interrupt elsewhere leaves a state that can be saved."""
        self.committing = True
        # Through Lightning's wrapper, which counts the step.
        wrapped = self.optimizers()
        assert not isinstance(wrapped, list)
        wrapped.step()
        for layer, out in outputs.items():
            self.layer(layer).note_fired(out)
        self.tokens_seen += tokens
        self.steps_done += 1
        self.committing = False

    def dead_fraction(self) -> float:
        """Share of all features that have been silent for `dead_after_tokens`."""
        silent = torch.cat([self.layer(layer).silent for layer in range(self.adapter.n_layers)])
        return float((silent >= self.config.dead_after_tokens).double().mean())

    def finished_set(self) -> TranscoderSet:
        """The transcoders as they stand, in the model's own coordinates, detached from training."""
        folded = {}
        for layer in range(self.adapter.n_layers):
            trainer = self.layer(layer)
            folded[layer] = fold(trainer.transcoder, trainer.standard).requires_grad_(False).eval()
        config = TranscoderSetConfig(
            n_model_layers=self.adapter.n_layers,
            k=self.config.k,
            activation=self.config.activation,
            model_name=self.model_name,
        )
        return TranscoderSet(folded, config)
