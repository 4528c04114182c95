"""Rows of edges by the linear adjoint of the local replacement model, batched over targets, without autograd.

A target reads the residual stream at one position by a vector g. Going down, with G the gradient at the stream,
    leaving     edge G . v into the soft token's column;  G <- c G
    MLP         edges (s4 * G) . (a W_dec | error | b_dec);  G <- G + s3 * ((s4 * G) W_skip)
                (with cross-layer transcoders the features of all lower layers write here too)
    attention   G <- G + s1 * ((sv * (P^T ((s2 * G) W_o))) W_v)
and the embeddings collect what arrives (Ameisen et al. 2025, with the frozen pieces of `vlmscope.replacement`). A soft
token is one source, whether the vision tower writes it into the stream once or again after later layers. Only positions
that the frozen patterns let a target see are carried.

Total effects of all sources on what a graph explains need no row of a feature. With active features responding
linearly, a change delta of sources moves the targets by `J_t (I - J)^-1 delta`, J the direct effects between features,
J_t those on the targets. Its transpose is the sweep above with one addition: at each MLP the gradient also passes
through the features that the layer reads,
    G <- G + s3 * sum_f (dt / da_f) W_enc[f],    dt / da_f = sum over the layers that f writes to of (s4 * G) . W_dec[f]

With transcoders of the vision tower the gradient at the soft tokens goes on, by autograd through the frozen tower
(`vlmscope.replacement.FrozenTower`), to patch embeddings, tower features and errors; soft tokens are passed through and
have no edges. The tower's biases are what is left of it without patches, features and errors.

Legend: B targets, S carried positions, T positions, d width, H heads, Hkv key/value heads, D head width, K features of
one position that write to a layer, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlmscope.attribution.targets import Targets
from vlmscope.core.records import TOWER
from vlmscope.models.batching import Entering
from vlmscope.replacement import FrozenTower, LayerFeatures, ReplacementModel


class Level(NamedTuple):
    """One layer's columns: its features, then its errors."""

    layer: int  # `TOWER` and up in the vision tower
    bias: int | None  # column of its own bias, before its features; the tower has one for all its layers
    features: int  # first column of the features
    n_features: int
    n_errors: int
    first_position: int  # of its errors

    @property
    def errors(self) -> int:
        """First column of the errors."""
        return self.features + self.n_features


@dataclass(frozen=True)
class Columns:
    """The column of each source in a row of edges, before nodes are chosen.

    With a vision tower first its bias, its N tokens' patch embeddings and its `tower` levels. Then, from column `first`
    on, T embeddings; then for each layer its bias (column `start[layer]`), its active features (`n_features[layer]`, by
    position, index) and its T errors; `start[L]` is the number of columns. A target of layer t reads the columns before
    `start[t]` and, for its own biases, `start[t]` itself: rows are prefixes.
    """

    start: np.ndarray
    n_features: np.ndarray
    n_positions: int
    first: int = 0
    tower: tuple[Level, ...] = ()

    @property
    def levels(self) -> list[Level]:
        """All layers with features, from below."""
        numbers, positions = self.n_features.tolist(), self.n_positions
        return [
            *self.tower,
            *(Level(n, self.bias(n), self.features(n), each, positions, 0) for n, each in enumerate(numbers)),
        ]

    def below(self, layer: int) -> int:
        """How many active features lie below a layer."""
        return sum(level.n_features for level in self.levels if level.layer < layer)

    @property
    def total(self) -> int:
        """Number of columns."""
        return int(self.start[-1])

    @property
    def n_layers(self) -> int:
        """L."""
        return len(self.n_features)

    def bias(self, layer: int) -> int:
        """Column of a layer's bias."""
        return int(self.start[layer])

    def features(self, layer: int) -> int:
        """First column of a layer's features."""
        return int(self.start[layer]) + 1

    def errors(self, layer: int) -> int:
        """First column of a layer's errors."""
        return self.features(layer) + int(self.n_features[layer])

    def all_features(self) -> np.ndarray:
        """The columns of all features in the order of the feature table, int64."""
        spans = [level.features + np.arange(level.n_features) for level in self.levels]
        return np.concatenate(spans).astype(np.int64)


