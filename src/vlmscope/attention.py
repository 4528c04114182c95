"""Maps of where a vision tower looks: rollout, maps by soft token, deletion curves, and their files.

Attention rollout (Abnar and Zuidema 2020), as Yang et al. (arXiv 2602.20330) use it: of each layer the patterns of the
most focused heads (lowest entropy) are averaged to A; with the residual stream as `B = rownorm(A + I)` the rollout over
layers 1..n is `R = B_n ... B_1`, where R[i, j] is the part of token j's state before the first layer in token i's
after the last. Its rows are pooled to soft tokens. The paper's text has the last 4 layers and 30 % of the heads, its
code pools by the maximum over a soft token's patches. The paper's "similarity" variant uses no attention: it pools the
rows of the cosine similarity between the tower's last states.

Deletion and insertion (Petsiuk et al. 2018) judge a map by pictures with the cells that it ranks first painted over, or
alone, next to orders that know nothing of the model. A picture is cut into `side * side` cells whatever the grid of
patches, so that maps of all families and kinds are compared on the same pictures. Painted cells have the picture's mean
colour.

`maps.safetensors` holds maps as uint8 grids, at most 64 KB for the 256 soft tokens of a picture (docs/formats.md).
Legend: H heads, P tokens of a tile (class tokens, then patches row by row), S soft tokens, d_v width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmscope.activations import TileAttention, capture_vision_attention, mlp_inputs_and_logits
from vlmscope.attribution.config import AttributionConfig, WhereConfig
from vlmscope.attribution.vision import feature_path_maps, vision_path
from vlmscope.core.artifacts import built_from, load_tensors, save_tensors
from vlmscope.core.errors import UserError
from vlmscope.core.graph import (
    Grids,
    PictureMap,
    TileMap,
    TokenMaps,
    TokenTile,
    coarse_shape,
    decode_maps,
    encode_maps,
    resample,
)
from vlmscope.core.records import FeatureId, PatchBox, derive, generator
from vlmscope.interventions.edits import by_layer, donor_activations
from vlmscope.metrics.prediction import trapezoid
from vlmscope.models.base import ModelInputs
from vlmscope.models.boxes import PicturePatches, grid_boxes
from vlmscope.models.checkpoint import DTYPES
from vlmscope.models.loading import VLM
from vlmscope.replacement import ReplacementModel, build_replacement
from vlmscope.scope import Scope

FORMAT, VERSION = "vlmscope.maps", "1"
CELLS = 225  # most cells of a soft token's map, 15 x 15 for a square: 256 maps with their scales take 62 KB
_GRID = ("codes", "low", "step", "x", "y")
_FINE = 8  # pixels of a raster down and across a cell


def focused_heads(pattern: Tensor, share: float) -> Tensor:
    """The heads of lowest entropy of `pattern [H, P, P]` (rows sum to 1), most focused first, ties in head order.

    `share` of the heads, in (0, 1], are kept, at least one; halves are rounded to the even number.
    """
    entropy = torch.special.entr(pattern).sum(-1).mean(-1)  # in nats, averaged over queries
    return torch.argsort(entropy, stable=True)[: max(1, round(share * len(pattern)))]


def mixed_layer(pattern: Tensor, share: float, identity: bool = True) -> Tensor:
    """One layer's mixing of tokens, `[H, P, P]` -> `[P, P]`, rows summing to 1; `identity` adds the residual stream."""
    mean = pattern[focused_heads(pattern, share)].mean(0)
    if identity:
        mean = mean + torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    return mean / mean.sum(-1, keepdim=True)


def rollout(layers: Sequence[Tensor], start: Tensor | None = None) -> Tensor:
    """The product of the layers' mixings, first layer first: `[P, P]` each -> `[P, P]`.

    With `start`, its rows `[n, P]` go through the layers, last layer first, instead of every token's.
    """
    product = start
    for mixing in reversed(layers):
        product = mixing if product is None else product @ mixing
    assert product is not None, "a rollout of no layers"
    return product


