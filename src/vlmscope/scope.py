"""The subject of every analysis: a model with its tokenizer or processor and the transcoders of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from vlmscope.activations import mlp_inputs
from vlmscope.core.errors import UserError
from vlmscope.core.records import TOWER, as_rgb, layer_name
from vlmscope.data.images import open_image
from vlmscope.models.base import Adapter, ModelInputs, Stack, stack_of
from vlmscope.models.batching import InputBatch, make_batch
from vlmscope.models.loading import VLM
from vlmscope.transcoders.transcoder import Transcoder, TranscoderSet

Picture: TypeAlias = str | Path | Image.Image | np.ndarray  # an array: uint8, [H, W] grey or [H, W, 3 or 4]
Pictures: TypeAlias = Picture | Sequence[Picture] | None


@dataclass(frozen=True)
class Scope:
    """A loaded model and its transcoders; making one computes and copies nothing.

    Legend of the methods: B prompts, T positions, d model width, V vocabulary.
    """

    vlm: VLM
    transcoders: TranscoderSet
    study: Path | None = None  # the labelled study that is shipped with both
    tower: TranscoderSet | None = None  # transcoders of the vision tower, for graphs that begin at the patches
    tower_study: Path | None = None  # the labelled study that is shipped with those

    @property
    def adapter(self) -> Adapter:
        """The family's adapter around the Hugging Face model."""
        return self.vlm.adapter

    @property
    def stack(self) -> Stack:
        """The layers that the transcoders belong to."""
        return stack_of(self.adapter, self.transcoders.site)

    @property
    def first_layer(self) -> int:
        """The number of layer 0 in ids of features: 0 in the decoder, `TOWER` in the vision tower."""
        return TOWER if self.transcoders.site == "tower" else 0

    @property
    def layers(self) -> dict[int, Transcoder]:
        """The transcoders by the layers of their features' ids, ascending."""
        return {self.first_layer + layer: one for layer, one in self.transcoders.transcoders.items()}

    @property
    def widths(self) -> dict[int, int]:
        """How many features each of `layers` has."""
        return {layer: one.config.n_features for layer, one in self.layers.items()}

    def at(self, layer: int) -> Scope:
        """The model with the set that a layer of a feature's id belongs to: the tower's below 0.

        Raises:
            UserError: there are no transcoders of the tower.
        """
        if layer >= 0 or self.transcoders.site == "tower":
            return self
        if self.tower is None:
            raise UserError(f"{layer_name(layer)}: no transcoders of the vision tower are loaded")
        return Scope(self.vlm, self.tower, self.tower_study)

    def inputs(self, prompt: str, images: Pictures = ()) -> ModelInputs:
        """One user turn, ready for the model; pictures are paths, PIL images or arrays, one or a list."""
        return self.vlm.prepare(prompt, [opened(image) for image in picture_list(images)])

    def batch(self, inputs: Sequence[ModelInputs]) -> InputBatch:
        """Prompts of equal length and equal positions of pictures as one batch."""
        return make_batch(self.adapter, inputs)

    def capture(self, batch: InputBatch, layers: Sequence[int] | None = None) -> dict[int, Tensor]:
        """MLP inputs [B, T, d] by layer of one forward; of all layers with a transcoder when None."""
        return mlp_inputs(self.adapter, batch, self.transcoders.layers if layers is None else layers)

    def forward(self, batch: InputBatch) -> Tensor:
        """Logits [B, V] at the last position of one forward, under the hooks that are set; raises unless finite."""
        return batch.next_logits(self.adapter)


def picture_list(images: Pictures) -> list[Picture]:
    """One picture, several or none as a list; an array of four dimensions is several."""
    if images is None:
        return []
    single = isinstance(images, str | Path | Image.Image) or (isinstance(images, np.ndarray) and images.ndim < 4)
    return [images] if single else list(images)  # pyright: ignore[reportArgumentType, reportReturnType]


def opened(picture: Picture) -> Image.Image:
    """A picture in RGB.

    Raises:
        UserError: a file that is no picture, or an array of another type or shape.
    """
    if isinstance(picture, np.ndarray):
        shape = "x".join(map(str, picture.shape))
        if picture.dtype != np.uint8 or not (picture.ndim == 2 or picture.ndim == 3 and picture.shape[2] in (3, 4)):
            raise UserError(
                f"a picture is an array of {shape} {picture.dtype}; give uint8 values 0 to 255, height x width x 3"
            )
        picture = Image.fromarray(picture)
    if not isinstance(picture, str | Path | Image.Image):
        raise UserError(f"a picture is a {type(picture).__name__}; give a path, a PIL image or a numpy array")
    return as_rgb(picture) if isinstance(picture, Image.Image) else open_image(picture)
