"""A prompt with the beginning of an answer after it, as the model sees it while it answers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmscope.core.positions import ANSWER
from vlmscope.models.base import Adapter, ModelInputs
from vlmscope.models.positions import token_strings


@torch.no_grad()
def generated(adapter: Adapter, tensors: Mapping[str, Tensor], max_tokens: int) -> Tensor:
    """The most probable token at each step: `[B, at most max_tokens]`, ends included and padding after them.

    Args:
        adapter: the model.
        tensors: arguments of its forward, `input_ids [B, T]` among them.
        max_tokens: stop after so many.

    Raises:
        UserError: prompt and answer might be longer than the model's positions, or logits are not finite.
    """
    adapter.check_length(tensors, max_tokens)

    def check(_module: object, _args: tuple, output: Any) -> None:
        adapter.finite(output.logits[:, -1])  # of nan argmax would choose token 0

    handle = adapter.model.register_forward_hook(check)  # before generation rules out tokens by -inf
    try:
        found = adapter.model.generate(**tensors, max_new_tokens=max_tokens, do_sample=False, use_cache=True)
    finally:
        handle.remove()
    return found[:, tensors["input_ids"].shape[1] :]


def greedy_answer(adapter: Adapter, inputs: ModelInputs, max_tokens: int) -> list[int]:
    """The model's own answer as `generated` gives it: at most `max_tokens` ids, its end included."""
    return generated(adapter, inputs.tensors, max_tokens)[0].tolist()


def continued(adapter: Adapter, inputs: ModelInputs, token_ids: Sequence[int], tokenizer: Any) -> ModelInputs:
    """The prompt with these tokens after it, at positions of role "answer".

    Args:
        adapter: the model's family, which knows what kind of token an answer's are.
        inputs: the prompt.
        token_ids: what follows it.
        tokenizer: names them.

    Raises:
        UserError: prompt and tokens are longer than the model's positions.
    """
    count = len(token_ids)
    if count == 0:
        return inputs
    adapter.check_length(inputs.tensors, count)
    more = {
        "input_ids": list(token_ids),
        "attention_mask": [1] * count,
        "token_type_ids": [adapter.answer_type] * count,
        "mm_token_type_ids": [0] * count,
    }
    tensors = {
        name: torch.cat([tensor, tensor.new_tensor([more[name]])], dim=1) if name in more else tensor
        for name, tensor in inputs.tensors.items()
    }
    return replace(
        inputs,
        tensors=tensors,
        tokens=[*inputs.tokens, *token_strings(tokenizer, token_ids)],
        is_image=np.append(inputs.is_image, np.zeros(count, dtype=bool)),
        image_index=np.append(inputs.image_index, np.full(count, -1)),
        patch_boxes=[*inputs.patch_boxes, *[None] * count],
        roles=np.append(inputs.roles, np.full(count, ANSWER)),
    )
