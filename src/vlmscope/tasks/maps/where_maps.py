"""The three maps of a feature over the pictures of one prompt, and those of every soft token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmscope.core.errors import UserError
from vlmscope.core.records import FeatureId

if TYPE_CHECKING:
    import numpy as np

    from vlmscope.attention.config import WhereConfig
    from vlmscope.attribution.config import AttributionConfig
    from vlmscope.core.maps import PictureMap, TokenMaps
    from vlmscope.models.base import ModelInputs
    from vlmscope.models.boxes import PicturePatches
    from vlmscope.replacement.model import ReplacementModel
    from vlmscope.scope import Scope

KINDS = ("rollout", "similarity", "vision_path", "activation")


@dataclass(frozen=True)
class WhereMaps:
    """Maps of one prompt.

    Attributes:
        activations: feature -> `[T]` at all positions.
        maps: feature -> kind of `KINDS` -> one map a picture.
        tokens: "rollout" and "similarity" -> those of every soft token, one record a picture.
        patches: the pictures in the tower.
    """

    activations: dict[FeatureId, np.ndarray]
    maps: dict[FeatureId, dict[str, list[PictureMap]]]
    tokens: dict[str, list[TokenMaps]]
    patches: list[PicturePatches]


def where_maps(
    scope: Scope,
    inputs: ModelInputs,
    features: Sequence[FeatureId],
    where: WhereConfig,
    attribution: AttributionConfig,
) -> WhereMaps:
    """Make the maps of some features on one prompt.

    Raises:
        UserError: the model or the prompt has no picture, there is no such feature, or one is active on no soft token.
    """
    import torch

    from vlmscope.attention.rollout import on_pictures, own_map, token_maps
    from vlmscope.attribution.vision import feature_path_maps, vision_path
    from vlmscope.replacement.model import build_replacement

    tokens = token_maps(scope.vlm, inputs, where)
    dtype = {"float32": torch.float32, "float64": torch.float64, "model": None}[attribution.dtype]
    replacement = build_replacement(scope, inputs, dtype)
    activations = {feature: _activations(replacement, feature) for feature in features}
    path = vision_path(scope.vlm, inputs, attribution.patch_rule)
    path_maps = feature_path_maps(replacement, path, features, attribution.patch_effect, attribution.patch_baseline)
    maps: dict[FeatureId, dict[str, list[PictureMap]]] = {}
    for feature, values in activations.items():
        mine, name = on_pictures(values, inputs), str(feature)
        maps[feature] = {
            kind: [found.weighted(part, name) for found, part in zip(records, mine, strict=True)]
            for kind, records in tokens.items()
        }
        maps[feature]["vision_path"] = path_maps[feature]
        maps[feature]["activation"] = [
            own_map(part, patches, number, name)
            for number, (part, patches) in enumerate(zip(mine, path.pictures, strict=True))
        ]
    return WhereMaps(activations, maps, tokens, path.pictures)


def _activations(replacement: ReplacementModel, feature: FeatureId) -> np.ndarray:
    """`[T]`, 0 where it is not active.

    Raises:
        UserError: there is no such feature, or it is active on no soft token.
    """
    import numpy as np

    if feature.layer >= replacement.n_layers:
        raise UserError(f"{feature}: the model has layers 0 to {replacement.n_layers - 1}; choose a feature of one")
    found = replacement.features[feature.layer]
    if feature.index >= len(found.w_enc):
        raise UserError(
            f"{feature}: layer {feature.layer} has features 0 to {len(found.w_enc) - 1}; choose one of them"
        )
    mine = (found.index == feature.index).numpy(force=True)
    values = np.zeros(replacement.n_positions)
    values[found.position.numpy(force=True)[mine]] = found.activation.double().numpy(force=True)[mine]
    soft = replacement.inputs.is_image
    if not values[soft].any():
        if values.any():
            at = int(values.argmax())
            raise UserError(
                f"{feature} is active on text alone here (at {at}, {replacement.inputs.tokens[at]!r}), not on the "
                f"picture; task=trace attribution.feature={feature}@max attribution.patches=true maps it over patches"
            )
        raise UserError(f"{feature} is not active in this prompt; leave task.features out to see those that are")
    return values
