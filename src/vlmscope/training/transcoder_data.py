"""Batches for transcoders and the tokens that count in them.

A forward is a dict with the keyword arguments of the Hugging Face model (`input_ids` [B, T], `attention_mask` [B, T],
`pixel_values`, `token_type_ids`) and, for the cross-entropy, `loss_mask` [B, T] bool: True at answer tokens, each of
which is predicted from the position before it. A batch is one forward or a list of them, whose tokens are taken
together. Legend: N valid tokens of the batch, d model width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmscope.activations.capture import capture_mlp
from vlmscope.models.base import Adapter
from vlmscope.models.conversations import LOSS_MASK

ENDED = "add data.sources.NAME.repeat=true, give more data, or lower trainer.max_steps"  # what to do then

Forward = Mapping[str, Tensor]
Batch = Forward | Sequence[Forward]


class OwnPart(list[dict[str, Tensor]]):
    """The forwards of a batch that are this process's own where several train together; it may be empty.

    Any other batch is the whole one, of which each process takes its part (`vlmscope.training.shares`).
    """


def forwards(batch: Batch) -> Sequence[Forward]:
    """The forwards that a batch is made of."""
    return [batch] if isinstance(batch, Mapping) else batch


def forward_arguments(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch without what the model's forward does not know."""
    return {name: tensor for name, tensor in batch.items() if name != LOSS_MASK}


@dataclass(frozen=True)
class LayerActivations:
    """MLP inputs and outputs at the valid tokens: layer -> ([N, d], [N, d]); `is_image` [N] bool.

    Where a batch is divided among hosts, these are the host's tokens: numbers `first`, `first + 1`, .. of the `joint`
    tokens of the whole batch (None: all are here).
    """

    by_layer: dict[int, tuple[Tensor, Tensor]]
    is_image: Tensor
    first: int = 0
    joint: int | None = None

    @property
    def n_tokens(self) -> int:
        """N."""
        return self.is_image.shape[0]

    @property
    def joint_tokens(self) -> int:
        """Tokens of the batch on all hosts."""
        return self.n_tokens if self.joint is None else self.joint


def collect(adapter: Adapter, batch: Batch) -> LayerActivations:
    """The activations of a batch in the frozen model; padding is dropped."""
    parts: list[LayerActivations] = []
    for one in forwards(batch):
        placed = on_device(adapter, one)
        parts.append(select_valid(adapter, placed, capture_mlp(adapter, forward_arguments(placed))))
    return parts[0] if len(parts) == 1 else joined(parts)


def joined(parts: Sequence[LayerActivations]) -> LayerActivations:
    """The tokens of several forwards as one batch, in order."""
    by_layer = {
        layer: (
            torch.cat([part.by_layer[layer][0] for part in parts]),
            torch.cat([part.by_layer[layer][1] for part in parts]),
        )
        for layer in parts[0].by_layer
    }
    return LayerActivations(by_layer, torch.cat([part.is_image for part in parts]))


def on_device(adapter: Adapter, batch: Forward) -> dict[str, Tensor]:
    """A forward where the model is."""
    return {name: tensor.to(adapter.device) for name, tensor in batch.items()}


def select_valid(
    adapter: Adapter, batch: Mapping[str, Tensor], captured: Mapping[int, tuple[Tensor, Tensor]]
) -> LayerActivations:
    """Keep the positions that are not padding: layer -> ([B, T, d], [B, T, d]) becomes ([N, d], [N, d])."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    valid = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    soft = adapter.soft_token_id()
    is_image = torch.zeros_like(valid) if soft is None else ids == soft
    by_layer = {layer: (x[valid], y[valid]) for layer, (x, y) in captured.items()}
    return LayerActivations(by_layer, is_image[valid])
