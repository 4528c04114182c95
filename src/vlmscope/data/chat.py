"""Scenes as batches of single-turn prompts with their answers, in the form of the Hugging Face forward."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vlmscope.data.orrery.scene import Scene
from vlmscope.data.packing import IGNORE, pack


def chat_batch(scenes: Sequence[Scene], tokenizer, soft_tokens: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """One random question a scene with its answer.

    Returns:
        `input_ids`, `attention_mask`, `token_type_ids` [B, T], `pixel_values` [P, 3, 64, 64] (absent without
        pictures) and
        `loss_mask` [B, T] bool, True at answer tokens.
    """
    packed = pack(scenes, tokenizer, soft_tokens, rng, max_questions=1)
    ids = packed.input_ids
    answers = torch.zeros_like(ids, dtype=torch.bool)
    answers[:, 1:] = (packed.labels != IGNORE)[:, :-1]
    alive = packed.segments >= 0
    batch = {
        "input_ids": ids,
        "attention_mask": alive.long(),
        "token_type_ids": (ids == tokenizer.convert_tokens_to_ids("<image_soft_token>")).long(),
        "loss_mask": answers & alive,
    }
    if len(packed.pixels):
        batch["pixel_values"] = packed.pixels
    return batch
