"""Which features fire on soft tokens, and in few enough places that one can ask where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlmscope.core.ids import FeatureId
from vlmscope.models.batching import InputBatch
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import TranscoderSet


@dataclass(frozen=True)
class ImageFeature:
    """How a feature fires on the soft tokens of some prompts.

    Attributes:
        feature: which.
        strength: mean over all prompts of its activations summed over the soft tokens.
        fires: share of prompts with at least one soft token where it is active.
        tokens: mean share of the soft tokens where it is active, over the prompts where it fires.
    """

    feature: FeatureId
    strength: float
    fires: float
    tokens: float


@torch.no_grad()
def image_features(
    scope: Scope,
    batch: InputBatch,
    count: int,
    least_share: float = 0.0,
    most_tokens: float = 1.0,
    per_layer: int | None = None,
) -> list[ImageFeature]:
    """The strongest features on the soft tokens of some prompts, strongest first.

    Args:
        scope: the model and its transcoders.
        batch: prompts with pictures.
        count: at most this many.
        least_share: of the prompts in which a feature must fire at all.
        most_tokens: share of the soft tokens above which a feature is left out, since it says nothing of a place.
        per_layer: at most this many of one layer.
    """
    soft = torch.from_numpy(batch.is_image)
    found: list[ImageFeature] = []
    for layer, x in scope.capture(batch).items():
        acts = scope.transcoders[layer].encode(x[:, soft]).dense(scope.transcoders[layer].config.n_features)
        active = (acts > 0).double()
        fires = active.amax(1)
        tokens = active.mean(1).sum(0) / fires.sum(0).clamp(min=1)
        strength, share = acts.sum(1).double().mean(0), fires.mean(0)
        strength[(share < least_share) | (share == 0) | (tokens > most_tokens)] = 0
        best = strength.topk(min(count if per_layer is None else per_layer, len(strength))).indices.tolist()
        found += [
            ImageFeature(FeatureId(layer, i), float(strength[i]), float(share[i]), float(tokens[i]))
            for i in best
            if strength[i] > 0
        ]
    return sorted(found, key=lambda one: (-one.strength, one.feature))[:count]


def activations_at(
    transcoders: TranscoderSet, mlp_in: dict[int, torch.Tensor], features: Sequence[FeatureId]
) -> dict[FeatureId, torch.Tensor]:
    """Activations `[B, T]` of some features from MLP inputs `[B, T, d]` by layer."""
    found: dict[FeatureId, torch.Tensor] = {}
    for layer in dict.fromkeys(feature.layer for feature in features):
        acts = transcoders[layer].encode(mlp_in[layer]).dense(transcoders[layer].config.n_features)
        found |= {feature: acts[..., feature.index] for feature in features if feature.layer == layer}
    return found
