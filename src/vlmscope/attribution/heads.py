"""Which attention heads carry an edge, and which carry most of a graph's flow.

An edge is a sum over the paths from its source to its target through the frozen model. A path goes from position to
position only through heads, so every path has a first head (nearest to its source) and a last one (nearest to its
target), or none: it then stays at its position, in the residual stream and the transcoders' skip paths. Grouped by
either, the shares of all heads and the direct one sum to the edge.
    first head h of layer l:  G . (s2 (P_h (sv (s1 u W_v))) W_o),  u the source carried up to l without heads, G the
                              target's gradient above that attention
    last head h of layer l:   the edge from the source to the read-out of h's output by g, g the target's gradient
                              carried down to l without heads
Legend: L layers, H heads, Hkv key/value heads, D head width, T positions, d width, B targets.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmscope.attribution.adjoint import Adjoint, Sweep
from vlmscope.attribution.influence import influence, logit_weights
from vlmscope.attribution.targets import Targets
from vlmscope.core.errors import UserError
from vlmscope.core.graph import ENDS, AttributionGraph, NodeKind
from vlmscope.replacement.model import ReplacementModel


@dataclass(frozen=True)
class HeadLoadings:
    """An edge by the heads that carry it.

    Attributes:
        edge: its weight.
        direct: what no head carries; 0 between two positions.
        first: `[L, H]` float64, by the first head on the path.
        last: `[L, H]` float64, by the last.
    """

    edge: float
    direct: float
    first: np.ndarray
    last: np.ndarray


@dataclass(frozen=True)
class _Read:
    """One target: `vector [d]` at a position of the stream before, or after, the attention of a layer."""

    layer: int
    position: int
    vector: Tensor
    after_attention: bool


class _Watching(Adjoint):
    """An adjoint that keeps the gradient above every attention of its latest sweep: layer -> (`[S, B, d]`, `[S]`)."""

    def __init__(self, replacement: ReplacementModel) -> None:
        super().__init__(replacement)
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def _attention(self, layer: int, sweep: Sweep) -> None:
        self.seen[layer] = (sweep.gradient, sweep.positions)
        super()._attention(layer, sweep)


class HeadSplitter:
    """Splits edges of one graph; the rows by last heads of a target are kept for its other edges."""

    def __init__(self, replacement: ReplacementModel, graph: AttributionGraph, targets: Targets) -> None:
        self.replacement, self.graph, self.targets = replacement, graph, targets
        self._adjoint, self._watching = Adjoint(replacement), _Watching(replacement)
        self._by_target: dict[int, tuple[dict[int, tuple[Tensor, Tensor]], Tensor, Tensor]] = {}

    @torch.no_grad()
    def split(self, source: int, target: int) -> HeadLoadings:
        """The heads of one edge.

        Args:
            source: node number of a token, feature or error.
            target: node number of a feature or of what the graph explains.

        Raises:
            UserError: the source has no position, or the target no edges.
        """
        nodes = self.graph.nodes
        if nodes.kind[source] not in (NodeKind.TOKEN, NodeKind.FEATURE, NodeKind.ERROR):
            raise UserError(f"node {source} has no position to go from; heads carry edges of tokens, features, errors")
        if nodes.kind[target] not in (NodeKind.FEATURE, *ENDS):
            raise UserError(f"node {target} has no edges into it; choose a feature, or what the graph explains")
        read = self._read(target)
        if target not in self._by_target:
            seen = self._gradients(read)
            self._by_target[target] = (seen, *self._last(read))
        seen, last, direct_row = self._by_target[target]
        first, direct = self._first(source, read, seen)
        column = self._column(source)
        # Both ways find what no head carries; they are two computations of one number.
        assert abs(float(direct_row[column]) - direct) <= 1e-4 * (1e-6 + abs(direct) + float(first.abs().sum()))
        own, weights = self.graph.incoming(target)
        place = np.searchsorted(own, source)
        edge = float(weights[place]) if place < len(own) and own[place] == source else 0.0
        return HeadLoadings(edge, direct, first.double().cpu().numpy(), last[:, :, column].double().cpu().numpy())

    def _read(self, target: int) -> _Read:
        nodes, replacement = self.graph.nodes, self.replacement
        if nodes.kind[target] in ENDS:
            number = target - int(nodes.ends()[0])
            position, vector = int(self.targets.positions[number]), self.targets.vectors[number]
            return _Read(self.targets.layer, position, vector, self.targets.after_attention)
        layer, position, index = (int(getattr(nodes, name)[target]) for name in ("layer", "position", "index"))
        scale = replacement.layers[layer].mlp_in_scale[position]
        return _Read(layer, position, replacement.features[layer].w_enc[index] * scale, True)

    def _gradients(self, read: _Read) -> dict[int, tuple[Tensor, Tensor]]:
        self._watching.seen = {}
        position = torch.tensor([read.position], device=read.vector.device)
        vector = read.vector[None]
        self._watching.stream_rows(read.layer, vector, position, after_attention=read.after_attention)
        return self._watching.seen

    def _column(self, source: int) -> int:
        nodes, columns = self.graph.nodes, self._adjoint.columns
        layer, position = int(nodes.layer[source]), int(nodes.position[source])
        match NodeKind(int(nodes.kind[source])):
            case NodeKind.TOKEN:
                return position
            case NodeKind.ERROR:
                return columns.errors(layer) + position
            case _:
                before = int(columns.n_features[:layer].sum())
                row = self.replacement.feature_activations.row(layer, position, int(nodes.index[source]))
                return columns.features(layer) + row - before

    def _written(self, source: int, layer: int) -> Tensor | None:
        """What the source writes at a layer's MLP, write scale included, `[d]`; None for nothing."""
        nodes, replacement = self.graph.nodes, self.replacement
        own, position, index = (int(getattr(nodes, name)[source]) for name in ("layer", "position", "index"))
        scale = replacement.layers[layer].write_scale[position]
        if nodes.kind[source] == NodeKind.ERROR:
            return scale * replacement.errors[own, position] if own == layer else None
        if nodes.kind[source] != NodeKind.FEATURE or not replacement.features[own].reaches(layer - own):
            return None
        features = replacement.features[own]
        row = replacement.feature_activations.row(own, position, index)
        first = int(self._adjoint.columns.n_features[:own].sum())
        decoder = features.w_dec if layer == own else features.w_later[layer - own - 1]
        return scale * features.activation[row - first] * decoder[index]

    def _first(self, source: int, read: _Read, seen: dict[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, float]:
        """`[L, H]` shares by first head, and the direct one."""
        replacement, nodes = self.replacement, self.graph.nodes
        position, token = int(nodes.position[source]), nodes.kind[source] == NodeKind.TOKEN
        x = replacement.state.embeddings[position] if token else torch.zeros_like(read.vector)
        shares = read.vector.new_zeros(replacement.n_layers, replacement.state.patterns.shape[1])
        for layer in range(read.layer + int(read.after_attention)):
            frozen = replacement.layers[layer]
            gradient, positions = seen[layer]
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
            skip, written = replacement.features[layer].w_skip, self._written(source, layer)
            out = x if written is None else x + written
            if skip is not None:
                through = skip @ (frozen.mlp_in_scale[position] * x)
                out = out + frozen.write_scale[position] * through
            x = out * frozen.stream_scale
            if token and frozen.injection is not None:
                x = x + frozen.injection[position]
        return shares, float(read.vector @ x) if read.position == position else 0.0

    def _last(self, read: _Read) -> tuple[Tensor, Tensor]:
        """Rows `[L, H, columns]` by last head, and the direct row `[columns]`."""
        replacement, adjoint = self.replacement, self._adjoint
        width, n_heads = adjoint.columns.total, replacement.state.patterns.shape[1]
        rows = read.vector.new_zeros(replacement.n_layers, n_heads, width)
        at = torch.tensor([read.position], device=read.vector.device)
        sweep = Sweep(read.vector[None, None].clone(), at, read.vector.new_zeros(1, width + 1))
        for layer in range(read.layer - 1 + int(read.after_attention), -1, -1):
            if layer < read.layer:
                adjoint._leaving(layer, sweep)
                adjoint._mlp(layer, sweep)
            gradient = self._through_heads(layer, read.position, sweep.gradient[0, 0])
            every = torch.arange(replacement.n_positions, device=at.device)
            branch = Sweep(gradient, every, gradient.new_zeros(n_heads, width + 1))
            adjoint._descend(layer, branch)
            rows[layer] = branch.out[:, :width]
        adjoint._read_tokens(replacement.state.embeddings, sweep)
        return rows, sweep.out[0, :width]

    def _through_heads(self, layer: int, position: int, gradient: Tensor) -> Tensor:
        """`gradient [d]` above a layer's attention at a position, back through each head alone: `[T, H, d]`."""
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
    """How much of a graph's flow each head carries.

    Attributes:
        flow: `[L, H]` float64, the flow through each head, summed over where it looks from and to.
        query: `[L, H]` int64, where the most of it goes to.
        key: `[L, H]` int64, and from.
        covered: share of the rows' worth that was looked at.
    """

    flow: np.ndarray
    query: np.ndarray
    key: np.ndarray
    covered: float

    def ranked(self) -> list[tuple[int, int]]:
        """(layer, head), the one with the largest flow first."""
        order = np.argsort(-self.flow, axis=None, kind="stable")
        return [(int(at) // self.flow.shape[1], int(at) % self.flow.shape[1]) for at in order]


@torch.no_grad()
def head_flow(
    replacement: ReplacementModel, graph: AttributionGraph, targets: Targets, max_rows: int = 256, batch: int = 8
) -> HeadFlow:
    """The flow through each head of the ends of a graph and of its most influential features.

    A row i hands (I_i + w_i) / sum |edges| down for each unit of |edge|. Of a target's value, head h carries
    `P_h[q, k] (G_q s2 W_o) . v_k` from key k to query q, biases of values included; its size times that factor, summed
    over the rows, is the flow.

    Args:
        replacement: the frozen model.
        graph: its graph.
        targets: what the graph explains.
        max_rows: features looked at.
        batch: targets at once.
    """
    weights = logit_weights(graph)
    found = influence(graph, weights)
    worth, features = found.nodes + weights, graph.nodes.of(NodeKind.FEATURE)
    chosen = np.sort(features[np.argsort(-found.nodes[features], kind="stable")[:max_rows]])
    n_layers, n_heads, n_positions, _ = replacement.state.patterns.shape
    total = replacement.errors.new_zeros(n_layers, n_heads, n_positions, n_positions, dtype=torch.float64)
    watching, splitter = _Watching(replacement), HeadSplitter(replacement, graph, targets)
    values = _values(replacement)
    rows = np.concatenate([chosen, graph.nodes.ends()])
    reads = [splitter._read(int(node)) for node in rows]
    for layer, after in sorted({(read.layer, read.after_attention) for read in reads}):
        mine = [at for at, read in enumerate(reads) if (read.layer, read.after_attention) == (layer, after)]
        for begin in range(0, len(mine), batch):
            some = mine[begin : begin + batch]
            watching.seen = {}
            vectors = torch.stack([reads[at].vector for at in some])
            position = torch.tensor([reads[at].position for at in some], device=vectors.device)
            watching.stream_rows(layer, vectors, position, after_attention=after)
            factor = torch.from_numpy(found.per_edge[rows[some]]).to(total.device)
            for below, (gradient, positions) in watching.seen.items():
                total[below, :, positions] += _carried(replacement, below, gradient, positions, values, factor)
    flat = total.flatten(2)
    best = flat.argmax(-1).cpu().numpy()
    every = graph.nodes.kind == NodeKind.FEATURE
    every[graph.nodes.ends()] = True
    covered = float(worth[rows].sum() / worth[every].sum())
    return HeadFlow(flat.sum(-1).cpu().numpy(), best // n_positions, best % n_positions, covered)


def _carried(
    replacement: ReplacementModel, layer: int, gradient: Tensor, positions: Tensor, values: list[Tensor], factor: Tensor
) -> Tensor:
    """`[H, S, T]`: what each head carries of B targets, |.| times `factor [B]`, summed."""
    frozen = replacement.layers[layer]
    n_heads = len(frozen.pattern)
    z = (frozen.attn_out_scale[positions, None] * gradient) @ frozen.output_weight  # [S, B, H * D]
    z = z.view(*z.shape[:2], n_heads, -1).permute(2, 1, 0, 3)  # [H, B, S, D]
    terms = torch.einsum("hbsd,htd,hst->hbst", z, values[layer], frozen.pattern[:, positions])
    return (terms.abs().double() * factor[None, :, None, None]).sum(1)


def _values(replacement: ReplacementModel) -> list[Tensor]:
    """Per layer the values of each query head, `[H, T, D]`."""
    x, state, out = replacement.state.embeddings, replacement.state, []
    for layer, frozen in enumerate(replacement.layers):
        values = (frozen.attn_in_scale * x) @ frozen.value_weight.T
        if frozen.value_bias is not None:
            values = values + frozen.value_bias
        if frozen.value_scale is not None:
            values = values * frozen.value_scale
        per_head = values.view(len(x), frozen.n_kv_heads, -1).transpose(0, 1)
        out.append(per_head.repeat_interleave(len(frozen.pattern) // frozen.n_kv_heads, dim=0))
        h = x + frozen.attend(x, with_bias=True)
        x = frozen.leave(h + state.norm_scales[layer, 3] * state.mlp_out[layer], with_injection=True)
    return out