def pool_rows(matrix: Tensor, pooling: Tensor, reduce: str) -> Tensor:
    """Pool the rows of a matrix over tokens to soft tokens by `pooling [S, P]`: `[P, P]` -> `[S, P]`.

    `reduce` is "mean" (weighted as the model pools) or "max" (over the tokens with any weight).
    """
    if reduce == "mean":
        return pooling @ matrix
    out = torch.zeros_like(pooling)
    for row, weights in enumerate(pooling):
        inside = torch.nonzero(weights)[:, 0]
        if len(inside):
            out[row] = matrix[inside].amax(0)
    return out


def soft_token_rollout(layers: Sequence[Tensor], pooling: Tensor, reduce: str) -> Tensor:
    """`pool_rows(rollout(layers), pooling, reduce)`, `[S, P]`; the mean carries S rows through the layers, not P."""
    if reduce == "mean":
        return rollout(layers, pooling)
    return pool_rows(rollout(layers), pooling, reduce)


def similarity(states: Tensor) -> Tensor:
    """Cosine similarity between tokens' states: `[P, d_v]` -> `[P, P]`, in -1..1."""
    unit = torch.nn.functional.normalize(states, dim=-1)
    return unit @ unit.T


def token_maps(vlm: VLM, inputs: ModelInputs, config: WhereConfig) -> dict[str, list[TokenMaps]]:
    """Rollout and similarity of every soft token, one record per picture each, from one forward of the tower.

    Of the attention only the last layers are kept, as one matrix `[P, P]` per tile and layer.
    """
    config.check()
    n_layers = len(vlm.adapter.vision_attention()) if vlm.adapter.has_vision else 0
    layers = range(max(n_layers - config.last_layers, 0), n_layers)
    reduce = partial(mixed_layer, share=config.head_share, identity=config.identity)
    captured = capture_vision_attention(vlm, inputs, layers, reduce)
    maps: dict[str, list[TokenMaps]] = {"rollout": [], "similarity": []}
    for kind, records in maps.items():
        for number, picture in enumerate(captured):
            whole = torch.from_numpy(picture.pooling.toarray())
            tiles, on_class, first = [], np.zeros(len(whole)), 0
            for tile in picture.tiles:
                pooling = whole[:, first : first + len(tile.tile)]
                first += len(tile.tile)
                rows = _rows(tile, pooling, kind, config.pool).double().numpy(force=True)
                tokens = torch.nonzero(pooling.any(1))[:, 0].numpy()
                n_class, shape = tile.tile.n_class, (tile.tile.rows, tile.tile.columns)
                on_class += rows[:, :n_class].sum(1)
                tiles.append(TokenTile(tile.tile.boxes, tokens, rows[tokens, n_class:].reshape(-1, *shape)))
            records.append(TokenMaps(kind, number, tiles, on_class))
    return maps


def _rows(tile: TileAttention, pooling: Tensor, kind: str, pool: str) -> Tensor:
    """The maps of soft tokens on one tile, `[S, P]`."""
    if kind == "rollout":
        layers = [tile.patterns[layer] for layer in sorted(tile.patterns)]
        return soft_token_rollout(layers, pooling.to(layers[0]), pool)
    return pool_rows(similarity(tile.states), pooling.to(tile.states), pool)


def own_map(activations: np.ndarray, patches: PicturePatches, picture: int, target: str) -> PictureMap:
    """A feature's activations `[S]` on a picture's soft tokens, divided among the patches of each.

    The map sums to the activations, except those of soft tokens without a patch.
    """
    shared = patches.pooling.T @ activations.astype(np.float64)
    tiles, on_class, first = [], 0.0, 0
    for tile in patches.tiles:
        part = shared[first : first + len(tile)]
        first += len(tile)
        on_class += float(part[: tile.n_class].sum())
        tiles.append(TileMap(tile.boxes, part[tile.n_class :].reshape(tile.rows, tile.columns)))
    empty = patches.pooling.sum(axis=1) == 0
    remainder = {"class_token": on_class, "no_patch": float(activations[empty].sum())}
    remainder = {name: value for name, value in remainder.items() if value}
    return PictureMap(target, picture, tiles, float(activations.sum()), remainder)