# Vectors of all layers are kept when they fit into this many bytes, else gathered again for each batch.
CACHE_BYTES = 1 << 30


class LayerSources(NamedTuple):
    """What the sources of one layer write into the stream at its MLP, write scale applied.

    `vectors [T, K + 2, d]` of features (zero where a position has fewer), error and decoder bias; `columns [T, K + 1]`
    of features and error. Padding points at the scratch column after the last.
    """

    vectors: Tensor
    columns: Tensor


class SourceVectors:
    """The sources of all layers, kept once gathered if all take at most `cache_bytes`."""

    def __init__(self, replacement: ReplacementModel, cache_bytes: float = CACHE_BYTES) -> None:
        self.replacement = replacement
        n_features = np.array([len(features) for features in replacement.features], dtype=np.int64)
        widths = 1 + n_features + replacement.n_positions
        levels, first = _tower_levels(replacement.tower)
        start = first + replacement.n_positions + np.concatenate([[0], np.cumsum(widths)])
        self.columns = Columns(start, n_features, replacement.n_positions, first, levels)
        self._cache: dict[int, LayerSources] | None = {} if sum(self.layer_bytes()) <= cache_bytes else None

    def layer_bytes(self) -> list[int]:
        """Bytes of each layer's sources."""
        errors = self.replacement.errors
        element, (n_layers, positions, width) = errors.element_size(), errors.shape
        counts = [self._writers_at_a_position(layer) for layer in range(n_layers)]
        return [positions * ((count + 2) * width * element + (count + 1) * 8) for count in counts]

    def of(self, layer: int) -> LayerSources:
        """The sources of one layer."""
        if self._cache is None:
            return self._gather(layer)
        if layer not in self._cache:
            self._cache[layer] = self._gather(layer)
        return self._cache[layer]

    def _gather(self, layer: int) -> LayerSources:
        replacement = self.replacement
        positions, width = replacement.errors.shape[1:]
        count = self._writers_at_a_position(layer)
        vectors = replacement.errors.new_zeros(positions, count + 2, width)
        # Column -1 is the scratch column of a sweep's rows.
        columns = torch.full((positions, count + 1), -1, dtype=torch.int64, device=vectors.device)
        first = 0
        for lower in self._writers(layer):
            features = replacement.features[lower]
            number, slot = numbers_and_slots(features)
            vectors[features.position, first + slot] = features.vectors(layer - lower)
            columns[features.position, first + slot] = self.columns.features(lower) + number
            first += most_at_a_position(features)
        vectors[:, -2] = replacement.errors[layer]
        vectors[:, -1] = replacement.features[layer].b_dec
        vectors *= replacement.layers[layer].write_scale[:, None]
        columns[:, -1] = self.columns.errors(layer) + torch.arange(positions, device=vectors.device)
        return LayerSources(vectors, columns)

    def _writers(self, layer: int) -> list[int]:
        """The layers whose features write at a layer's MLP: the layer itself, and lower ones of a cross-layer set."""
        return [lower for lower in range(layer + 1) if self.replacement.features[lower].reaches(layer - lower)]

    def _writers_at_a_position(self, layer: int) -> int:
        """K of a layer."""
        return sum(most_at_a_position(self.replacement.features[lower]) for lower in self._writers(layer))


def _tower_levels(tower: FrozenTower | None) -> tuple[tuple[Level, ...], int]:
    """The levels of a tower, and the number of its columns."""
    if tower is None:
        return (), 0
    levels, column = [], 1 + len(tower)
    for number, features in enumerate(tower.features):
        levels.append(Level(TOWER + number, None, column, len(features), len(tower), tower.first_position))
        column = levels[-1].errors + len(tower)
    return tuple(levels), column


