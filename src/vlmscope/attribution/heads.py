"""Attention in graphs: the heads that carry an edge, and why a head attends, both as exact sums.

An edge is a sum over the paths from its source to its target through the frozen model. A path goes from position to
position only through heads, so it has a last head, nearest to its target, or none: it then stays at its position, in
the residual stream or in skip paths of transcoders. With g the target's vector carried down to layer l without heads,
and s the stream that the source alone gives there, the loading of head h of layer l is
    z_h . (P_h (sv (s1 s W_v)))[q],    z_h = (s2 g) W_o of the head, q the target's position
The loadings of all heads, the stream's share and that of skip paths sum to the edge; value biases are in the loadings
of the biases' edges. The source runs forwards and the target backwards, neither as in the adjoint that gave the edge.
In graphs that begin at the patches the source is carried through the frozen tower too. Heads are the decoder's: a path
with heads of the tower alone is in the stream's share, and edges into features of the tower are not split.

A head's score before the softmax says why it looks where it looks. With patterns and norm scales frozen, the query
`q = sum_i q_i` and the key `k = sum_j k_j` are sums over sources (and constants, which belong to bias nodes), so the
score `s = c q . k` is
    sum_ij c q_i . k_j          bilinear, over pairs of sources
    sum_i  c q_i . k            the query's side: affine in its sources, the key as it is
    sum_j  c q . k_j            the key's side.
All three sum to the model's own score (docs/maths.md). The cap of a family that caps its scores comes after s.
Legend: L layers, H heads, Hkv key/value heads, D head width, T positions, d width, B sources carried at once, W columns
below the layer and its bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlmscope.activations import HeadSide, head_score
from vlmscope.attribution.adjoint import Adjoint, Columns, Sweep
from vlmscope.attribution.config import parse_head
from vlmscope.attribution.edges import lay_out
from vlmscope.attribution.influence import edge_strengths
from vlmscope.attribution.targets import Targets, other_targets, parse_position, shown_position
from vlmscope.core.errors import UserError
from vlmscope.core.graph import ENDS, EdgeHeads, NodeKind, NodeTable, PrunedGraph, QueryKeys, Source
from vlmscope.models.base import Adapter
from vlmscope.replacement import ReplacementModel


class _HeadlessAdjoint(Adjoint):
    """An adjoint without heads, whose rows are what stays at a position; keeps the gradient above each attention."""

    def begin(self) -> dict[int, Tensor]:
        """Forget what was kept; from now on layer -> `[B, d]`, each target's gradient at its own position."""
        self._above: dict[int, Tensor] = {}
        return self._above

    def _attention(self, layer: int, sweep: Sweep) -> None:
        # A target has a gradient at its own position alone, so the sum over positions picks it.
        gradient, frozen = sweep.gradient, self.replacement.layers[layer]
        scaled = frozen.attn_out_scale[sweep.positions, None] * gradient
        self._above[layer] = scaled.sum(0)
        if frozen.output_bias is not None:
            sweep.out[:, self.columns.bias(layer)] += (scaled @ frozen.output_bias).sum(0)


class Loadings(NamedTuple):
    """Edges by the last head on the path, `heads [n, L, H]`, and without any head, `[n]` each; together the edges."""

    heads: np.ndarray
    stream: np.ndarray
    skip: np.ndarray