class Painted:
    """The pictures of one order of cells, from no changed cell to all.

    `counts[i]` cells are deleted, or alone inserted. Each picture is painted on demand, since together they take
    hundreds of times the picture's memory.
    """

    def __init__(self, image: np.ndarray, order: np.ndarray, side: int, counts: Sequence[int]) -> None:
        """Paint on `image [H, W, 3]` uint8, cells in `order`; the counts 0 and all are added."""
        self.counts = tuple(sorted({0, side * side, *(count for count in counts if count < side * side)}))
        self._image, self._order = image, order
        self._boxes = [box.pixels(image.shape[1], image.shape[0]) for box in grid_boxes(side, side)]
        self._empty = np.broadcast_to(image.mean((0, 1)).round().astype(np.uint8), image.shape)

    def deleted(self) -> Iterator[np.ndarray]:
        """The picture without the first `counts[i]` cells, uint8 `[H, W, 3]` each."""
        return self._over(self._image, self._empty)

    def inserted(self) -> Iterator[np.ndarray]:
        """The first `counts[i]` cells alone, uint8 `[H, W, 3]` each."""
        return self._over(self._empty, self._image)

    def _over(self, base: np.ndarray, source: np.ndarray) -> Iterator[np.ndarray]:
        for count in self.counts:
            out = base.copy()
            for cell in self._order[:count]:
                left, top, right, bottom = self._boxes[int(cell)]
                out[top:bottom, left:right] = source[top:bottom, left:right]
            yield out


def cell_values(picture_map: PictureMap, side: int) -> np.ndarray:
    """The share of a map in each cell of the picture, `[side, side]`."""
    fine = picture_map.raster(side * _FINE, side * _FINE)
    return fine.reshape(side, _FINE, side, _FINE).sum((1, 3))


def ranking(values: np.ndarray, seed: int) -> np.ndarray:
    """Cells by value, largest first; cells of equal value, up to rounding, in random order."""
    flat = np.asarray(values, float).ravel()
    scale = np.abs(flat).max(initial=0.0) or 1.0
    shuffled = generator(seed, "ties").permutation(flat.size)
    return shuffled[np.argsort(-np.round(flat[shuffled] / scale, 9), kind="stable")]


class Maps(NamedTuple):
    """The maps of one file, of targets and of soft tokens."""

    targets: list[PictureMap]
    tokens: list[TokenMaps]


def save_maps(path: str | Path, targets: Sequence[PictureMap] = (), tokens: Sequence[TokenMaps] = ()) -> int:
    """Write maps of targets, on the grid of patches, and of soft tokens, atomically; returns the size in bytes.

    A soft token's map has at most `CELLS` cells: a finer grid of patches is resampled to a coarser one with equal sum.
    """
    arrays: dict[str, np.ndarray] = {}
    records: dict[str, list[dict[str, Any]]] = {"targets": [], "tokens": []}
    for number, target in enumerate(targets):
        record = {name: getattr(target, name) for name in ("target", "picture", "edge", "remainder")}
        records["targets"].append({**record, "tiles": len(target.tiles)})
        for part, tile in enumerate(target.tiles):
            arrays |= _arrays(f"map.{number}.{part}", tile.boxes, tile.values[None], tile.values.size)
    for number, maps in enumerate(tokens):
        records["tokens"].append({"kind": maps.kind, "picture": maps.picture, "tiles": len(maps.tiles)})
        arrays[f"token.{number}.class"] = maps.class_token.astype(np.float32)
        for part, tile in enumerate(maps.tiles):
            name = f"token.{number}.{part}"
            arrays |= _arrays(name, tile.boxes, tile.values, CELLS)
            arrays[f"{name}.tokens"] = tile.tokens.astype(np.int32)
    save_tensors(path, arrays, {"format": FORMAT, "version": VERSION, "maps": json.dumps(records)})
    return Path(path).stat().st_size


def load_maps(path: str | Path) -> Maps:
    """Read what `save_maps` wrote; values are good to half a step of their grid (`vlmscope.core.graph`)."""
    arrays, metadata = load_tensors(path)
    if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{path} holds no maps of this layout; write it again with task=where")
    with built_from(path, "file of maps", "write it again with task=where"):
        records = json.loads(metadata["maps"])
        targets, tokens = [], []
        for number, record in enumerate(records["targets"]):
            parts = [_tile(arrays, f"map.{number}.{part}") for part in range(record["tiles"])]
            tiles = [TileMap(boxes, values[0]) for boxes, values in parts]
            targets.append(PictureMap(record["target"], record["picture"], tiles, record["edge"], record["remainder"]))
        for number, record in enumerate(records["tokens"]):
            tiles = []
            for name in (f"token.{number}.{part}" for part in range(record["tiles"])):
                boxes, values = _tile(arrays, name)
                tiles.append(TokenTile(boxes, arrays[f"{name}.tokens"].astype(np.int64), values))
            on_class = arrays[f"token.{number}.class"].astype(np.float64)
            tokens.append(TokenMaps(record["kind"], record["picture"], tiles, on_class))
        return Maps(targets, tokens)


