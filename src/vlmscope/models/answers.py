"""A prompt with the beginning of an answer after it, as the model sees it while it answers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vlmscope.core.positions import ANSWER
from vlmscope.models.base import Adapter, ModelInputs
from vlmscope.models.positions import token_strings


@torch.no_grad()
def greedy_answer(adapter: Adapter, inputs: ModelInputs, max_tokens: int) -> list[int]:
    """The model's own answer, the most probable token at each step: at most `max_tokens` ids, its end included.

    Raises:
        UserError: prompt and answer might be longer than the model's positions.
    """
    adapter.check_length(inputs.tensors, max_tokens)
    found = adapter.model.generate(**inputs.tensors, max_new_tokens=max_tokens, do_sample=False, use_cache=True)
    return found[0, len(inputs) :].tolist()


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
