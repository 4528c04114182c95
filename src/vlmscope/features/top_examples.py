"""Top activating examples of chosen features over a set of prompts, with where in the picture they fire."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmscope.activations.mlp_inputs import mlp_inputs
from vlmscope.core.ids import FeatureId
from vlmscope.core.intervention import FeatureExample
from vlmscope.models.base import Adapter, ModelInputs
from vlmscope.models.batching import make_batch
from vlmscope.transcoders.transcoder import TranscoderSet


@dataclass(frozen=True)
class StudyItem:
    """A prompt to look at: its inputs, a caption that says what is in it, and its picture as PNG (None for text)."""

    inputs: ModelInputs
    caption: str
    image_png: bytes | None


@torch.no_grad()
def top_examples(
    adapter: Adapter,
    transcoders: TranscoderSet,
    features: Sequence[FeatureId],
    items: Sequence[StudyItem],
    count: int = 6,
    batch_size: int = 64,
) -> dict[FeatureId, tuple[FeatureExample, ...]]:
    """The `count` items on which each feature is most active at any position, strongest first; ties keep their order.

    Items of equal length are run together. A feature that never fires gets no example.
    """
    by_layer: dict[int, list[int]] = {}
    for feature in features:
        by_layer.setdefault(feature.layer, []).append(feature.index)
    heaps: dict[FeatureId, list[tuple[float, int, Tensor]]] = {feature: [] for feature in features}
    for group in _by_length(items):
        for start in range(0, len(group), batch_size):
            rows = group[start : start + batch_size]
            batch = make_batch(adapter, [items[i].inputs for i in rows])
            for layer, x in mlp_inputs(adapter, batch, sorted(by_layer)).items():
                dense = transcoders[layer].encode(x).dense(transcoders[layer].config.n_features)
                acts = dense[..., torch.tensor(by_layer[layer])]  # [B, T, n]
                for column, index in enumerate(by_layer[layer]):
                    _push(heaps[FeatureId(layer, index)], acts[..., column], rows, count)
    return {
        feature: tuple(_example(items[-i], acts) for _, i, acts in sorted(heap, key=lambda e: (-e[0], -e[1])))
        for feature, heap in heaps.items()
    }


def _by_length(items: Sequence[StudyItem]) -> list[list[int]]:
    groups: dict[tuple[int, bytes], list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault((len(item.inputs), item.inputs.is_image.tobytes()), []).append(i)
    return list(groups.values())


def _push(heap: list, acts: Tensor, rows: list[int], count: int) -> None:
    """Keep the `count` largest; item numbers are negated so that the earlier one wins a tie."""
    peaks = acts.amax(1)
    for row in peaks.argsort(descending=True, stable=True)[:count].tolist():
        entry = (float(peaks[row]), -rows[row], acts[row].clone())
        if entry[0] <= 0:
            return
        if len(heap) < count:
            heapq.heappush(heap, entry)
        elif entry[:2] > heap[0][:2]:
            heapq.heapreplace(heap, entry)


def _example(item: StudyItem, acts: Tensor) -> FeatureExample:
    inputs = item.inputs
    soft = [i for i in range(len(inputs)) if inputs.is_image[i]]
    text = [i for i in range(len(inputs)) if not inputs.is_image[i]]
    boxes = [inputs.patch_boxes[i] for i in soft]
    return FeatureExample(
        activation=float(acts.max()),
        caption=item.caption,
        image_png=item.image_png,
        patch_boxes=tuple(b for b in boxes if b is not None),
        patch_activations=tuple(float(acts[i]) for i in soft),
        tokens=tuple(inputs.tokens[i] for i in text),
        token_activations=tuple(float(acts[i]) for i in text),
    )