def _arrays(name: str, boxes: Sequence[PatchBox], values: np.ndarray, most: int) -> dict[str, np.ndarray]:
    """Encoded grids of at most `most` cells, and the edges of their cells."""
    rows, columns = values.shape[1:]
    shape = coarse_shape(rows, columns, most)
    grids = encode_maps(values if shape == (rows, columns) else resample(values, *shape))

    def thinned(edges: list[float], cells: int) -> np.ndarray:
        return np.interp(np.linspace(0, len(edges) - 1, cells + 1), np.arange(len(edges)), edges).astype(np.float32)

    x = thinned([box.left for box in boxes[:columns]] + [boxes[columns - 1].right], shape[1])
    y = thinned([box.top for box in boxes[::columns]] + [boxes[-1].bottom], shape[0])
    parts = zip(_GRID, (grids.codes, grids.low, grids.step, x, y), strict=True)
    return {f"{name}.{part}": array for part, array in parts}


def _tile(arrays: dict[str, np.ndarray], name: str) -> tuple[list[PatchBox], np.ndarray]:
    codes, low, step, x, y = (arrays[f"{name}.{part}"] for part in _GRID)
    across, down = x.astype(float).tolist(), y.astype(float).tolist()
    boxes = [
        PatchBox(across[column], down[row], across[column + 1], down[row + 1])
        for row in range(codes.shape[1])
        for column in range(codes.shape[2])
    ]
    return boxes, decode_maps(Grids(codes, low, step))


KINDS = ("rollout", "similarity", "vision_path", "activation")
MEASURES = ("deletion", "insertion")
RANDOM, CONTRAST, NO_FEATURE = "random", "contrast", "rollout_no_feature"
_CHUNK = 64  # pictures per forward


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
    """Maps of features on one prompt; each feature must be active on a soft token, else a `UserError` says so."""
    tokens = token_maps(scope.vlm, inputs, where)
    replacement = build_replacement(scope, inputs, DTYPES.get(attribution.dtype))
    activations = {feature: _activations(replacement, feature) for feature in features}
    path = vision_path(scope.vlm, inputs, attribution.patch_rule)
    path_maps = feature_path_maps(replacement, path, features, attribution.patch_effect, attribution.patch_baseline)
    maps: dict[FeatureId, dict[str, list[PictureMap]]] = {}
    for feature, values in activations.items():
        name, on_pictures = str(feature), [values[inputs.image_index == n] for n in range(len(inputs.sizes))]
        maps[feature] = {
            kind: [record.weighted(part, name) for record, part in zip(records, on_pictures, strict=True)]
            for kind, records in tokens.items()
        }
        maps[feature]["vision_path"] = path_maps[feature]
        maps[feature]["activation"] = [
            own_map(part, patches, number, name)
            for number, (part, patches) in enumerate(zip(on_pictures, path.pictures, strict=True))
        ]
    return WhereMaps(activations, maps, tokens)


def _activations(replacement: ReplacementModel, feature: FeatureId) -> np.ndarray:
    """A feature's activations at all positions, `[T]`; raises unless it is active on a soft token."""
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
    """The measured quantities: features' activations on a picture's soft tokens, and an answer's probability.

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

    `runs["activation", measure, feature]` is the feature's sum over the soft tokens, relative to the untouched picture;
    `runs["answer", measure, feature]` is the answer's probability under the same orders.
    """

    counts: tuple[int, ...]
    runs: dict[tuple[str, str, FeatureId], list[np.ndarray]] = field(default_factory=dict)

    def curve(self, feature: FeatureId, measure: str, what: str = "activation") -> np.ndarray:
        """`[n]`, the mean over runs."""
        return np.mean(self.runs[what, measure, feature], axis=0)

    def area(self, feature: FeatureId, measure: str, what: str = "activation") -> float:
        """The mean height of that curve."""
        return float(trapezoid(np.array(self.counts), self.curve(feature, measure, what))) / self.counts[-1]


