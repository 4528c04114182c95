"""Greedy generation under a plan of edits, with a KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from vlmscope.core.errors import UserError
from vlmscope.interventions.edits import AnyPlan
from vlmscope.interventions.run import editing
from vlmscope.models.answers import generated
from vlmscope.models.base import Adapter, ModelInputs
from vlmscope.scope import Scope


def generate_edited(scope: Scope, inputs: ModelInputs, plan: AnyPlan | None = None, max_new_tokens: int = 24) -> str:
    """The answer to one prompt, edited in the prompt and, where the plan says so, at every generated token.

    Args:
        scope: the model and its transcoders.
        inputs: one prompt with its pictures.
        plan: edits by layer; None generates freely.
        max_new_tokens: stop after so many tokens even without an end of turn.

    Returns:
        The text of the answer without special tokens.
    """
    ids = generate_ids(scope, inputs, plan, max_new_tokens)
    return scope.vlm.tokenizer.decode(ids, skip_special_tokens=True).strip()


@torch.no_grad()
def generate_ids(scope: Scope, inputs: ModelInputs, plan: AnyPlan | None = None, max_new_tokens: int = 24) -> list[int]:
    """The token ids of the answer, its end token included; arguments as in `generate_edited`."""
    with editing(scope, plan) if plan else nullcontext():
        return generated(scope.adapter, inputs.tensors, max_new_tokens)[0].tolist()


@torch.no_grad()
def generate_batch(
    adapter: Adapter,
    inputs: Sequence[ModelInputs],
    max_new_tokens: int = 24,
    context: AbstractContextManager[None] | None = None,
) -> list[list[int]]:
    """The greedy answers to several prompts at once, each up to and with its end token.

    Args:
        adapter: the model.
        inputs: prompts of equal length, each with equally many pictures of equal size.
        max_new_tokens: stop after so many tokens.
        context: around the forwards, such as `editing` or `random_directions`.

    Raises:
        UserError: the prompts cannot be stacked, or `generated` refuses them.
    """
    names = inputs[0].tensors
    shapes = [{name: tensor.shape[1:] for name, tensor in one.tensors.items()} for one in inputs]
    if any(len(one) != len(inputs[0]) or shape != shapes[0] for one, shape in zip(inputs, shapes, strict=True)):
        raise UserError("prompts of a batch must have equal length and pictures of equal size: generate one by one")
    tensors = {name: torch.cat([one.tensors[name] for one in inputs]) for name in names}
    with context or nullcontext():
        found = generated(adapter, tensors, max_new_tokens).tolist()
    ends = adapter.model.generation_config.eos_token_id
    known: set[int] = {ends} if isinstance(ends, int) else {int(end) for end in ends or ()}
    return [_through_end(ids, known) for ids in found]


def _through_end(ids: list[int], ends: set[int]) -> list[int]:
    """The ids up to the first end token, itself included: what follows it in a batch is padding."""
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: stop + 1]
