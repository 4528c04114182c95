"""What the patches of a picture contribute to a feature wherever it is active on soft tokens, in one map a picture.

The sum of its pre-activations there is one affine function of the sources, so one reader and one backward pass do.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from vlmscope.attribution.readers import target_readers
from vlmscope.attribution.targets import Targets, feature_target
from vlmscope.attribution.vision import VisionPath
from vlmscope.core.ids import FeatureId
from vlmscope.core.patches import PictureMap
from vlmscope.replacement.model import ReplacementModel


def feature_at(replacement: ReplacementModel, feature: FeatureId, positions: np.ndarray) -> Targets:
    """The pre-activations of a feature at those of some positions where it is active, a target each.

    Args:
        replacement: the frozen model.
        feature: which.
        positions: `[n]` int64.

    Raises:
        UserError: the model has no such feature, or it is active nowhere in the prompt.
    """
    one = feature_target(replacement, feature)
    found = replacement.features[feature.layer]
    here = torch.from_numpy(np.isin(found.position.numpy(force=True), positions)).to(found.index.device)
    rows = torch.nonzero((found.index == feature.index) & here)[:, 0]
    at = found.position[rows].numpy(force=True)
    scale = replacement.layers[feature.layer].mlp_in_scale[found.position[rows]]
    return replace(
        one,
        positions=at,
        token_ids=np.full(len(at), feature.index),
        probabilities=np.ones(len(at)),
        weights=np.ones(len(at)),
        vectors=found.w_enc[found.index[rows]] * scale,
        constants=found.encoder_bias[rows],
        values=found.pre_activation[rows],
        labels=tuple(f"{feature} at {position}" for position in at),
    )


def feature_path_maps(
    replacement: ReplacementModel,
    path: VisionPath,
    features: Sequence[FeatureId],
    effect: str = "total",
    baseline: str = "grey",
) -> dict[FeatureId, list[PictureMap]]:
    """For each feature a map a picture: what its patches contribute to the feature's sum over all soft tokens.

    Args:
        replacement: the frozen model.
        path: the vision path of the same prompt.
        features: those active on at least one soft token.
        effect: "total" (active features of earlier layers respond) or "direct".
        baseline: as for `VisionPath.maps`.

    Raises:
        UserError: as `feature_at`, or no such baseline.
    """
    soft = np.flatnonzero(replacement.inputs.is_image)
    found = {}
    for feature in features:
        targets = feature_at(replacement, feature, soft)
        readers = target_readers(replacement, targets, total=effect == "total", summed=True)
        found[feature] = path.maps(readers, [str(feature)], baseline)
    return found