def contrast(image: np.ndarray, side: int) -> np.ndarray:
    """Mean squared distance of each cell's pixels from the picture's mean colour, `[side, side]`; uses no model."""
    squared = ((image.astype(float) - image.mean((0, 1))) ** 2).sum(-1)
    distances = []
    for box in grid_boxes(side, side):
        left, top, right, bottom = box.pixels(image.shape[1], image.shape[0])
        distances.append(squared[top:bottom, left:right].mean())
    return np.reshape(distances, (side, side))


def map_curves(
    subject: Subject,
    maps: Mapping[FeatureId, Mapping[str, PictureMap]],
    where: WhereConfig,
    seed: int,
    shared: Mapping[str, np.ndarray] | None = None,
) -> dict[str, MapCurves]:
    """Curves by kind of map, and of random orders (`RANDOM`).

    `maps` is feature -> kind -> map, whose order is measured on that feature; `shared` is kind -> values of cells
    `[side, side]`, whose order is measured on all features; `seed` is that of random orders and of ties.
    """
    side, seed = where.side, derive(seed, "curves", subject.prompt, int(subject.image.sum(dtype=np.int64)))
    orders: list[tuple[str, tuple[FeatureId, ...], np.ndarray]] = []
    for feature, kinds in maps.items():
        orders += [(kind, (feature,), ranking(cell_values(picture, side), seed)) for kind, picture in kinds.items()]
    orders += [(kind, subject.features, ranking(values, seed)) for kind, values in (shared or {}).items()]
    for draw in range(where.draws):
        order = generator(seed, "random", draw).permutation(side * side)
        orders.append((RANDOM, subject.features, order))
    painted = [Painted(subject.image, order, side, where.counts) for _, _, order in orders]
    counts = painted[0].counts
    n = len(counts)
    # The untouched and the empty picture, which both measures share, run once per order.
    flat = chain.from_iterable(chain(order.deleted(), islice(order.inserted(), 1, n - 1)) for order in painted)
    parts = [_measured(subject, images) for images in iter(lambda: list(islice(flat, _CHUNK)), [])]
    acts, answers = map(np.concatenate, zip(*parts, strict=True))
    whole = acts[0]  # nothing deleted yet
    by_kind: dict[str, MapCurves] = {}
    for number, (kind, features, _) in enumerate(orders):
        first = number * (2 * n - 2)
        deleted = np.arange(first, first + n)
        inserted = np.array([deleted[-1], *range(first + n, first + 2 * n - 2), deleted[0]])
        curves = by_kind.setdefault(kind, MapCurves(counts))
        for measure, rows in zip(MEASURES, (deleted, inserted), strict=True):
            for feature in features:
                column = subject.features.index(feature)
                relative = acts[rows, column] / whole[column]
                curves.runs.setdefault(("activation", measure, feature), []).append(relative)
                curves.runs.setdefault(("answer", measure, feature), []).append(answers[rows])
    return by_kind


def _measured(subject: Subject, images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Sums of activations on soft tokens `[n, features]`, and probabilities of the answer `[n]` (0 without one)."""
    scope, layers = subject.scope, sorted({feature.layer for feature in subject.features})
    batch = scope.batch([scope.vlm.prepare(subject.prompt, [Image.fromarray(image)]) for image in images])
    soft = torch.from_numpy(batch.is_image)
    mlp_in, logits = mlp_inputs_and_logits(scope.adapter, batch, layers)
    codes = {layer: scope.transcoders[layer].encode(x[:, soft]) for layer, x in mlp_in.items()}
    active = donor_activations(scope, codes, by_layer(scope.transcoders, subject.features))
    sums: dict[tuple[int, int], Tensor] = {}
    for layer, (features, values) in active.items():
        sums |= {(layer, i): column for i, column in zip(features.tolist(), values.double().sum(1).T, strict=True)}
    acts = torch.stack([sums[feature] for feature in subject.features], 1).numpy(force=True)
    if subject.answer is None:
        return acts, np.zeros(len(images))
    return acts, logits.double().softmax(-1)[:, subject.answer].numpy(force=True)
