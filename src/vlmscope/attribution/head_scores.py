"""Why a head looks where it looks: its score before the softmax, taken apart into what is at query and key.

With patterns and norm scales frozen, the query `q = sum_i q_i` and the key `k = sum_j k_j` are sums over sources (and
constants, which belong to bias nodes), so the score `s = c q . k` is
    sum_ij c q_i . k_j          bilinear, over pairs of sources
    sum_i  c q_i . k            the query's side: affine in its sources, the key as it is
    sum_j  c q . k_j            the key's side.
All three sum to the model's own score (docs/maths.md). The cap of a family that caps its scores comes after s.
Legend: D head width, W columns below the layer and its bias.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vlmscope.activations.capture import HasAdapter
from vlmscope.activations.scores import HeadScore, HeadSide, head_score
from vlmscope.attribution.adjoint import Adjoint
from vlmscope.attribution.config import parse_head
from vlmscope.attribution.targets import Targets, one_target, place, shown_place
from vlmscope.core.errors import UserError
from vlmscope.core.graph import NodeKind
from vlmscope.replacement.model import ReplacementModel

_BLOCK = 1024  # rows of the matrix of pairs at once


@dataclass(frozen=True)
class Place:
    """A head and where it looks from and to."""

    layer: int
    head: int
    query: int
    key: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head} {self.query} -> {self.key}"


@dataclass(frozen=True)
class ScoreParts:
    """A score with its sources.

    Attributes:
        place: which score.
        score: of the model itself, before cap and softmax.
        probability: the head's pattern there.
        scale: c.
        query: `[D, W]`, what each source gives the query.
        key: `[D, W]`, what each source gives the key.
        targets: the query's side and the key's side as the two ends of a graph, worth a half each.
    """

    place: Place
    score: float
    probability: float
    scale: float
    query: Tensor
    key: Tensor
    targets: Targets

    def pairs(self) -> Iterator[tuple[int, Tensor]]:
        """The matrix of pairs, rows query columns, in blocks `[n, W]` with the number of their first row."""
        for first in range(0, self.query.shape[1], _BLOCK):
            yield first, self.scale * self.query[:, first : first + _BLOCK].T @ self.key


def find_place(replacement: ReplacementModel, text: str) -> Place:
    """The head, query and key of `L5H2@last:max`.

    Raises:
        UserError: the model has no such head or position, or its mask keeps the query from seeing the key.
    """
    layer, head, query_text, key_text = parse_head(text)
    patterns, tokens = replacement.state.patterns, replacement.inputs.tokens
    n_layers, n_heads = patterns.shape[:2]
    if layer >= n_layers or head >= n_heads:
        raise UserError(
            f"attribution.attention={text}: the model has layers 0 to {n_layers - 1} with heads 0 to {n_heads - 1}"
        )
    query = place(query_text, len(tokens), "attribution.attention")
    looks = patterns[layer, head, query]
    key = int(looks.argmax()) if key_text == "max" else place(key_text, len(tokens), "attribution.attention")
    if looks[key] == 0:
        raise UserError(
            f"attribution.attention={text}: position {query} cannot see {key} in layer {layer}; choose another key, "
            f"such as {int(looks.argmax())}, which it looks at most"
        )
    return Place(layer, head, query, key)


@torch.no_grad()
def score_parts(model: HasAdapter, replacement: ReplacementModel, adjoint: Adjoint, where: Place) -> ScoreParts:
    """Take a score apart, with one row of edges for each number of query and key.

    Args:
        model: the model that the replacement model was made of.
        replacement: the frozen model.
        adjoint: its rows.
        where: which score.
    """
    dtype = replacement.errors.dtype
    found = head_score(model, replacement.inputs, where.layer, where.head, where.query, where.key, dtype)
    scale = replacement.layers[where.layer].attn_in_scale

    def rows(side: HeadSide, position: int) -> Tensor:
        at = torch.full((len(side.weight),), position, device=scale.device)
        return adjoint.stream_rows(where.layer, side.weight * scale[position], at, side.constant)

    return ScoreParts(
        place=where,
        score=found.value,
        probability=float(replacement.state.patterns[where.layer, where.head, where.query, where.key]),
        scale=found.scale,
        query=rows(found.query, where.query),
        key=rows(found.key, where.key),
        targets=_sides(replacement, found, where),
    )


def _sides(replacement: ReplacementModel, found: HeadScore, where: Place) -> Targets:
    scale = replacement.layers[where.layer].attn_in_scale
    both = [
        one_target(
            "attention",
            f"L{where.layer}H{where.head} {name} {shown_place(replacement.inputs, at)}",
            found.query.value.new_tensor([found.value]),
            layer=where.layer,
            position=at,
            vectors=(found.scale * (other.value @ mine.weight) * scale[at])[None],
            constants=(found.scale * (other.value @ mine.constant))[None],
        )
        for name, mine, other, at in (
            ("query", found.query, found.key, where.query),
            ("key", found.key, found.query, where.key),
        )
    ]
    return join(both)


def join(targets: list[Targets]) -> Targets:
    """Ends of one kind and layer as one set, all worth the same."""
    first = targets[0]

    def arrays(name: str) -> np.ndarray:
        return np.concatenate([getattr(one, name) for one in targets])

    def tensors(name: str) -> Tensor:
        return torch.cat([getattr(one, name) for one in targets])

    count = sum(len(one) for one in targets)
    return replace(
        first,
        **{name: arrays(name) for name in ("positions", "token_ids", "probabilities")},
        **{name: tensors(name) for name in ("vectors", "constants", "values")},
        weights=np.full(count, 1.0 / count),
        labels=tuple(label for one in targets for label in one.labels),
    )


@dataclass(frozen=True)
class Pairs:
    """The pairs of sources that give a score most, by |term|, strongest first.

    Attributes:
        query: `[n]` int64, columns of the sources at the query.
        key: `[n]` int64, columns of the sources at the key.
        terms: `[n]` float64, `c q_i . k_j`.
        total: the sum over all pairs, which is the score.
        absolute: the sum of |term| over all pairs.
    """

    query: np.ndarray
    key: np.ndarray
    terms: np.ndarray
    total: float
    absolute: float


@torch.no_grad()
def top_pairs(parts: ScoreParts, count: int, only: np.ndarray | None = None) -> Pairs:
    """The strongest pairs of sources.

    Args:
        parts: the score.
        count: at most so many pairs.
        only: `[W]` bool, sources that may be listed, such as features; totals are of all.
    """
    allowed = None if only is None else torch.from_numpy(only).to(parts.query.device)
    best: list[tuple[Tensor, Tensor]] = []
    total, absolute, width = 0.0, 0.0, parts.key.shape[1]
    for first, block in parts.pairs():
        total += float(block.sum(dtype=torch.float64))
        absolute += float(block.abs().sum(dtype=torch.float64))
        if allowed is not None:
            block = block * allowed[first : first + len(block), None] * allowed
        flat = block.flatten()
        chosen = flat.abs().topk(min(count, len(flat))).indices
        best.append((flat[chosen], chosen + first * width))
    terms, where = (torch.cat(each) for each in zip(*best, strict=True))
    order = terms.abs().argsort(descending=True, stable=True)[:count]
    order = order[terms[order] != 0]
    place_of = where[order].cpu().numpy()
    return Pairs(place_of // width, place_of % width, terms[order].double().cpu().numpy(), total, absolute)


def source_of(replacement: ReplacementModel, adjoint: Adjoint, column: int) -> tuple[NodeKind, int, int, int]:
    """Kind, layer, position and index (token id or feature, -1 for none) of the source that owns a column."""
    columns = adjoint.columns
    if column < columns.n_positions:
        return NodeKind.TOKEN, -1, column, replacement.inputs.input_ids[column]
    layer = int(np.searchsorted(columns.start, column, side="right")) - 1
    if column == columns.bias(layer):
        return NodeKind.BIAS, layer, -1, -1
    if column >= columns.errors(layer):
        return NodeKind.ERROR, layer, column - columns.errors(layer), -1
    found, number = replacement.features[layer], column - columns.features(layer)
    return NodeKind.FEATURE, layer, int(found.position[number]), int(found.index[number])
