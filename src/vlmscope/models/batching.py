"""Prompts of equal length as one batch, with the embeddings that enter the decoder computed once.

Interventions run the decoder many times on the same inputs; the vision tower is not part of what they change, so its
output is kept. Legend: B prompts, T positions, d model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmscope.core.errors import UserError
from vlmscope.models.base import Adapter, ModelInputs

CHUNK = 64  # prompts a forward of the vision tower
_POSITIONS = "position_ids"
_TEXT = ("attention_mask", "token_type_ids")  # inputs that say something of each position


@dataclass(frozen=True)
class InputBatch:
    """B prompts of T tokens each.

    Attributes:
        tensors: keyword arguments of the model's forward with `inputs_embeds [B, T, d]` in place of ids and pixels;
            for M-RoPE also `position_ids [3, B, T]`.
        input_ids: [B, T].
        roles: [T] position roles, the same for every prompt.
        is_image: [T] bool.
    """

    tensors: dict[str, Tensor]
    input_ids: Tensor
    roles: np.ndarray
    is_image: np.ndarray

    @property
    def size(self) -> int:
        """B."""
        return int(self.input_ids.shape[0])

    @property
    def length(self) -> int:
        """T."""
        return int(self.input_ids.shape[1])

    def select(self, rows: Tensor | Sequence[int]) -> InputBatch:
        """The prompts of these rows."""
        index = torch.as_tensor(rows)
        tensors = {
            name: tensor[:, index] if name == _POSITIONS else tensor[index] for name, tensor in self.tensors.items()
        }
        return InputBatch(tensors, self.input_ids[index], self.roles, self.is_image)


@torch.no_grad()
def make_batch(adapter: Adapter, inputs: Sequence[ModelInputs]) -> InputBatch:
    """Stack prompts of equal length and compute their embeddings.

    Raises:
        UserError: the prompts differ in length or in where their soft tokens are.
    """
    if not inputs:
        raise UserError("no inputs to batch: choose at least one picture")
    first = inputs[0]
    for other in inputs:
        if len(other) != len(first) or not np.array_equal(other.is_image, first.is_image):
            raise UserError(
                f"prompts of a batch must align: {first.prompt!r} has {len(first)} tokens, "
                f"{other.prompt!r} has {len(other)}; use the same wording, and pictures of the same shape"
            )
    chunk = CHUNK if _stackable(inputs) else 1
    entering = [_entering(adapter, inputs[i : i + chunk]) for i in range(0, len(inputs), chunk)]
    # The pictures are in the embeddings: what says how to read them is of no more use.
    names = [name for name in _TEXT if name in first.tensors]
    tensors = {name: torch.cat([i.tensors[name] for i in inputs]) for name in names}
    ids = torch.cat([i.tensors["input_ids"] for i in inputs])
    tensors["inputs_embeds"] = torch.cat([embeddings for embeddings, _ in entering])
    positions = [found for _, found in entering if found is not None]
    if positions:
        tensors[_POSITIONS] = torch.cat(positions, dim=1)
    return InputBatch(tensors, ids, first.roles, first.is_image)


def _stackable(inputs: Sequence[ModelInputs]) -> bool:
    """Whether every tensor of the prompts has the same shape but for its first axis."""
    shapes = [{name: tensor.shape[1:] for name, tensor in one.tensors.items()} for one in inputs]
    return all(other == shapes[0] for other in shapes)


def _entering(adapter: Adapter, inputs: Sequence[ModelInputs]) -> tuple[Tensor, Tensor | None]:
    """What enters the first decoder layer, as the model itself makes it.

    Returns:
        The embeddings `[B, T, d]`, and for M-RoPE the positions `[3, B, T]`: the model could not derive them again
        from embeddings alone.
    """
    kept: list[tuple[Tensor | None, Tensor | None]] = []

    class _Found(Exception):
        """Ends the forward: nothing after the embeddings is wanted."""

    def hook(_module: object, args: tuple, kwargs: dict) -> None:
        kept.append((kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else args[0], kwargs.get(_POSITIONS)))
        raise _Found

    tensors = {name: torch.cat([i.tensors[name] for i in inputs]) for name in inputs[0].tensors}
    handle = adapter.decoder().register_forward_pre_hook(hook, with_kwargs=True)
    try:
        adapter.model(**tensors, use_cache=False)
    except _Found:
        pass
    finally:
        handle.remove()
    embeddings, positions = kept[0]
    if embeddings is None:  # a text-only model embeds inside its decoder
        embeddings = adapter.model.get_input_embeddings()(tensors["input_ids"])
    if not adapter.m_rope:
        return embeddings, None
    if positions is None:  # text alone
        positions = torch.arange(embeddings.shape[1], device=embeddings.device).expand(3, len(embeddings), -1)
    return embeddings, positions
