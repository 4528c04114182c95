"""What the tests of transcoder training share: small settings, batches of a tiny Gemma 3, and states on disk."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmscope.core.records import generator
from vlmscope.models.loading import VLM
from vlmscope.training.config import TranscoderTrainingConfig
from vlmscope.training.transcoder_training import train_transcoders
from vlmscope.transcoders.transcoder import TranscoderSet

SOFT, PAD = 8, 0


def settings(base: TranscoderTrainingConfig | None = None, **changes: Any) -> TranscoderTrainingConfig:
    """Settings by their own names, which are unique over the groups."""
    base = base or TranscoderTrainingConfig()
    groups = {}
    for group in ("transcoder", "optim", "trainer", "recipe"):
        record = getattr(base, group)
        own = {item.name: changes.pop(item.name) for item in fields(record) if item.name in changes}
        groups[group] = replace(record, **own)
    return replace(base, **groups, **changes)


CONFIG = settings(
    expansion_factor=4, k=8, max_steps=6, warmup=2, init_batches=2, dead_after_tokens=150, aux_k=8, checkpoint_every=3,
    val_every=0, log_every=2, lr=3e-3, pool_batches=3, steps_per_batch=1,
)  # fmt: skip


def make_batch(step: int) -> dict[str, Tensor]:
    """Six pictures with questions of two lengths, padded at the left, the last two tokens being the answer."""
    rng = generator(7, "batch", step)
    b, t = 6, 14
    ids = rng.integers(9, 20, (b, t))
    ids[:, 3], ids[:, 4:8], ids[:, 8] = 6, SOFT, 7
    mask = np.ones((b, t), dtype=np.int64)
    ids[:3, :2], mask[:3, :2] = PAD, 0
    loss_mask = np.zeros((b, t), dtype=bool)
    loss_mask[:, -2:] = True
    return {
        "input_ids": torch.from_numpy(ids),
        "attention_mask": torch.from_numpy(mask),
        "token_type_ids": torch.from_numpy((ids == SOFT).astype(np.int64)),
        "pixel_values": torch.from_numpy(rng.standard_normal((b, 3, 16, 16)).astype(np.float32)),
        "loss_mask": torch.from_numpy(loss_mask),
    }


def interrupted_at(step: int, error: type[BaseException] = KeyboardInterrupt):
    """`make_batch` until a batch number, where it raises."""

    def batch(number: int) -> dict[str, Tensor]:
        if number == step:
            raise error
        return make_batch(number)

    return batch


def train(vlm: VLM, folder: Path, batch: Any = make_batch, **changes: Any) -> tuple[TranscoderSet, dict[str, float]]:
    """`CONFIG` with changes, validated on one batch."""
    return train_transcoders(vlm, batch, [make_batch(100)], settings(CONFIG, **changes), folder)


def state(folder: Path) -> list[bytes]:
    """The checkpoint's layers as bytes."""
    return [file.read_bytes() for file in sorted((folder / "transcoder_checkpoint").glob("*/layer_*.safetensors"))]
