"""Attention in graphs: an edge by heads, a graph's flow by heads, and a head's score by sources.

An edge is a sum over the paths from its source to its target through the frozen model. A path goes from position to
position only through heads, so every path has a first head (nearest to its source) and a last one (nearest to its
target), or no head: it then stays at its position, in the residual stream and the transcoders' skip paths. Grouped by
either, the shares of all heads and the direct share sum to the edge.
    first head h of layer l:  G . (s2 (P_h (sv (s1 u W_v))) W_o),  u the source carried up to l without heads, G the
                              target's gradient above that attention
    last head h of layer l:   the edge from the source to the read-out of h's output by g, g the target's gradient
                              carried down to l without heads

A head's score before the softmax says why it looks where it looks. With patterns and norm scales frozen, the query
`q = sum_i q_i` and the key `k = sum_j k_j` are sums over sources (and constants, which belong to bias nodes), so the
score `s = c q . k` is
    sum_ij c q_i . k_j          bilinear, over pairs of sources
    sum_i  c q_i . k            the query's side: affine in its sources, the key as it is
    sum_j  c q . k_j            the key's side.
All three sum to the model's own score (docs/maths.md). The cap of a family that caps its scores comes after s.
Legend: L layers, H heads, Hkv key/value heads, D head width, T positions, d width, B targets, S carried positions,
W columns below the layer and its bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlmscope.activations import HasAdapter, HeadSide, head_score
from vlmscope.attribution.adjoint import Adjoint, Sweep
from vlmscope.attribution.config import parse_head
from vlmscope.attribution.influence import influence, logit_weights
from vlmscope.attribution.targets import Targets, other_targets, parse_position, shown_position
from vlmscope.core.errors import UserError
from vlmscope.core.graph import ENDS, AttributionGraph, NodeKind
from vlmscope.replacement import ReplacementModel


class HeadLoadings(NamedTuple):
    """An edge by the first and the last head on the path, `[L, H]` float64 each, and `direct`, without any head."""

    edge: float
    direct: float
    first: np.ndarray
    last: np.ndarray


class _Read(NamedTuple):
    """One target: `vector [d]` at a position of the stream before, or after, the attention of a layer."""

    layer: int
    position: int
    vector: Tensor
    after_attention: bool


_Gradients = dict[int, tuple[Tensor, Tensor]]  # layer -> gradient above its attention `[S, B, d]` at positions `[S]`


class _RecordingAdjoint(Adjoint):
    """An adjoint that keeps the gradient above every attention of a sweep."""

    def gradients(self, layer: int, vectors: Tensor, position: Tensor, after_attention: bool) -> _Gradients:
        """The gradients of one sweep, of read-outs as in `stream_rows`."""
        self._gradients: _Gradients = {}
        self.stream_rows(layer, vectors, position, after_attention=after_attention)
        return self._gradients

    def _attention(self, layer: int, sweep: Sweep) -> None:
        self._gradients[layer] = (sweep.gradient, sweep.positions)
        super()._attention(layer, sweep)


class HeadSplitter:
    """Splits edges of one graph; the rows by last heads of a target are kept for its other edges."""

    def __init__(self, replacement: ReplacementModel, graph: AttributionGraph, targets: Targets) -> None:
        self.replacement, self.graph, self.targets = replacement, graph, targets
        self._adjoint = Adjoint(replacement)
        self._recording = _RecordingAdjoint(replacement, self._adjoint.sources)
        self._by_target: dict[int, tuple[_Gradients, Tensor, Tensor]] = {}

    @torch.no_grad()
    def split(self, source: int, target: int) -> HeadLoadings:
        """The heads of the edge from a token, feature or error to a feature or an end, by their node numbers."""
        kinds = self.graph.nodes.kind
        assert kinds[source] in (NodeKind.TOKEN, NodeKind.FEATURE, NodeKind.ERROR), "the source has no position"
        assert kinds[target] in (NodeKind.FEATURE, *ENDS), "the target has no edges into it"
        read, column = self.read(target), self._column(source)
        if target not in self._by_target:
            position = torch.tensor([read.position], device=read.vector.device)
            gradients = self._recording.gradients(read.layer, read.vector[None], position, read.after_attention)
            self._by_target[target] = (gradients, *self._last(read))
        gradients, last, direct_row = self._by_target[target]
        first, direct = self._first(int(self.graph.nodes.position[source]), column, read, gradients)
        # The two groupings share only the direct part, which each computes by itself.
        assert abs(float(direct_row[column]) - direct) <= 1e-4 * (1e-6 + abs(direct) + float(first.abs().sum()))
        sources, weights = self.graph.incoming(target)
        edge = float(weights[sources == source].sum())
        return HeadLoadings(edge, direct, first.double().cpu().numpy(), last[:, :, column].double().cpu().numpy())

    def read(self, target: int) -> _Read:
        """How a feature or an end reads the stream."""
        nodes, replacement = self.graph.nodes, self.replacement
        if nodes.kind[target] in ENDS:
            number = target - int(nodes.ends()[0])
            position, vector = int(self.targets.positions[number]), self.targets.vectors[number]
            return _Read(self.targets.layer, position, vector, self.targets.after_attention)
        layer, position, index = (int(getattr(nodes, name)[target]) for name in ("layer", "position", "index"))
        scale = replacement.layers[layer].mlp_in_scale[position]
        return _Read(layer, position, replacement.features[layer].w_enc[index] * scale, True)

    def _column(self, source: int) -> int:
        nodes, columns = self.graph.nodes, self._adjoint.columns
        layer, position = int(nodes.layer[source]), int(nodes.position[source])
        if nodes.kind[source] == NodeKind.TOKEN:
            return position
        if nodes.kind[source] == NodeKind.ERROR:
            return columns.errors(layer) + position
        row = self.replacement.feature_activations.row(layer, position, int(nodes.index[source]))
        return int(columns.all_features()[row])

    def _first(self, position: int, column: int, read: _Read, gradients: _Gradients) -> tuple[Tensor, float]:
        """Shares `[L, H]` by first head of the source at a position and column, and the direct share."""
        replacement, token = self.replacement, column == position
        x = replacement.state.embeddings[position] if token else torch.zeros_like(read.vector)
        shares = read.vector.new_zeros(replacement.n_layers, replacement.state.patterns.shape[1])
        for layer in range(read.layer + int(read.after_attention)):
            frozen, (gradient, positions) = replacement.layers[layer], gradients[layer]
            values = ((frozen.attn_in_scale[position] * x) @ frozen.value_weight.T).view(frozen.n_kv_heads, -1)
            if frozen.value_scale is not None:
                values = values * frozen.value_scale[position].view_as(values)
            z = (frozen.attn_out_scale[positions] * gradient[:, 0]) @ frozen.output_weight  # [S, H * D]
            z = z.view(len(positions), len(shares[layer]), -1)
            values = values.repeat_interleave(z.shape[1] // frozen.n_kv_heads, dim=0)
            pattern = frozen.pattern[:, positions, position]  # [H, S]
            shares[layer] = torch.einsum("shd,hd,hs->h", z, values, pattern)
            if layer == read.layer:
                break
            sources, skip = self._adjoint.sources.of(layer), replacement.features[layer].w_skip
            # What the source writes here, if anything.
            out = x + sources.vectors[position, :-1][sources.columns[position] == column].sum(0)
            if skip is not None:
                out = out + frozen.write_scale[position] * (skip @ (frozen.mlp_in_scale[position] * x))
            x = out * frozen.stream_scale
            if token and frozen.injection is not None:
                x = x + frozen.injection[position]
        return shares, float(read.vector @ x) if read.position == position else 0.0

    def _last(self, read: _Read) -> tuple[Tensor, Tensor]:
        """Rows `[L, H, columns]` by last head, and the direct row `[columns]`."""
        replacement, adjoint = self.replacement, self._adjoint
        width, n_heads = adjoint.columns.total, replacement.state.patterns.shape[1]
        rows = read.vector.new_zeros(replacement.n_layers, n_heads, width)
        position = torch.tensor([read.position], device=read.vector.device)
        sweep = Sweep(read.vector[None, None].clone(), position, read.vector.new_zeros(1, width + 1))
        every = torch.arange(replacement.n_positions, device=position.device)
        for layer in range(read.layer - 1 + int(read.after_attention), -1, -1):
            if layer < read.layer:
                adjoint._leaving(layer, sweep)
                adjoint._mlp(layer, sweep)
            gradient = self._through_heads(layer, read.position, sweep.gradient[0, 0])
            branch = Sweep(gradient, every, gradient.new_zeros(n_heads, width + 1))
            adjoint._descend(layer, branch)
            rows[layer] = branch.out[:, :width]
        adjoint._read_tokens(replacement.state.embeddings, sweep)
        return rows, sweep.out[0, :width]

    def _through_heads(self, layer: int, position: int, gradient: Tensor) -> Tensor:
        """Take `gradient [d]` above a layer's attention at a position back through each head alone: `[T, H, d]`."""
        frozen = self.replacement.layers[layer]
        n_heads = len(frozen.pattern)
        z = ((frozen.attn_out_scale[position] * gradient) @ frozen.output_weight).view(n_heads, -1)
        weight = frozen.value_weight.view(frozen.n_kv_heads, z.shape[1], -1)
        groups = n_heads // frozen.n_kv_heads
        by_key = frozen.pattern[:, position, :, None] * z[:, None]  # [H, T, D]
        if frozen.value_scale is not None:
            scales = frozen.value_scale.view(-1, frozen.n_kv_heads, z.shape[1]).transpose(0, 1)
            by_key = by_key * scales.repeat_interleave(groups, dim=0)
        back = torch.bmm(by_key, weight.repeat_interleave(groups, dim=0))  # [H, T, d]
        return frozen.attn_in_scale[:, None] * back.transpose(0, 1)


