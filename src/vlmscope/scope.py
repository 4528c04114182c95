"""The subject of every analysis: a model with its tokenizer or processor and the transcoders of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from PIL import Image
from torch import Tensor

from vlmscope.activations import mlp_inputs
from vlmscope.core.records import as_rgb
from vlmscope.data.images import open_image
from vlmscope.models.base import Adapter, ModelInputs
from vlmscope.models.batching import InputBatch, make_batch
from vlmscope.models.loading import VLM
from vlmscope.transcoders.transcoder import TranscoderSet

Picture: TypeAlias = str | Path | Image.Image


@dataclass(frozen=True)
class Scope:
    """A loaded model and its transcoders; making one computes and copies nothing.

    Legend of the methods: B prompts, T positions, d model width, V vocabulary.
    """

    vlm: VLM
    transcoders: TranscoderSet

    @property
    def adapter(self) -> Adapter:
        """The family's adapter around the Hugging Face model."""
        return self.vlm.adapter

    def inputs(self, prompt: str, images: Sequence[Picture] = ()) -> ModelInputs:
        """One user turn, ready for the model; pictures are paths or PIL images."""
        return self.vlm.prepare(prompt, [opened(image) for image in images])

    def batch(self, inputs: Sequence[ModelInputs]) -> InputBatch:
        """Prompts of equal length and equal positions of pictures as one batch."""
        return make_batch(self.adapter, inputs)

    def capture(self, batch: InputBatch, layers: Sequence[int] | None = None) -> dict[int, Tensor]:
        """MLP inputs [B, T, d] by layer of one forward; of all layers with a transcoder when None."""
        return mlp_inputs(self.adapter, batch, self.transcoders.layers if layers is None else layers)

    @torch.no_grad()
    def forward(self, batch: InputBatch) -> Tensor:
        """Logits [B, V] at the last position of one forward, under the hooks that are set; raises unless finite."""
        return self.adapter.next_logits(batch.tensors)


def opened(picture: Picture) -> Image.Image:
    """A picture in RGB, from a path or a PIL image."""
    return as_rgb(picture) if isinstance(picture, Image.Image) else open_image(picture)
