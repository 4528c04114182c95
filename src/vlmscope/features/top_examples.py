"""Evidence of a feature: the inputs on which it is most active, of a study or of some prompts, and where it fires."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlmscope.core.intervention import FeatureExample
from vlmscope.core.records import FeatureId
from vlmscope.core.study import IMAGE, LEVELS, TEXT, TOP, StudyExample
from vlmscope.data.images import png_bytes
from vlmscope.features.config import MOST_TOKENS
from vlmscope.features.study import StudyInput, StudyPass
from vlmscope.features.study_files import StudyFolder
from vlmscope.models.base import ModelInputs
from vlmscope.scope import Scope

_SIDE = 512  # pixels of a study's picture


def study_examples(study: StudyFolder, feature: FeatureId, count: int) -> tuple[FeatureExample, ...]:
    """The `count` strongest examples of a study, with their pictures."""
    return tuple(_study_example(study, example) for example in study.feature(feature).group(TOP)[:count])


def _study_example(study: StudyFolder, example: StudyExample) -> FeatureExample:
    view = study.view(example)
    pictures = study.pictures(view.item)
    tokens, activations = view.window()
    first = view.item.pictures == 0  # figures show one picture
    return FeatureExample(
        activation=example.activation,
        caption=view.item.caption,
        image_png=png_bytes(pictures[0], _SIDE) if pictures else None,
        patch_boxes=tuple(box for box, own in zip(view.item.patch_boxes, first.tolist(), strict=True) if own),
        patch_activations=tuple(view.patch_activations[first].tolist()),
        tokens=tokens,
        token_activations=tuple(activations.tolist()),
    )


@dataclass(frozen=True)
class CaptionedPrompt:
    """A prompt to look at: its inputs, a caption that says what is in it, and its picture as PNG (None for text)."""

    inputs: ModelInputs
    caption: str
    image_png: bytes | None


@torch.no_grad()
def top_examples(
    scope: Scope,
    features: Sequence[FeatureId],
    items: Sequence[CaptionedPrompt],
    count: int = 6,
    forward_tokens: int = 8192,
) -> dict[FeatureId, tuple[FeatureExample, ...]]:
    """The `count` items on which each feature is most active at any position, strongest first; ties keep their order.

    A feature that never fires gets no example. Activations below the peak are good to 1/510 of it, as in a study.
    """
    by_layer: dict[int, list[int]] = {}
    for feature in dict.fromkeys(features):
        by_layer.setdefault(feature.layer, []).append(feature.index)
    only = {layer: torch.tensor(indices) for layer, indices in by_layer.items()}
    study = StudyPass(scope, count, 0, MOST_TOKENS, only)
    kinds = [np.where(item.inputs.is_image, IMAGE, TEXT) for item in items]
    inputs = [StudyInput(i, item.inputs.tensors, kinds[i], {}) for i, item in enumerate(items)]
    study.add(inputs, forward_tokens)
    examples: dict[FeatureId, list[FeatureExample]] = {feature: [] for feature in features}
    for layer, indices in by_layer.items():
        study.layers[layer].settle()
        pairs = study.layers[layer].kept  # by feature, strongest first
        ends = np.cumsum(pairs.count)
        for row in range(len(pairs)):
            item, entries = items[pairs.item[row]], slice(ends[row] - pairs.count[row], ends[row])
            acts = np.zeros(len(item.inputs), dtype=np.float32)
            acts[pairs.positions[entries]] = pairs.levels[entries] * (pairs.peak[row] / LEVELS)
            acts[pairs.position[row]] = pairs.peak[row]
            examples[FeatureId(layer, indices[pairs.feature[row]])].append(_example(item, acts))
    return {feature: tuple(own) for feature, own in examples.items()}


def _example(item: CaptionedPrompt, acts: np.ndarray) -> FeatureExample:
    inputs = item.inputs
    soft, text = np.flatnonzero(inputs.is_image), np.flatnonzero(~inputs.is_image)
    return FeatureExample(
        activation=float(acts.max()),
        caption=item.caption,
        image_png=item.image_png,
        patch_boxes=tuple(box for i in soft if (box := inputs.patch_boxes[i]) is not None),
        patch_activations=tuple(acts[soft].tolist()),
        tokens=tuple(inputs.tokens[i] for i in text),
        token_activations=tuple(acts[text].tolist()),
    )
