"""Deletion and insertion curves of features' maps on one picture, beside orders that know nothing of the feature."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from vlmscope.core.records import derive, generator

if TYPE_CHECKING:
    from vlmscope.attention.config import WhereConfig
    from vlmscope.attention.rollout import Painted
    from vlmscope.core.maps import PictureMap
    from vlmscope.core.records import FeatureId
    from vlmscope.scope import Scope

MEASURES = ("deletion", "insertion")
RANDOM, CONTRAST, NO_FEATURE = "random", "contrast", "rollout_no_feature"
_CHUNK = 64  # pictures a forward


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
    """The curves of one kind of map, each a list of runs `[n]` (one, or one a random draw) at `counts` cells.

    `activation[measure][feature]` is the feature's sum over the soft tokens, of that on the untouched picture;
    `answer[measure][feature]` the answer's probability under the same orders.
    """

    counts: tuple[int, ...]
    activation: dict[str, dict[FeatureId, list[np.ndarray]]] = field(default_factory=lambda: {m: {} for m in MEASURES})
    answer: dict[str, dict[FeatureId, list[np.ndarray]]] = field(default_factory=lambda: {m: {} for m in MEASURES})

    def curve(self, feature: FeatureId, measure: str, of_answer: bool = False) -> np.ndarray:
        """`[n]`, the mean over runs."""
        return np.mean((self.answer if of_answer else self.activation)[measure][feature], axis=0)

    def area(self, feature: FeatureId, measure: str, of_answer: bool = False) -> float:
        """The mean height of that curve."""
        from vlmscope.metrics.prediction import area_under

        return float(area_under(np.array(self.counts), self.curve(feature, measure, of_answer)))


def contrast(image: np.ndarray, side: int) -> np.ndarray:
    """`[side, side]`: how far the pixels of a cell are from the picture's mean colour, which takes no model."""
    from vlmscope.models.boxes import grid_boxes

    far = ((image.astype(float) - image.mean((0, 1))) ** 2).sum(-1)
    found = []
    for box in grid_boxes(side, side):
        left, top, right, bottom = box.pixels(image.shape[1], image.shape[0])
        found.append(far[top:bottom, left:right].mean())
    return np.reshape(found, (side, side))


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
    from vlmscope.attention.rollout import Painted, cell_values, ranking

    side, seed = where.side, derive(seed, "curves", subject.prompt, int(subject.image.sum(dtype=np.int64)))
    orders: list[tuple[str, tuple[FeatureId, ...], np.ndarray]] = []
    for feature, kinds in maps.items():
        orders += [(kind, (feature,), ranking(cell_values(one, side), seed)) for kind, one in kinds.items()]
    orders += [(kind, subject.features, ranking(values, seed)) for kind, values in (shared or {}).items()]
    for draw in range(where.draws):
        order = generator(seed, "random", draw).permutation(side * side)
        orders.append((RANDOM, subject.features, order))
    pictures = [Painted(subject.image, order, side, where.counts) for _, _, order in orders]
    acts, answers = _measured(subject, _flat(pictures))
    found: dict[str, MapCurves] = {}
    whole = acts[0]  # nothing deleted yet
    for number, (kind, features, _) in enumerate(orders):
        n = len(pictures[number].counts)
        first = number * (2 * n - 2)
        deleted = np.arange(first, first + n)
        inserted = np.array([deleted[-1], *range(first + n, first + 2 * n - 2), deleted[0]])
        curves = found.setdefault(kind, MapCurves(pictures[number].counts))
        for measure, rows in zip(MEASURES, (deleted, inserted), strict=True):
            for feature in features:
                column = subject.features.index(feature)
                relative = acts[rows, column] / whole[column]
                curves.activation[measure].setdefault(feature, []).append(relative)
                curves.answer[measure].setdefault(feature, []).append(answers[rows])
    return found


def _flat(pictures: Sequence[Painted]) -> Iterator[np.ndarray]:
    """All pictures in a row; what both measures share, the untouched and the empty one, once an order."""
    for one in pictures:
        yield from one.deleted()
        yield from islice(one.inserted(), 1, len(one.counts) - 1)


def _measured(subject: Subject, images: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """`[n, features]` sums of activations on soft tokens, and `[n]` probabilities of the answer (0 without one)."""
    import torch
    from PIL import Image

    from vlmscope.activations.capture import mlp_inputs_and_logits
    from vlmscope.features.readouts import activations_at

    scope, layers = subject.scope, sorted({feature.layer for feature in subject.features})
    acts, answers = [], []
    waiting = iter(images)
    while inputs := [scope.vlm.prepare(subject.prompt, [Image.fromarray(image)]) for image in islice(waiting, _CHUNK)]:
        batch = scope.batch(inputs)
        soft = torch.from_numpy(batch.is_image)
        mlp_in, logits = mlp_inputs_and_logits(scope.adapter, batch, layers)
        found = activations_at(scope.transcoders, {k: x[:, soft] for k, x in mlp_in.items()}, subject.features)
        acts.append(torch.stack([found[f].double().sum(1) for f in subject.features], 1).numpy(force=True))
        probabilities = logits.double().softmax(-1)
        answers.append(
            np.zeros(len(inputs)) if subject.answer is None else probabilities[:, subject.answer].numpy(force=True)
        )
    return np.concatenate(acts), np.concatenate(answers)
