"""Prompts of equal length as one batch, with the embeddings that enter the decoder computed once.

Interventions run the decoder many times on the same inputs; the vision tower is not part of what they change, so its
output is kept. Legend: B prompts, T positions, d model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlmscope.core.errors import UserError
from vlmscope.core.records import PatchBox, Places
from vlmscope.models.base import INJECTIONS, Adapter, ModelInputs

CHUNK = 64  # prompts a forward of the vision tower
_POSITIONS = "position_ids"
_TEXT = ("attention_mask", "token_type_ids", "mm_token_type_ids")  # inputs that say something of each position


@dataclass(frozen=True)
class InputBatch:
    """B prompts of T tokens each."""

    # Arguments of `Adapter.forward` with `inputs_embeds [B, T, d]` in place of ids and pixels; for M-RoPE also
    # `position_ids [3, B, T]`, for DeepStack `INJECTIONS [B, n, T, d]`.
    tensors: dict[str, Tensor]
    input_ids: Tensor  # [B, T]
    roles: np.ndarray  # [T] position roles, the same for every prompt
    is_image: np.ndarray  # [T] bool
    # T entries, as in `ModelInputs`; empty where the prompts' pictures have different shapes.
    patch_boxes: tuple[PatchBox | None, ...] = ()

    @property
    def places(self) -> Places:
        """The positions, to choose among them."""
        return Places(self.roles, self.patch_boxes)

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
        return InputBatch(tensors, self.input_ids[index], self.roles, self.is_image, self.patch_boxes)


@torch.no_grad()
def make_batch(adapter: Adapter, inputs: Sequence[ModelInputs]) -> InputBatch:
    """Stack prompts of equal length, whose soft tokens are at the same positions, and compute their embeddings."""
    if not inputs:
        raise UserError("no inputs to batch: choose at least one picture")
    first = inputs[0]
    for other in inputs:
        if len(other) != len(first) or not np.array_equal(other.is_image, first.is_image):
            raise UserError(
                f"prompts of a batch must align: {first.prompt!r} has {len(first)} tokens, "
                f"{other.prompt!r} has {len(other)}; use the same wording, and pictures of the same shape"
            )
    # Pictures of several shapes cannot be one tensor, though their soft tokens are as many.
    shapes = [{name: tensor.shape[1:] for name, tensor in each.tensors.items()} for each in inputs]
    chunk = CHUNK if all(shape == shapes[0] for shape in shapes) else 1
    parts = [entering(adapter, inputs[i : i + chunk]) for i in range(0, len(inputs), chunk)]
    # The pictures are in the embeddings: what says how to read them is of no more use.
    names = [name for name in _TEXT if name in first.tensors]
    tensors = {name: torch.cat([i.tensors[name] for i in inputs]) for name in names}
    tensors["inputs_embeds"] = torch.cat([part.embeddings for part in parts])
    if adapter.m_rope:
        tensors[_POSITIONS] = torch.cat([part.positions for part in parts if part.positions is not None], dim=1)
    injections = [part.injections for part in parts if part.injections is not None]
    if injections:
        tensors[INJECTIONS] = torch.cat(injections)
    ids = torch.cat([i.tensors["input_ids"] for i in inputs])
    boxes = tuple(first.patch_boxes) if all(i.patch_boxes == first.patch_boxes for i in inputs) else ()
    return InputBatch(tensors, ids, first.roles, first.is_image, boxes)


class Entering(NamedTuple):
    """What enters the decoder: `embeddings [B, T, d]`; for M-RoPE `positions [3, B, T]`, which the model could not
    derive again from embeddings alone; for DeepStack `injections [B, n, T, d]`.
    """

    embeddings: Tensor
    positions: Tensor | None
    injections: Tensor | None


def entering(adapter: Adapter, inputs: Sequence[ModelInputs]) -> Entering:
    """What enters the first decoder layer and is added after others, as the model makes it, with its gradient."""
    calls: list[Entering] = []

    class _Reached(Exception):
        """Ends the forward: nothing after the embeddings is wanted."""

    def hook(_module: object, args: tuple, kwargs: dict) -> None:
        embeddings = kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else args[0]
        calls.append(Entering(embeddings, kwargs.get(_POSITIONS), adapter.injections(kwargs)))
        raise _Reached

    tensors = {name: torch.cat([i.tensors[name] for i in inputs]) for name in inputs[0].tensors}
    handle = adapter.decoder().register_forward_pre_hook(hook, with_kwargs=True)
    try:
        adapter.forward(tensors, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    embeddings, positions, injections = calls[0]
    if embeddings is None:  # a text-only model embeds inside its decoder
        embeddings = adapter.model.get_input_embeddings()(tensors["input_ids"])
    if not adapter.m_rope:
        positions = None
    elif positions is None:  # text alone
        size, length = embeddings.shape[:2]
        positions = torch.arange(length, device=embeddings.device).expand(3, size, -1)
    return Entering(embeddings, positions, injections)


@contextmanager
def watching_injections(adapter: Adapter) -> Iterator[list[Tensor]]:
    """A list to which every forward appends its injections `[B, n, T, d]`, if it has any."""
    seen: list[Tensor] = []

    def hook(_module: object, _args: tuple, kwargs: dict) -> None:
        injections = adapter.injections(kwargs)
        if injections is not None:
            seen.append(injections)

    handle = adapter.decoder().register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
