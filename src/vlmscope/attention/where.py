"""Where features look: their maps over the pictures of one prompt, and how deletion and insertion judge such maps.

Deletion and insertion as in Petsiuk et al. 2018 (`vlmscope.attention.rollout.Painted`), beside orders that know nothing
of the feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

import numpy as np
import torch
from PIL import Image

from vlmscope.activations.capture import mlp_inputs_and_logits
from vlmscope.attention.config import WhereConfig
from vlmscope.attention.rollout import Painted, cell_values, on_pictures, own_map, ranking, token_maps
from vlmscope.attribution.config import AttributionConfig
from vlmscope.attribution.vision import feature_path_maps, vision_path
from vlmscope.core.errors import UserError
from vlmscope.core.maps import PictureMap, TokenMaps
from vlmscope.core.records import FeatureId, derive, generator
from vlmscope.features.readouts import activations_at
from vlmscope.metrics.prediction import area_under
from vlmscope.models.base import ModelInputs
from vlmscope.models.boxes import grid_boxes
from vlmscope.replacement.model import ReplacementModel, build_replacement
from vlmscope.scope import Scope

KINDS = ("rollout", "similarity", "vision_path", "activation")
MEASURES = ("deletion", "insertion")
RANDOM, CONTRAST, NO_FEATURE = "random", "contrast", "rollout_no_feature"
_CHUNK = 64  # pictures a forward


@dataclass(frozen=True)
class WhereMaps:
    """Maps of one prompt."""

    activations: dict[FeatureId, np.ndarray]  # feature -> `[T]` at all positions
    maps: dict[FeatureId, dict[str, list[PictureMap]]]  # feature -> kind of `KINDS` -> one map per picture
    # "rollout" and "similarity" -> those of every soft token, one record per picture
    tokens: dict[str, list[TokenMaps]]


def where_maps(
    scope: Scope,
    inputs: ModelInputs,
    features: Sequence[FeatureId],
    where: WhereConfig,
    attribution: AttributionConfig,
) -> WhereMaps:
    """Make the maps of some features on one prompt; each must be active on a soft token."""
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
            kind: [record.weighted(part, name) for record, part in zip(records, mine, strict=True)]
            for kind, records in tokens.items()
        }
        maps[feature]["vision_path"] = path_maps[feature]
        maps[feature]["activation"] = [
            own_map(part, patches, number, name)
            for number, (part, patches) in enumerate(zip(mine, path.pictures, strict=True))
        ]
    return WhereMaps(activations, maps, tokens)


def _activations(replacement: ReplacementModel, feature: FeatureId) -> np.ndarray:
    """`[T]`, 0 where it is not active; it must be active on a soft token."""
    table, values = replacement.feature_activations, np.zeros(replacement.n_positions)
    mine = (table.layer == feature.layer) & (table.index == feature.index)
    values[table.position[mine]] = table.activation[mine]
    if not values[replacement.inputs.is_image].any():
        raise UserError(
            f"{feature} is active on no soft token of this prompt; leave task.features out to see those that are, or "
            f"try task=trace attribution.feature={feature}@max attribution.patches=true"
        )
    return values


@dataclass(frozen=True)
class Subject:
    """What is measured: the features' activations on the soft tokens of a picture, and the answer's probability.

    `image` is uint8 `[H, W, 3]`, `answer` a token id or None.
    """

    scope: Scope
    prompt: str
    image: np.ndarray
    features: tuple[FeatureId, ...]
    answer: int | None = None


@dataclass
class MapCurves:
    """The curves of one kind of map, each a list of runs `[n]` (one, or one per random draw) at `counts` cells.

    `runs["activation", measure, feature]` is the feature's sum over the soft tokens, of that on the untouched picture;
    `runs["answer", measure, feature]` the answer's probability under the same orders.
    """

    counts: tuple[int, ...]
    runs: dict[tuple[str, str, FeatureId], list[np.ndarray]] = field(default_factory=dict)

    def curve(self, feature: FeatureId, measure: str, what: str = "activation") -> np.ndarray:
        """`[n]`, the mean over runs."""
        return np.mean(self.runs[what, measure, feature], axis=0)

    def area(self, feature: FeatureId, measure: str, what: str = "activation") -> float:
        """The mean height of that curve."""
        return float(area_under(np.array(self.counts), self.curve(feature, measure, what)))


def contrast(image: np.ndarray, side: int) -> np.ndarray:
    """`[side, side]`: how far the pixels of a cell are from the picture's mean colour, which takes no model."""
    far = ((image.astype(float) - image.mean((0, 1))) ** 2).sum(-1)
    distances = []
    for box in grid_boxes(side, side):
        left, top, right, bottom = box.pixels(image.shape[1], image.shape[0])
        distances.append(far[top:bottom, left:right].mean())
    return np.reshape(distances, (side, side))


