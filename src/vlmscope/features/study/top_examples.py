"""Top activating examples of chosen features over a set of prompts, with where in the picture they fire."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlmscope.core.intervention import FeatureExample
from vlmscope.core.records import FeatureId
from vlmscope.core.study import IMAGE, LEVELS, TEXT
from vlmscope.features.study.config import MOST_TOKENS
from vlmscope.features.study.forwards import StudyPass
from vlmscope.features.study.tables import Pairs
from vlmscope.models.base import ModelInputs
from vlmscope.scope import Scope


@dataclass(frozen=True)
class StudyItem:
    """A prompt to look at: its inputs, a caption that says what is in it, and its picture as PNG (None for text)."""

    inputs: ModelInputs
    caption: str
    image_png: bytes | None


@torch.no_grad()
def top_examples(
    scope: Scope,
    features: Sequence[FeatureId],
    items: Sequence[StudyItem],
    count: int = 6,
    batch_size: int = 64,
) -> dict[FeatureId, tuple[FeatureExample, ...]]:
    """The `count` items on which each feature is most active at any position, strongest first; ties keep their order.

    Items of equal length are run together. A feature that never fires gets no example. Activations below the peak are
    good to 1/510 of it, as in a study (`vlmscope.features.study.run`), whose way this is.
    """
    by_layer: dict[int, list[int]] = {}
    for feature in dict.fromkeys(features):
        by_layer.setdefault(feature.layer, []).append(feature.index)
    only = {layer: torch.tensor(indices) for layer, indices in by_layer.items()}
    study = StudyPass(scope, count, 0, MOST_TOKENS, only)
    for group in _by_length(items):
        for start in range(0, len(group), batch_size):
            rows = group[start : start + batch_size]
            batch = scope.batch([items[i].inputs for i in rows])
            kinds = np.stack([np.where(items[i].inputs.is_image, IMAGE, TEXT) for i in rows])
            with study.watching(np.array(rows), kinds, batch.tensors.get("attention_mask")):
                scope.forward(batch)
    study.settle()
    found: dict[FeatureId, list[FeatureExample]] = {feature: [] for feature in features}
    for layer, indices in by_layer.items():
        study.layers[layer].settle()
        for column, item, acts in _kept(study.layers[layer].kept, items):
            found[FeatureId(layer, indices[column])].append(_example(items[item], acts))
    return {feature: tuple(examples) for feature, examples in found.items()}


def _kept(pairs: Pairs, items: Sequence[StudyItem]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Column of the feature, item and activations [T] of every pair, strongest first."""
    for row in range(len(pairs)):
        item, entries = int(pairs.item[row]), slice(pairs.starts[row], pairs.starts[row + 1])
        acts = np.zeros(len(items[item].inputs), dtype=np.float32)
        acts[pairs.positions[entries]] = pairs.levels[entries] * (pairs.peak[row] / LEVELS)
        acts[pairs.position[row]] = pairs.peak[row]
        yield int(pairs.feature[row]), item, acts


def _by_length(items: Sequence[StudyItem]) -> list[list[int]]:
    groups: dict[tuple[int, bytes], list[int]] = {}
    for i, item in enumerate(items):
        groups.setdefault((len(item.inputs), item.inputs.is_image.tobytes()), []).append(i)
    return list(groups.values())


def _example(item: StudyItem, acts: np.ndarray) -> FeatureExample:
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