class HeadSplitter:
    """Splits edges of one graph by heads."""

    def __init__(self, replacement: ReplacementModel, nodes: NodeTable, targets: Targets) -> None:
        self.replacement, self.nodes, self.targets = replacement, nodes, targets
        self._all = _HeadlessAdjoint(replacement)
        self._sources, self._columns = self._all.sources, self._all.columns
        self._stream = self._all
        if any(one.w_skip is not None for one in replacement.features):
            plain = replace(replacement, features=[replace(one, w_skip=None) for one in replacement.features])
            self._stream = _HeadlessAdjoint(plain, self._sources)
        table = replacement.feature_activations
        features = nodes.of(NodeKind.FEATURE)
        keys = zip(*(getattr(nodes, name)[features].tolist() for name in ("layer", "position", "index")), strict=True)
        self._row = dict(zip(features.tolist(), (table.row(*key) for key in keys), strict=True))
        kept = np.zeros(len(table), dtype=bool)
        kept[list(self._row.values())] = True
        self._node_of_column = lay_out(replacement, self._columns, kept, targets, "float32")[0]

    @torch.no_grad()
    def split(self, source: np.ndarray, target: np.ndarray, batch_size: int) -> Loadings:
        """Split the edges from nodes `source [n]` to `target [n]`; `batch_size` of either are swept at once."""
        replacement, n_heads = self.replacement, self.replacement.state.patterns[0].n_heads
        rows, row = np.unique(target, return_inverse=True)
        stream, skip, reads = self._staying(rows, source, row, batch_size)
        loadings = replacement.errors.new_zeros(len(source), replacement.n_layers, n_heads)
        carried, slot = np.unique(source, return_inverse=True)
        for begin in range(0, len(carried), batch_size):
            mine = np.flatnonzero((slot >= begin) & (slot < begin + batch_size))
            edge, number, reader, position = map(
                torch.from_numpy, (mine, slot[mine] - begin, row[mine], self.nodes.position[target[mine]].astype(int))
            )
            top = int(self.nodes.layer[target[mine]].max())
            for layer, given in self._forward(carried[begin : begin + batch_size], top):
                terms = given[number, position] * reads[layer][reader]
                loadings[edge, layer] = terms.view(len(mine), n_heads, -1).sum(-1)
        return Loadings(loadings.cpu().numpy(), stream, skip)

    @torch.no_grad()
    def key(self, node: int, layer: int, head: int) -> int:
        """The position from which most of what a head writes for a target comes, biases included."""
        frozen, query = self.replacement.layers[layer], int(self.nodes.position[node])
        _, above = self._headless(self._all, np.array([node]))
        read = (above[layer] @ frozen.output_weight)[0].view(frozen.pattern.n_heads, -1)[head]
        values = frozen.values(self._streams[layer], with_bias=True)
        groups = frozen.pattern.n_heads // frozen.n_kv_heads
        values = values.view(len(values), frozen.n_kv_heads, -1)[:, head // groups]
        return int((frozen.pattern.row(head, query) * (values @ read)).abs().argmax())

    @cached_property
    def _streams(self) -> list[Tensor]:
        """The model's own stream before each layer's attention, `[T, d]`."""
        x, state, out = self.replacement.state.embeddings, self.replacement.state, []
        for layer, frozen in enumerate(self.replacement.layers):
            out.append(x)
            h = x + frozen.attend(x, with_bias=True)
            x = frozen.leave(h + state.norm_scales[layer, 3] * state.mlp_out[layer], with_injection=True)
        return out

    def _headless(self, adjoint: _HeadlessAdjoint, rows: np.ndarray) -> tuple[Tensor, dict[int, Tensor]]:
        """Rows of targets without heads, and what `begin` keeps; targets are of one layer, ends without gaps."""
        above = adjoint.begin()
        if self.nodes.kind[rows[0]] in ENDS:
            first, last = rows[[0, -1]] - int(self.nodes.ends()[0])
            return adjoint.target_rows(self.targets, slice(int(first), int(last) + 1)), above
        layer = int(self.nodes.layer[rows[0]])
        below = self._columns.below(layer)
        which = torch.tensor([self._row[node] - below for node in rows.tolist()], device=self.replacement.errors.device)
        return adjoint.feature_rows(layer, which), above

    def _staying(
        self, rows: np.ndarray, source: np.ndarray, row: np.ndarray, batch_size: int
    ) -> tuple[np.ndarray, np.ndarray, list[Tensor]]:
        """Shares of the edges in the stream and in skip paths, `[n]` each, and what `rows` read of heads.

        Of a layer's heads a target reads `[H * D]` at its position: layer -> `[rows, H * D]`, 0 above the target.
        """
        layers, staying = self.replacement.layers, np.zeros((2, len(source)))
        reads = [self.replacement.errors.new_zeros(len(rows), frozen.output_weight.shape[1]) for frozen in layers]
        for chunk in self._chunks(rows, batch_size):
            above: dict[int, Tensor] = {}
            for part, adjoint in zip(staying, dict.fromkeys((self._stream, self._all)), strict=False):
                out, above = self._headless(adjoint, rows[chunk])
                nodes = self._node_of_column[: out.shape[1]]
                for number, weights in zip(chunk.tolist(), out.double().cpu().numpy(), strict=True):
                    # Left-out features share a node; columns above the targets have none.
                    by_node = np.bincount(nodes[nodes >= 0], weights[nodes >= 0], minlength=len(self.nodes))
                    part[row == number] = by_node[source[row == number]]
            for layer, gradient in above.items():
                reads[layer][chunk] = gradient @ layers[layer].output_weight
        skip = staying[1] - staying[0] if self._stream is not self._all else staying[1]
        return staying[0], skip, reads

    def _chunks(self, rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
        """Numbers of `rows`, ascending, in chunks as `_headless` takes them."""
        end = np.isin(self.nodes.kind[rows], ENDS)
        new = (np.diff(self.nodes.layer[rows]) > 0) | (end[1:] & ((np.diff(rows) > 1) | ~end[:-1]))
        for part in np.split(np.arange(len(rows)), np.flatnonzero(new) + 1):
            yield from (part[begin : begin + size] for begin in range(0, len(part), size))

    def _forward(self, nodes: np.ndarray, top: int) -> Iterator[tuple[int, Tensor]]:
        """Carry each source alone up to layer `top`: (layer, what its heads give at each position `[B, T, H * D]`)."""
        replacement = self.replacement
        positions, width = replacement.errors.shape[1:]
        slot_of_node = np.full(len(self.nodes) + 1, -1)  # the last one for columns that are no node
        slot_of_node[nodes] = np.arange(len(nodes))
        slot = torch.from_numpy(slot_of_node[self._node_of_column]).to(replacement.errors.device)
        bias = slot_of_node[:-1][(self.nodes.kind == NodeKind.BIAS) & (self.nodes.layer >= 0)]  # layer -> slot
        below = self._columns.first
        of_tokens = slot[below : below + positions]
        if below:  # soft tokens are passed through: they are no sources
            of_tokens = of_tokens.masked_fill(torch.from_numpy(replacement.inputs.is_image).to(slot.device), -1)
        token = torch.nonzero(of_tokens >= 0)[:, 0]
        x = replacement.errors.new_zeros(len(nodes), positions, width)
        x[of_tokens[token], token] = replacement.state.embeddings[token]
        injected = x.new_zeros(len(nodes), 0, positions, width)
        if self._all.tower is not None and bool((slot[:below] >= 0).any()):
            written, injected = self._all.tower.carried(slot[:below], len(nodes))
            x, injected = x + written.to(x), injected.to(x)
        first = max(int(self.nodes.layer[nodes].min()), 0)
        last = min(top, replacement.n_layers - 1)
        for layer in range(first, last + 1):
            frozen, own = replacement.layers[layer], int(bias[layer])
            values = frozen.values(x, with_bias=False)
            if own >= 0 and frozen.value_bias is not None:
                values[own] += (
                    frozen.value_bias if frozen.value_scale is None else frozen.value_bias * frozen.value_scale
                )
            kv = frozen.n_kv_heads
            values = values.view(len(nodes), positions, kv, -1)
            mixed = [
                torch.einsum("hgqk,bkhd->bqhgd", block.unflatten(0, (kv, -1)), values[:, keys])
                for _, keys, block in frozen.pattern.blocks
            ]
            heads = torch.cat(mixed, 1).reshape(len(nodes), positions, -1)
            yield layer, heads
            if layer == last:
                return
            out = heads @ frozen.output_weight.T
            if own >= 0 and frozen.output_bias is not None:
                out[own] += frozen.output_bias
            x = x + frozen.attn_out_scale * out
            skip, sources = replacement.features[layer].w_skip, self._sources.of(layer)
            if skip is not None:
                x = x + frozen.write_scale * ((frozen.mlp_in_scale * x) @ skip.T)
            # Padding has column -1, whose node is none.
            writer = torch.where(sources.columns >= 0, slot[sources.columns], -1)
            position, which = torch.nonzero(writer >= 0, as_tuple=True)
            x.index_put_((writer[position, which], position), sources.vectors[position, which], accumulate=True)
            if own >= 0:
                x[own] += sources.vectors[:, -1]
            x = frozen.leave(x, with_injection=False)
            if frozen.injection is not None:
                x[of_tokens[token], token] += frozen.injection[token]
            if layer < injected.shape[1]:
                x = x + injected[:, layer]


def edge_heads(
    replacement: ReplacementModel, pruned: PrunedGraph, targets: Targets, count: int, batch_size: int
) -> tuple[EdgeHeads, HeadSplitter]:
    """The heads of the `count` strongest kept edges of a graph.

    At most a quarter as many different sources, and targets, as the graph has rows are swept: edges of others, weaker
    ones, are left out, so that heads never take as long as half of the graph. So are edges into features of a tower.
    """
    graph = pruned.graph
    edges, strength = edge_strengths(pruned)
    above = graph.nodes.layer[graph.targets_of(edges)] >= 0
    edges, strength = edges[above], strength[above]
    source, target = graph.indices[edges].astype(np.int64), graph.targets_of(edges)
    most = max(int((np.diff(graph.indptr) > 0).sum()) // 4, 1)
    chosen = np.flatnonzero(_among_first(source, most) & _among_first(target, most))[:count]
    splitter = HeadSplitter(replacement, graph.nodes, targets)
    found = splitter.split(source[chosen], target[chosen], batch_size)
    return EdgeHeads(edges[chosen], strength[chosen], *found), splitter


def _among_first(values: np.ndarray, most: int) -> np.ndarray:
    """Mask `[n]` of those among the `most` different values that come first."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return first.argsort().argsort()[inverse] < most


def carriers(pruned: PrunedGraph, heads: EdgeHeads, splitter: HeadSplitter, count: int) -> list[tuple[int, Place]]:
    """The heads that carry most, each with the node into which it carries most and the key that gives most there.

    A head and a node are in the list once.
    """
    graph = pruned.graph
    rows, row = np.unique(graph.targets_of(heads.edges), return_inverse=True)
    into = np.zeros((len(rows), *heads.loadings.shape[1:]))
    np.add.at(into, row, heads.parts()[1])
    found: dict[tuple[int, int], tuple[int, Place]] = {}
    for flat in np.argsort(-into, axis=None, kind="stable").tolist():
        number, layer, head = (int(i) for i in np.unravel_index(flat, into.shape))
        node = int(rows[number])
        if len(found) == count or not into[number, layer, head]:
            break
        if (layer, head) not in found and all(node != other for other, _ in found.values()):
            place = Place(layer, head, int(graph.nodes.position[node]), splitter.key(node, layer, head))
            found[layer, head] = node, place
    return list(found.values())


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


def find_place(replacement: ReplacementModel, text: str) -> Place:
    """The head, query and key that `L5H2@last:max` names.

    Raises:
        UserError: the model has no such head or position, or the query cannot see the key.
    """
    layer, head, query_text, key_text = parse_head(text)
    patterns, tokens = replacement.state.patterns, replacement.inputs.tokens
    n_layers, n_heads = len(patterns), patterns[0].n_heads
    if layer >= n_layers or head >= n_heads:
        raise UserError(
            f"attribution.attention={text}: the model has layers 0 to {n_layers - 1} with heads 0 to {n_heads - 1}"
        )
    query = parse_position(query_text, len(tokens), "attribution.attention")
    row = patterns[layer].row(head, query)
    most = int(row.argmax())
    key = most if key_text == "max" else parse_position(key_text, len(tokens), "attribution.attention")
    if row[key] == 0:
        raise UserError(
            f"attribution.attention={text}: position {query} cannot see {key} in layer {layer}; choose another key, "
            f"such as {most}, which it looks at most"
        )
    return Place(layer, head, query, key)


@torch.no_grad()
def score_parts(adapter: Adapter, replacement: ReplacementModel, adjoint: Adjoint, place: Place) -> ScoreParts:
    """Split a score of the model over its sources, with one row of edges for each number of query and key."""
    layer, head, *positions = place
    score = head_score(adapter, replacement.inputs, *place, replacement.errors.dtype)
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
        probability=float(replacement.state.patterns[layer].row(head, place.query)[place.key]),
        scale=score.scale,
        query=rows(score.query, place.query),
        key=rows(score.key, place.key),
        targets=targets,
    )


_MOST = 1024  # sources with the longest queries, and keys, that pairs are made of


@torch.no_grad()
def query_keys(
    parts: ScoreParts, replacement: ReplacementModel, columns: Columns, count: int, node: int = -1
) -> QueryKeys:
    """The `count` strongest pairs, queries and keys of a score; `node` is what the head writes for, if known."""
    query, key = (side.square().sum(0).topk(min(_MOST, side.shape[1])).indices for side in (parts.query, parts.key))
    terms = parts.scale * parts.query[:, query].T @ parts.key[:, key]
    sums = [side.sum(1, dtype=torch.float64) for side in (parts.query, parts.key)]

    kept = np.ones(len(replacement.feature_activations), dtype=bool)
    node_of_column, nodes = lay_out(replacement, columns, kept, parts.targets, "float32")

    def source(column: int) -> Source:
        return nodes.source(int(node_of_column[column]))

    def top(values: Tensor) -> tuple[list[int], list[float]]:
        best = values.flatten().abs().topk(min(count, values.numel())).indices
        best = best[values.flatten()[best] != 0]
        return best.tolist(), values.flatten()[best].double().tolist()

    cells, pairs = top(terms)
    ends = [(source(int(query[i // len(key)])), source(int(key[i % len(key)]))) for i in cells]
    sides = [top(parts.scale * (side.T @ other.to(side.dtype)))
             for side, other in ((parts.query, sums[1]), (parts.key, sums[0]))]  # fmt: skip
    queries, keys = ([(source(i), term) for i, term in zip(*side, strict=True)] for side in sides)
    return QueryKeys(
        node,
        *parts.place,
        score=parts.score,
        probability=parts.probability,
        total=float(parts.scale * sums[0] @ sums[1]),
        sizes=float(terms.abs().sum(dtype=torch.float64)),
        pairs=[(*both, term) for both, term in zip(ends, pairs, strict=True)],
        queries=queries,
        keys=keys,
    )