def map_curves(
    subject: Subject,
    maps: Mapping[FeatureId, Mapping[str, PictureMap]],
    where: WhereConfig,
    seed: int,
    shared: Mapping[str, np.ndarray] | None = None,
) -> dict[str, MapCurves]:
    """Curves by kind of map, and of random orders (`RANDOM`).

    Args:
        subject: what is measured.
        maps: feature -> kind -> map, whose order is measured on that feature.
        where: cells, counts and draws.
        seed: of random orders and of ties.
        shared: kind -> `[side, side]`, orders that are measured on all features.
    """
    side, seed = where.side, derive(seed, "curves", subject.prompt, int(subject.image.sum(dtype=np.int64)))
    orders: list[tuple[str, tuple[FeatureId, ...], np.ndarray]] = []
    for feature, kinds in maps.items():
        orders += [(kind, (feature,), ranking(cell_values(one, side), seed)) for kind, one in kinds.items()]
    orders += [(kind, subject.features, ranking(values, seed)) for kind, values in (shared or {}).items()]
    for draw in range(where.draws):
        order = generator(seed, "random", draw).permutation(side * side)
        orders.append((RANDOM, subject.features, order))
    acts, answers = [], []
    by_kind: dict[str, MapCurves] = {}
    # What both measures share, the untouched and the empty picture, is run once per order.
    pictures = [Painted(subject.image, order, side, where.counts) for _, _, order in orders]
    flat = chain.from_iterable(chain(one.deleted(), islice(one.inserted(), 1, len(one.counts) - 1)) for one in pictures)
    while images := list(islice(flat, _CHUNK)):
        part = _measured(subject, images)
        acts.append(part[0])
        answers.append(part[1])
    acts, answers = np.concatenate(acts), np.concatenate(answers)
    whole = acts[0]  # nothing deleted yet
    for number, (kind, features, _) in enumerate(orders):
        n = len(pictures[number].counts)
        first = number * (2 * n - 2)
        deleted = np.arange(first, first + n)
        inserted = np.array([deleted[-1], *range(first + n, first + 2 * n - 2), deleted[0]])
        curves = by_kind.setdefault(kind, MapCurves(pictures[number].counts))
        for measure, rows in zip(MEASURES, (deleted, inserted), strict=True):
            for feature in features:
                column = subject.features.index(feature)
                relative = acts[rows, column] / whole[column]
                curves.runs.setdefault(("activation", measure, feature), []).append(relative)
                curves.runs.setdefault(("answer", measure, feature), []).append(answers[rows])
    return by_kind


def _measured(subject: Subject, images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """`[n, features]` sums of activations on soft tokens, and `[n]` probabilities of the answer (0 without one)."""
    scope, layers = subject.scope, sorted({feature.layer for feature in subject.features})
    batch = scope.batch([scope.vlm.prepare(subject.prompt, [Image.fromarray(image)]) for image in images])
    soft = torch.from_numpy(batch.is_image)
    mlp_in, logits = mlp_inputs_and_logits(scope.adapter, batch, layers)
    activations = activations_at(scope.transcoders, {k: x[:, soft] for k, x in mlp_in.items()}, subject.features)
    acts = torch.stack([activations[f].double().sum(1) for f in subject.features], 1).numpy(force=True)
    if subject.answer is None:
        return acts, np.zeros(len(images))
    return acts, logits.double().softmax(-1)[:, subject.answer].numpy(force=True)
