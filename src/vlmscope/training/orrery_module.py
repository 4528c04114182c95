"""Training of Orrery in stages, as real VLMs do it: the vision tower first, then the whole model.

Stage 1 trains the SigLIP tower on the facts of the scenes with linear heads over its pooled patches. Then the
VLM learns packed questions (loss on every answer token), the tower at a fraction of the rate.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from vlmscope.core.seeds import generator
from vlmscope.data.orrery.dataset import ScenePool
from vlmscope.data.orrery.facts import NUMBERS, PLANETS, SHAPE_COLOURS, SHAPES
from vlmscope.data.orrery.scene import Scene
from vlmscope.data.packing import IGNORE, PackedBatch, pack, to_pixels
from vlmscope.training.orrery_config import StageConfig
from vlmscope.training.schedule import warmup_cosine

# Which fact each linear head of stage 1 reads, and its classes.
HEADS: dict[str, tuple[str, ...]] = {
    "planet": tuple(PLANETS),
    "first": tuple(NUMBERS[:10]),
    "second": tuple(NUMBERS[:10]),
    "count": tuple(NUMBERS[1:7]),
    "shape": SHAPES,
    "shape_colour": tuple(SHAPE_COLOURS),
    "fingers": tuple(NUMBERS[1:7]),
}


class StepBatches(IterableDataset):
    """Batches made from the step number: `first()` says with which step to begin, so that resuming skips nothing."""

    def __init__(self, pool: ScenePool, config: StageConfig, first: Any, collate: Any) -> None:
        self.pool, self.config, self.first, self.collate = pool, config, first, collate

    def __iter__(self) -> Iterator[Any]:
        for step in range(self.first(), self.config.max_steps):
            yield self.collate(self.pool.batch(self.config.seed, step, self.config.batch), step)

    def loader(self) -> DataLoader:
        """Wrap into a DataLoader that passes batches through."""
        return DataLoader(self, batch_size=None, num_workers=0)


class ScheduledModule(pl.LightningModule):
    """What all stages share: the step count, AdamW with two rates, and the schedule."""

    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        self.config = config
        self.steps_done = 0
        self.committing = False  # the weights are being changed: what is there now belongs to no step

    def tower_parameters(self) -> list[nn.Parameter]:
        """Parameters that learn at `tower_rate` of the rate."""
        return []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW; matrices decay, vectors do not."""
        slow = {id(p) for p in self.tower_parameters()}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for p in self.parameters():
            groups.setdefault((id(p) in slow, p.ndim >= 2), []).append(p)
        settings = [
            {
                "params": params,
                "scale": self.config.tower_rate if is_slow else 1.0,
                "weight_decay": self.config.weight_decay if decays else 0.0,
            }
            for (is_slow, decays), params in groups.items()
        ]
        return torch.optim.AdamW(settings, lr=self.config.lr, betas=(0.9, 0.98))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set each group's rate from the step."""
        factor = warmup_cosine(self.steps_done, self.config.max_steps, self.config.warmup)
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = self.config.lr * factor * group["scale"]

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Count steps here: callbacks run before the module's own `on_train_batch_end`."""

        def gradients() -> Any:
            loss = optimizer_closure()
            self.committing = True
            return loss

        super().optimizer_step(epoch, batch_idx, optimizer, gradients)
        self.steps_done += 1
        self.committing = False

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the loss under our own step count (Lightning's restarts on resume)."""
        if self.steps_done % 20 == 0 and self.logger is not None:
            self.logger.log_metrics({"train/loss": float(outputs["loss"])}, step=self.steps_done)


class TowerModule(ScheduledModule):
    """Stage 1: SigLIP tower + linear heads over the flattened soft-token grid (pooled patches)."""

    def __init__(self, config: StageConfig, tower: nn.Module, pool: nn.AvgPool2d, side: int, width: int) -> None:
        super().__init__(config)
        self.tower, self.pool, self.side = tower, pool, side
        soft = (side // int(pool.kernel_size)) ** 2  # type: ignore[arg-type]
        self.heads = nn.ModuleDict({name: nn.Linear(soft * width, len(c)) for name, c in HEADS.items()})

    def features(self, pixels: Tensor) -> Tensor:
        """[B, 3, 64, 64] -> pooled patch states, flattened [B, soft * width]."""
        states = self.tower(pixel_values=pixels).last_hidden_state
        grid = states.transpose(1, 2).unflatten(2, (self.side, self.side))
        return self.pool(grid).flatten(1)

    def training_step(self, batch: tuple[Tensor, dict[str, Tensor]], batch_idx: int) -> Tensor:
        """Mean over all (picture, fact) pairs of the cross-entropy."""
        return self.losses(batch)[0]

    def losses(self, batch: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, tuple[int, int]]]:
        """Return the loss and, for each head, (right, asked)."""
        pixels, targets = batch
        features = self.features(pixels)
        total, asked, right = features.new_zeros(()), 0, {}
        for name, target in targets.items():
            mask = target >= 0
            count = int(mask.sum())
            if count == 0:
                continue
            logits = self.heads[name](features[mask])
            total = total + F.cross_entropy(logits, target[mask], reduction="sum")
            right[name] = (int((logits.argmax(-1) == target[mask]).sum()), count)
            asked += count
        return total / max(asked, 1), right


def tower_batch(scenes: list[Scene], step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Pixels and the class of each head (-1 where the scene has no such fact)."""
    del step
    targets = {
        name: torch.tensor([classes.index(s.facts[name]) if name in s.facts else -1 for s in scenes])
        for name, classes in HEADS.items()
    }
    pictures = [s.image for s in scenes if s.image is not None]
    assert len(pictures) == len(scenes), "stage 1 takes scenes with pictures only"
    return to_pixels(np.stack(pictures)), targets


class VlmModule(ScheduledModule):
    """Second and third stage: all of Orrery on packed questions."""

    def __init__(self, config: StageConfig, model: Any, tokenizer: Any) -> None:
        super().__init__(config)
        self.model, self.tokenizer = model, tokenizer
        self.soft_tokens = model.config.mm_tokens_per_image

    def tower_parameters(self) -> list[nn.Parameter]:
        """The vision tower learns slower: it arrives trained."""
        return list(self.model.model.vision_tower.parameters())

    def collate(self, scenes: list[Scene], step: int, questions: int | None = None) -> PackedBatch:
        """Pack a batch, at most `questions` a scene (the stage's own number when None); the draw depends on the
        step.
        """
        rng = generator(self.config.seed, "pack", step)
        return pack(scenes, self.tokenizer, self.soft_tokens, rng, questions or self.config.questions)

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Cross-entropy over answer tokens, plus `exit_weight` times that of reading the answer `exit_layers` early.

        Reading the residual stream early through the final norm and unembedding (early-exit loss, LayerSkip,
        arXiv 2404.16710, eq. 5) makes the middle layers do the recognising; without it Orrery left the name of a
        planet to its last MLP.
        """
        weight, early = self.config.exit_weight, self.config.exit_layers
        out, keep, labels = self._run(batch, with_hidden=weight > 0 and early > 0)
        loss = F.cross_entropy(self.model.lm_head(out.last_hidden_state[keep]), labels)
        if out.hidden_states is None:
            return loss
        norm = self.model.model.language_model.norm
        for states in out.hidden_states[-1 - early : -1]:  # the last entry is the normed output itself
            loss = loss + weight * F.cross_entropy(self.model.lm_head(norm(states[keep])), labels)
        return loss

    def answer_states(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """Final states [N, d] and labels [N] at the positions that predict answer tokens."""
        out, keep, labels = self._run(batch, with_hidden=False)
        return out.last_hidden_state[keep], labels

    def _run(self, batch: PackedBatch, with_hidden: bool) -> tuple[Any, Tensor, Tensor]:
        """The decoder's output, the mask [B, S] of positions that predict answer tokens, and their labels [N]."""
        inner = self.model.model
        states = inner.get_input_embeddings()(batch.input_ids)
        if len(batch.pixels):
            soft = inner.get_image_features(batch.pixels).pooler_output
            where = (batch.input_ids == self.model.config.image_token_id).unsqueeze(-1).expand_as(states)
            states = states.masked_scatter(where, soft.to(states.dtype))
        full, sliding = batch.masks(self.model.config.text_config.sliding_window, self.model.config.image_token_id)
        masks = {"full_attention": full, "sliding_attention": sliding}
        out = inner.language_model(
            inputs_embeds=states,
            attention_mask=masks,
            position_ids=batch.position_ids,
            output_hidden_states=with_hidden,
        )
        keep = batch.labels != IGNORE
        return out, keep, batch.labels[keep]

    def transfer_batch_to_device(self, batch: PackedBatch, device: torch.device, dataloader_idx: int) -> PackedBatch:
        """Move the tensors of the record."""
        moved = (getattr(batch, n).to(device) for n in ("input_ids", "position_ids", "segments", "labels"))
        return PackedBatch(*moved, groups=batch.groups, pixels=batch.pixels.to(device))
