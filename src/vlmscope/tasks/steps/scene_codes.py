"""Every feature's activation on many pictures under one question, at the last position and over the picture."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from PIL import Image

    from vlmscope.tasks.bench import Bench

CHUNK = 100  # pictures a forward
PLACES = ("last", "picture")
Codes = dict[int, np.ndarray]  # layer -> [n, F] float32


@torch.no_grad()
def codes_of(
    bench: Bench, images: Iterable[Image.Image], prompt: str, places: tuple[str, ...] = PLACES
) -> dict[str, Codes]:
    """Place -> layer -> [n, F]: activations at the last position, and summed over the soft tokens of the picture.

    Args:
        bench: the model and its transcoders.
        images: one picture a prompt; all prompts are equally long.
        prompt: what is asked.
        places: of `PLACES`, which are wanted.
    """
    layers = bench.transcoders.layers
    found: dict[str, dict[int, list[np.ndarray]]] = {place: {layer: [] for layer in layers} for place in places}
    for some in _chunks(images):
        batch = bench.scope.batch(bench.inputs(some, prompt))
        soft = torch.from_numpy(batch.is_image)
        for layer, x in bench.scope.capture(batch, layers).items():
            transcoder = bench.transcoders[layer]
            width = transcoder.config.n_features
            for place in places:
                if place == "last":
                    code = transcoder.encode(x[:, -1]).dense(width)
                else:
                    sparse = transcoder.encode(x[:, soft])
                    flat = sparse.indices.flatten(1)
                    code = sparse.values.new_zeros(len(flat), width).scatter_add_(1, flat, sparse.values.flatten(1))
                found[place][layer].append(code.float().cpu().numpy())
    return {place: {layer: np.concatenate(parts) for layer, parts in of.items()} for place, of in found.items()}


def _chunks(images: Iterable[Image.Image]) -> Iterable[list[Image.Image]]:
    some: list[Image.Image] = []
    for image in images:
        some.append(image)
        if len(some) == CHUNK:
            yield some
            some = []
    if some:
        yield some