@dataclass(frozen=True)
class HeadFlow:
    """How much of a graph's flow each head carries, `flow [L, H]` float64, summed over queries and keys.

    Most of it goes to position `query` from position `key`, `[L, H]`; `covered` is the share of the rows' worth that
    was counted.
    """

    flow: np.ndarray
    query: np.ndarray
    key: np.ndarray
    covered: float

    def ranked(self) -> list[tuple[int, int]]:
        """(layer, head), the one with the largest flow first."""
        order = np.argsort(-self.flow, axis=None, kind="stable")
        return [divmod(number, self.flow.shape[1]) for number in order.tolist()]


@torch.no_grad()
def head_flow(
    replacement: ReplacementModel, graph: AttributionGraph, targets: Targets, max_rows: int = 256, batch: int = 8
) -> HeadFlow:
    """The flow through each head of the ends of a graph and of its `max_rows` most influential features.

    A row i hands (I_i + w_i) / sum |edges| down for each unit of |edge|. Of a target's value, head h carries
    `P_h[q, k] (G_q s2 W_o) . v_k` from key k to query q, biases of values included; its size times that factor, summed
    over the rows, is the flow. `batch` targets are swept at once.
    """
    weights = logit_weights(graph)
    flow = influence(graph, weights)
    worth, features = flow.nodes + weights, graph.nodes.of(NodeKind.FEATURE)
    chosen = np.sort(features[np.argsort(-flow.nodes[features], kind="stable")[:max_rows]])
    n_layers, n_heads, n_positions, _ = replacement.state.patterns.shape
    total = replacement.errors.new_zeros(n_layers, n_heads, n_positions, n_positions, dtype=torch.float64)
    adjoint, splitter = _RecordingAdjoint(replacement), HeadSplitter(replacement, graph, targets)
    values = _values(replacement)
    rows = np.concatenate([chosen, graph.nodes.ends()])
    reads = [splitter.read(int(node)) for node in rows]
    for layer, after in sorted({(read.layer, read.after_attention) for read in reads}):
        mine = [row for row, read in enumerate(reads) if (read.layer, read.after_attention) == (layer, after)]
        for begin in range(0, len(mine), batch):
            chunk = mine[begin : begin + batch]
            vectors = torch.stack([reads[row].vector for row in chunk])
            position = torch.tensor([reads[row].position for row in chunk], device=vectors.device)
            factor = torch.from_numpy(flow.per_edge[rows[chunk]]).to(total.device)
            for lower, (gradient, positions) in adjoint.gradients(layer, vectors, position, after).items():
                frozen = replacement.layers[lower]
                z = (frozen.attn_out_scale[positions, None] * gradient) @ frozen.output_weight  # [S, B, H * D]
                z = z.view(*z.shape[:2], n_heads, -1).permute(2, 1, 0, 3)  # [H, B, S, D]
                terms = torch.einsum("hbsd,htd,hst->hbst", z, values[lower], frozen.pattern[:, positions])
                total[lower, :, positions] += (terms.abs().double() * factor[None, :, None, None]).sum(1)
    flat = total.flatten(2)
    best = flat.argmax(-1).cpu().numpy()
    has_row = np.isin(graph.nodes.kind, (NodeKind.FEATURE, *ENDS))
    covered = float(worth[rows].sum() / worth[has_row].sum())
    return HeadFlow(flat.sum(-1).cpu().numpy(), best // n_positions, best % n_positions, covered)


def _values(replacement: ReplacementModel) -> list[Tensor]:
    """The values of each query head per layer, `[H, T, D]`."""
    x, state, out = replacement.state.embeddings, replacement.state, []
    for layer, frozen in enumerate(replacement.layers):
        values = frozen.values(x, with_bias=True)
        per_head = values.view(len(x), frozen.n_kv_heads, -1).transpose(0, 1)
        out.append(per_head.repeat_interleave(len(frozen.pattern) // frozen.n_kv_heads, dim=0))
        h = x + frozen.attend(x, with_bias=True)
        x = frozen.leave(h + state.norm_scales[layer, 3] * state.mlp_out[layer], with_injection=True)
    return out


_BLOCK = 1024  # rows of the matrix of pairs in memory at once


class Place(NamedTuple):
    """A head with a query position and a key position."""

    layer: int
    head: int
    query: int
    key: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head} {self.query} -> {self.key}"


@dataclass(frozen=True)
class ScoreParts:
    """A score with its sources."""

    place: Place  # which score
    score: float  # of the model itself, before cap and softmax
    probability: float  # the head's pattern there
    scale: float  # c
    query: Tensor  # `[D, W]`, what each source gives the query
    key: Tensor  # `[D, W]`, what each source gives the key
    targets: Targets  # the query's side and the key's side as the two ends of a graph, worth a half each

    def pairs(self) -> Iterator[tuple[int, Tensor]]:
        """The matrix of pairs, rows query columns, in blocks `[n, W]` with the number of their first row."""
        for first in range(0, self.query.shape[1], _BLOCK):
            yield first, self.scale * self.query[:, first : first + _BLOCK].T @ self.key


def find_place(replacement: ReplacementModel, text: str) -> Place:
    """The head, query and key that `L5H2@last:max` names.

    Raises:
        UserError: the model has no such head or position, or the query cannot see the key.
    """
    layer, head, query_text, key_text = parse_head(text)
    patterns, tokens = replacement.state.patterns, replacement.inputs.tokens
    n_layers, n_heads = patterns.shape[:2]
    if layer >= n_layers or head >= n_heads:
        raise UserError(
            f"attribution.attention={text}: the model has layers 0 to {n_layers - 1} with heads 0 to {n_heads - 1}"
        )
    query = parse_position(query_text, len(tokens), "attribution.attention")
    row = patterns[layer, head, query]
    most = int(row.argmax())
    key = most if key_text == "max" else parse_position(key_text, len(tokens), "attribution.attention")
    if row[key] == 0:
        raise UserError(
            f"attribution.attention={text}: position {query} cannot see {key} in layer {layer}; choose another key, "
            f"such as {most}, which it looks at most"
        )
    return Place(layer, head, query, key)


@torch.no_grad()
def score_parts(model: HasAdapter, replacement: ReplacementModel, adjoint: Adjoint, place: Place) -> ScoreParts:
    """Split a score of the model over its sources, with one row of edges for each number of query and key."""
    layer, head, *positions = place
    score = head_score(model, replacement.inputs, *place, replacement.errors.dtype)
    scale = replacement.layers[layer].attn_in_scale

    def rows(side: HeadSide, position: int) -> Tensor:
        repeated = torch.full((len(side.weight),), position, device=scale.device)
        return adjoint.stream_rows(layer, side.weight * scale[position], repeated, side.constant)

    # Each side is affine in its own sources, with the other side as it is.
    sides = ((score.query, score.key, place.query), (score.key, score.query, place.key))
    shown = [shown_position(replacement.inputs, position) for position in positions]
    targets = other_targets(
        "attention",
        [f"L{layer}H{head} {name} {where}" for name, where in zip(("query", "key"), shown, strict=True)],
        score.query.value.new_tensor([score.value, score.value]),
        layer=layer,
        positions=positions,
        vectors=torch.stack([score.scale * (fixed.value @ side.weight) * scale[p] for side, fixed, p in sides]),
        constants=torch.stack([score.scale * (fixed.value @ side.constant) for side, fixed, _ in sides]),
    )
    return ScoreParts(
        place=place,
        score=score.value,
        probability=float(replacement.state.patterns[layer, head, place.query, place.key]),
        scale=score.scale,
        query=rows(score.query, place.query),
        key=rows(score.key, place.key),
        targets=targets,
    )


class Pairs(NamedTuple):
    """The strongest pairs of sources of a score, by |term|.

    `query` and `key` are columns of sources, `[n]` int64, `terms` `c q_i . k_j`, `[n]` float64; `total`, the score, and
    `absolute` are sums of terms and |terms| over all pairs.
    """

    query: np.ndarray
    key: np.ndarray
    terms: np.ndarray
    total: float
    absolute: float


@torch.no_grad()
def top_pairs(parts: ScoreParts, count: int, only: np.ndarray | None = None) -> Pairs:
    """The `count` strongest pairs of sources, both in `only [W]` bool where it is given; totals are of all pairs."""
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
    terms, cells = map(torch.cat, zip(*best, strict=True))
    order = terms.abs().argsort(descending=True, stable=True)[:count]
    order = order[terms[order] != 0]
    query, key = divmod(cells[order].cpu().numpy(), width)
    return Pairs(query, key, terms[order].double().cpu().numpy(), total, absolute)


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
    features, number = replacement.features[layer], column - columns.features(layer)
    return NodeKind.FEATURE, layer, int(features.position[number]), int(features.index[number])
