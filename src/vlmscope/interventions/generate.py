"""Greedy generation under a plan of edits, with a KV cache."""

from __future__ import annotations

from typing import Any

import torch

from vlmscope.interventions.edits import Plan
from vlmscope.interventions.run import editing
from vlmscope.models.base import Adapter, ModelInputs
from vlmscope.transcoders.transcoder import TranscoderSet


def generate_edited(
    adapter: Adapter,
    tokenizer: Any,
    inputs: ModelInputs,
    transcoders: TranscoderSet | None = None,
    plan: Plan | None = None,
    max_new_tokens: int = 24,
) -> str:
    """The answer to one prompt, edited in the prompt and, where the plan says so, at every generated token.

    Args:
        adapter: the model.
        tokenizer: decodes the answer.
        inputs: one prompt with its pictures.
        transcoders: needed when there is a plan.
        plan: edits by layer; None generates freely.
        max_new_tokens: stop after so many tokens even without an end of turn.

    Returns:
        The text of the answer without special tokens.
    """
    ids = generate_ids(adapter, inputs, transcoders, plan, max_new_tokens)
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


@torch.no_grad()
def generate_ids(
    adapter: Adapter,
    inputs: ModelInputs,
    transcoders: TranscoderSet | None = None,
    plan: Plan | None = None,
    max_new_tokens: int = 24,
) -> list[int]:
    """The token ids of the answer, its end token included; arguments as in `generate_edited`."""
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False, "use_cache": True}
    if plan:
        assert transcoders is not None, "a plan needs the transcoders whose features it edits"
        with editing(adapter, transcoders, plan):
            ids = adapter.model.generate(**inputs.tensors, **settings)
    else:
        ids = adapter.model.generate(**inputs.tensors, **settings)
    return ids[0, len(inputs) :].tolist()