class TowerRows:
    """Rows of edges from the sources of a frozen tower, by autograd through it; `respond` for total effects."""

    def __init__(self, tower: FrozenTower, levels: Sequence[Level], respond: bool = False) -> None:
        self.tower, self.levels = tower, levels
        self._run, self._at_zero = tower.run(respond=respond), tower.constants()
        self.token_of_patch = torch.from_numpy(tower.token_of_patch).to(self._run.patches.device)
        self.width = levels[-1].errors + len(tower)
        # Gradients of a batch at all layers take about this many bytes a target.
        self.target_bytes = 3 * sum(leaf.numel() for leaf in (self._run.patches, *self._run.leaves)) * 4

    def from_tokens(self, embeddings: Tensor, injections: Tensor) -> Tensor:
        """Rows `[B, width]` of targets that read what tokens write by `[B, T, d]` and `[B, n, T, d]`."""
        outputs, at_zero = _parts(self._run.written), _parts(self._at_zero.written)
        gradients = [embeddings[:, None], injections[:, None]][: len(outputs)]
        return self._rows(outputs, gradients, at_zero, len(self.levels))

    def of_features(self, number: int, which: Tensor) -> Tensor:
        """Rows of active features of the tower's layer `number`, `[B, first column of its features]`."""
        features = self.tower.features[number]
        vectors, constants = features.w_enc[features.index[which]], features.encoder_bias[which]
        return self.of_inputs(number, vectors, features.position[which], constants)

    def of_inputs(self, number: int, vectors: Tensor, tokens: Tensor, constants: Tensor) -> Tensor:
        """Rows of what reads the MLP's input of layer `number` by `vectors [B, d_v]` at `tokens [B]`."""
        x = self._run.mlp_in[number]
        gradient = x.new_zeros(len(tokens), *x.shape)
        gradient[torch.arange(len(tokens)), tokens] = vectors
        rows = self._rows([x], [gradient], [self._at_zero.mlp_in[number]], number)
        rows[:, 0] += constants
        return rows

    def carried(self, slot: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """What sources alone write into the decoder: `[count, T, d]`, and after its layers `[count, n, T, d]`.

        `slot [width]` is the number of each column's source, -1 for columns that are not carried. `J u` is the gradient
        of `J^T v`, which is linear in v, so sources go forwards in batches through the graph that rows go back through.
        """
        run, tower, written = self._run, self.tower, _parts(self._run.written)
        found = [one.detach().new_zeros(count, *one.shape[1:]) for one in written]
        size = max(1, TOWER_BYTES // (2 * self.target_bytes))
        with torch.enable_grad():
            dual = [torch.zeros_like(one, requires_grad=True) for one in written]
            back = torch.autograd.grad(
                written, [run.patches, *run.leaves], dual, create_graph=True, retain_graph=True, materialize_grads=True
            )
        used = [number for number, one in enumerate(back) if one.requires_grad]
        for begin in range(0, count, size):
            batch = slice(begin, min(begin + size, count))
            own = torch.where((slot >= begin) & (slot < begin + size), slot - begin, -1)
            moved = [one.new_zeros(batch.stop - begin, *one.shape) for one in (run.patches, *run.leaves)]

            def put(into: Tensor, slots: Tensor, tokens: Tensor, vectors: Tensor) -> None:
                on = slots >= 0
                into.index_put_((slots[on], tokens[on]), vectors[on].to(into), accumulate=True)

            every = torch.arange(len(run.patches), device=slot.device)
            put(moved[0], own[1 + self.token_of_patch], every, run.patches.detach())
            for level, into, features, errors in zip(self.levels, moved[1:], tower.features, tower.errors, strict=True):
                put(into, own[level.features : level.errors], features.position, features.vectors(0))
                tokens = torch.arange(len(errors), device=slot.device)
                put(into, own[level.errors : level.errors + len(errors)], tokens, errors)
            parts = torch.autograd.grad(
                [back[number] for number in used],
                dual,
                [moved[number] for number in used],
                retain_graph=True,
                is_grads_batched=True,
                materialize_grads=True,
            )
            for into, part in zip(found, parts, strict=True):
                into[batch] = part[:, 0].detach()
        if int(slot[0]) >= 0:  # the biases: what is written without any source, at soft tokens
            soft = torch.from_numpy(tower.inputs.is_image).to(slot.device)[:, None]
            for into, constant in zip(found, _parts(self._at_zero.written), strict=True):
                into[int(slot[0])] += constant[0].detach() * soft
        return found[0], found[1] if len(found) > 1 else found[0].new_zeros(count, 0, *found[0].shape[1:])

    def _rows(self, outputs: list[Tensor], gradients: list[Tensor], at_zero: list[Tensor], n_levels: int) -> Tensor:
        """Rows of the sources below, from gradients `[B, ..]` at outputs of the tower, and the outputs at zero."""
        run, tower = self._run, self.tower
        gradients = [gradient.to(output) for gradient, output in zip(gradients, outputs, strict=True)]
        count, inputs = len(gradients[0]), [run.patches, *run.leaves[:n_levels]]
        width = self.levels[n_levels].features if n_levels < len(self.levels) else self.width
        out = run.patches.new_zeros(count, width)
        size = max(1, TOWER_BYTES // self.target_bytes)
        for begin in range(0, count, size):
            batch = slice(begin, begin + size)
            part = [gradient[batch] for gradient in gradients]
            found = torch.autograd.grad(
                outputs, inputs, part, retain_graph=True, is_grads_batched=True, materialize_grads=True
            )
            out[batch, 0] = sum(
                torch.einsum("b...,...->b", gradient, zero.detach())
                for gradient, zero in zip(part, at_zero, strict=True)
            )
            out[batch].index_add_(1, 1 + self.token_of_patch, (found[0] * run.patches.detach()).sum(-1))
            for level, gradient, features, errors in zip(
                self.levels[:n_levels], found[1:], tower.features, tower.errors, strict=False
            ):
                edges = torch.bmm(gradient.transpose(0, 1), _vectors(features, errors).transpose(1, 2))  # [N, b, K + 1]
                number, slot = numbers_and_slots(features)
                out[batch, level.features : level.errors] = edges[features.position, :, slot].T
                out[batch, level.errors : level.errors + len(tower)] = edges[:, :, -1].T
        return out


def _parts(written: Entering) -> list[Tensor]:
    """Embeddings, and what pictures add after later layers where they do."""
    return [one for one in (written.embeddings, written.injections) if one is not None]


TOWER_BYTES = 1 << 28  # of the gradients in a tower that are in memory at once


def _vectors(features: LayerFeatures, errors: Tensor) -> Tensor:
    """What features (zero where a token has fewer) and the error write at each token, `[N, K + 1, d]`."""
    vectors = errors.new_zeros(len(errors), most_at_a_position(features) + 1, errors.shape[1])
    vectors[features.position, numbers_and_slots(features)[1]] = features.vectors(0)
    vectors[:, -1] = errors
    return vectors


def most_at_a_position(features: LayerFeatures) -> int:
    """The largest number of active features at one position."""
    return max(after - before for before, after in zip(features.offsets[:-1], features.offsets[1:], strict=True))


def numbers_and_slots(features: LayerFeatures) -> tuple[Tensor, Tensor]:
    """Numbers of a layer's active features, and their places among those of their position, `[n]` int64 each."""
    offsets = torch.tensor(features.offsets, device=features.position.device)
    number = torch.arange(len(features), device=features.position.device)
    return number, number - offsets[features.position]


@dataclass
class Sweep:
    """State of one sweep: `gradient [S, B, d]` at `positions [S]`, and the rows `out [B, columns + 1]` so far."""

    gradient: Tensor
    positions: Tensor
    out: Tensor
    read: Readers | None = None  # with a tower: the gradients at what tokens write, on the way

    @property
    def index(self) -> Tensor | slice:
        """The positions as an index: a slice where they follow each other, which reads without a copy."""
        return _index(self.positions)


class Adjoint:
    """Rows of edges of one replacement model."""

    respond = False  # whether active features respond to what moves them

    def __init__(self, replacement: ReplacementModel, sources: SourceVectors | None = None) -> None:
        self.replacement = replacement
        self.sources = SourceVectors(replacement) if sources is None else sources
        self.columns: Columns = self.sources.columns
        self._reach = [pattern.reach() for pattern in replacement.state.patterns]
        # Features of a cross-layer set get edges at more than one layer.
        self._crosses = any(features.w_later for features in replacement.features)
        self._soft = torch.from_numpy(replacement.inputs.is_image).to(replacement.errors.device)

    @cached_property
    def tower(self) -> TowerRows | None:
        """The rows below the soft tokens."""
        below = self.replacement.tower
        return None if below is None else TowerRows(below, self.columns.tower, self.respond)

    @torch.no_grad()
    def feature_rows(self, layer: int, which: Tensor) -> Tensor:
        """Edges into features of one layer, `[B, start[layer] + 1]`.

        `which [B]` are numbers among the layer's active features; sorted ones sweep fewest positions. A layer of the
        vision tower counts from `TOWER`.
        """
        if layer < 0:
            assert self.tower is not None, "there are no transcoders of the tower"
            return self.tower.of_features(layer - TOWER, which).to(self.replacement.errors.dtype)
        features = self.replacement.features[layer]
        position = features.position[which]
        vectors = features.w_enc[features.index[which]] * self.replacement.layers[layer].mlp_in_scale[position]
        return self.stream_rows(layer, vectors, position, features.encoder_bias[which], after_attention=True)

    @torch.no_grad()
    def stream_rows(
        self,
        layer: int,
        vectors: Tensor,
        position: Tensor,
        constants: Tensor | None = None,
        *,
        after_attention: bool = False,
    ) -> Tensor:
        """Edges into read-outs of the stream before a layer's attention, or between it and the MLP.

        Args:
            layer: the layer; L reads what leaves the last one.
            vectors: `[B, d]`, with the scale of the norm that the target reads through.
            position: `[B]` int64.
            constants: `[B]`, what the layer itself adds to each target, for its bias column; unused for L.
            after_attention: read after the layer's attention.

        Returns:
            `[B, start[layer] + 1]`, the columns that exist below the layer and its own bias; `[B, columns]` for L.
        """
        inside = layer < self.columns.n_layers
        width = self.columns.bias(layer) + 1 if inside else self.columns.total
        sweep = self._begin(vectors, position, width)
        if inside and constants is not None:
            sweep.out[:, width - 1] = constants
        if after_attention:
            self._attention(layer, sweep)
        self._descend(layer, sweep)
        return sweep.out[:, :width]

    def target_rows(self, targets: Targets, batch: slice) -> Tensor:
        """Edges into a batch of targets."""
        position = torch.from_numpy(targets.positions[batch]).to(targets.vectors.device)
        vectors, constants = targets.vectors[batch], targets.constants[batch]
        if targets.layer < 0:
            assert self.tower is not None, "there are no transcoders of the tower"
            tokens = position - self.tower.tower.first_position
            rows = self.tower.of_inputs(targets.layer - TOWER, vectors, tokens, constants)
            return rows.to(self.replacement.errors.dtype)
        return self.stream_rows(targets.layer, vectors, position, constants, after_attention=targets.after_attention)

    def _begin(self, vectors: Tensor, position: Tensor, width: int) -> Sweep:
        """A sweep that holds each target's vector at its own position."""
        positions, slot = torch.unique(position, return_inverse=True)
        gradient = vectors.new_zeros(len(positions), *vectors.shape)
        gradient[slot, torch.arange(len(vectors), device=vectors.device)] = vectors
        sweep = Sweep(gradient, positions, vectors.new_zeros(len(vectors), width + 1))
        if self.replacement.tower is not None:
            state = self.replacement.state
            shapes = ((len(vectors), *written.shape) for written in (state.embeddings, state.injections))
            sweep.read = Readers(*(vectors.new_zeros(shape) for shape in shapes))
        return sweep

    def _descend(self, layer: int, sweep: Sweep) -> None:
        """Go from the stream before `layer` down to the embeddings."""
        for lower in range(layer - 1, -1, -1):
            frozen = self.replacement.layers[lower]
            if frozen.injection is not None:
                self._read_tokens(frozen.injection, sweep, after=lower)
            if frozen.stream_scale != 1.0:
                sweep.gradient = sweep.gradient * frozen.stream_scale
            self._mlp(lower, sweep)
            self._attention(lower, sweep)
        self._read_tokens(self.replacement.state.embeddings, sweep)
        if self.tower is not None and sweep.read is not None:
            sweep.out[:, : self.columns.first] = self.tower.from_tokens(*sweep.read).to(sweep.out)

    def _read_tokens(self, written: Tensor, sweep: Sweep, after: int = -1) -> None:
        """Add the edges of what tokens write into the stream here, `written [T, d]`, after a layer or before all.

        What soft tokens write is left to the tower, where it has transcoders.
        """
        gradient = sweep.gradient
        if sweep.read is not None:
            soft = self._soft[sweep.positions]
            into = sweep.read.embeddings if after < 0 else sweep.read.injections[:, after]
            into[:, sweep.positions[soft]] = gradient[soft].transpose(0, 1)
            gradient = gradient * ~soft[:, None, None]
        edges = torch.bmm(gradient, written[sweep.index][:, :, None])[:, :, 0]
        sweep.out[:, self.columns.first :][:, sweep.index] += edges.T

    def _mlp(self, layer: int, sweep: Sweep) -> None:
        sources = self.sources.of(layer)
        edges = torch.bmm(sweep.gradient, sources.vectors[sweep.index].transpose(1, 2))  # [S, B, K + 2]
        columns, edges_in = sources.columns[sweep.index].flatten(), edges[:, :, :-1].transpose(0, 1).flatten(1)
        if self._crosses:
            edges_in = edges_in + sweep.out[:, columns]
        # Only padding repeats a column, the scratch one, which nobody reads: assignment does without `index_add_`.
        sweep.out[:, columns] = edges_in
        sweep.out[:, self.columns.bias(layer)] += edges[:, :, -1].sum(0)
        skip = self.replacement.features[layer].w_skip
        if skip is not None:
            frozen = self.replacement.layers[layer]
            written = frozen.write_scale[sweep.positions, None] * sweep.gradient
            sweep.gradient = sweep.gradient + frozen.mlp_in_scale[sweep.positions, None] * (written @ skip)

    def _attention(self, layer: int, sweep: Sweep) -> None:
        frozen = self.replacement.layers[layer]
        # Of how many positions above each one is seen: spans open and close. The stream passes a position itself.
        (first, last), one = self._reach[layer][:, sweep.positions], torch.ones_like(sweep.positions)
        spans = one.new_zeros(self.columns.n_positions + 1).index_add_(0, first, one).index_add_(0, last + 1, -one)
        below = torch.nonzero(spans.cumsum(0))[:, 0]
        above, keys = sweep.index, _index(below)
        scaled = frozen.attn_out_scale[above, None] * sweep.gradient
        groups = frozen.pattern.n_heads // frozen.n_kv_heads
        heads = (scaled @ frozen.output_weight).unflatten(-1, (frozen.n_kv_heads, groups, -1))
        values = frozen.pattern.back(heads, sweep.positions, below).flatten(2)
        if frozen.value_scale is not None:
            values = values * frozen.value_scale[keys, None]
        if frozen.output_bias is not None:
            sweep.out[:, self.columns.bias(layer)] += (scaled @ frozen.output_bias).sum(0)
        if frozen.value_bias is not None:
            sweep.out[:, self.columns.bias(layer)] += (values @ frozen.value_bias).sum(0)
        gradient = values @ frozen.value_weight
        gradient *= frozen.attn_in_scale[keys, None]
        gradient[_index(torch.searchsorted(below, sweep.positions))] += sweep.gradient
        sweep.gradient, sweep.positions = gradient, below


def _index(positions: Tensor) -> Tensor | slice:
    """Ascending `positions [S]` as a slice if they follow each other."""
    first, last = int(positions[0]), int(positions[-1])
    return slice(first, last + 1) if last - first + 1 == len(positions) else positions


class Readers(NamedTuple):
    """Gradients of B targets with respect to what tokens write into the stream.

    `embeddings [B, T, d]` into the first layer, `injections [B, n, T, d]` what pictures add after the first n layers
    (DeepStack; n is 0 in most families).
    """

    embeddings: Tensor
    injections: Tensor

    def edges(self, embeddings: Tensor, injections: Tensor) -> Tensor:
        """`[B, T]`: each token's edge, from what it writes: `[T, d]` and `[n, T, d]`."""
        return (self.embeddings * embeddings).sum(-1) + (self.injections * injections).sum((1, 3))


def target_readers(replacement: ReplacementModel, targets: Targets, *, total: bool, summed: bool = False) -> Readers:
    """Readers of what a graph explains, by autograd through the frozen model run forwards.

    A second implementation of the edges from tokens, next to the adjoint. `total`: active features respond (total
    effect) or stay (direct effect, the graph's edges). `summed`: one reader of the sum of all targets, in one pass.
    """
    state = replacement.state
    tokens = torch.zeros_like(state.embeddings, requires_grad=True)
    injected = torch.zeros_like(state.injections, requires_grad=True)
    still = [torch.zeros_like(features.activation) for features in replacement.features]
    with torch.enable_grad():
        x, _, _ = replacement.propagate(tokens, injected, still, respond=total, n_layers=targets.layer)
        if targets.after_attention:
            x = x + replacement.layers[targets.layer].attend(x, with_bias=False)
        values = (targets.vectors * x[targets.positions]).sum(-1)
        values = values.sum(0, keepdim=True) if summed else values
    grads = [
        torch.autograd.grad(value, (tokens, injected), retain_graph=True, materialize_grads=True) for value in values
    ]
    return Readers(*(torch.stack(gradient) for gradient in zip(*grads, strict=True)))


class TotalAdjoint(Adjoint):
    """Rows of total effects, each times its source, in place of edges."""

    respond = True

    def _mlp(self, layer: int, sweep: Sweep) -> None:
        super()._mlp(layer, sweep)
        vectors, columns = self._readers(layer)
        # These columns are complete: a feature writes to its own layer and later ones, which were swept before.
        effects = sweep.out[:, columns[sweep.index].flatten()].view(len(sweep.out), -1, columns.shape[1])
        sweep.gradient = torch.baddbmm(sweep.gradient, effects.transpose(0, 1), vectors[sweep.index])

    def _readers(self, layer: int) -> tuple[Tensor, Tensor]:
        """What an effect on one activation reads from the stream, `[T, K, d]` padded with zeros, and its columns."""
        features, frozen = self.replacement.features[layer], self.replacement.layers[layer]
        n_positions, width = frozen.mlp_in_scale.shape
        vectors = frozen.mlp_in_scale.new_zeros(n_positions, most_at_a_position(features), width)
        columns = torch.full(vectors.shape[:2], -1, dtype=torch.int64, device=vectors.device)
        number, slot = numbers_and_slots(features)
        scale = frozen.mlp_in_scale[features.position] / features.activation[:, None]
        vectors[features.position, slot] = scale * features.w_enc[features.index]
        columns[features.position, slot] = self.columns.features(layer) + number
        return vectors, columns


def total_effects(adjoint: Adjoint, targets: Targets, batch: slice = slice(None)) -> Tensor:
    """The total effect of each source on each target of a batch, times the source, `[B, columns]`.

    Scaling a source by 1 + x moves a target by x times that. Columns above the targets are 0.
    """
    rows = TotalAdjoint(adjoint.replacement, adjoint.sources).target_rows(targets, batch)
    return torch.nn.functional.pad(rows, (0, adjoint.columns.total - rows.shape[1]))
