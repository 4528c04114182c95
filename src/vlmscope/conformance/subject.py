"""What the identities are checked on: a model at one prompt, its replacement model and the edges found there.

Legend: N nodes, R rows (features, then logits), n active features, T positions, V vocabulary.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy import sparse

from vlmscope.activations.capture import capture_mlp
from vlmscope.attribution.adjoint import Adjoint
from vlmscope.attribution.edges import Edges, assemble, feature_chunks, target_chunk
from vlmscope.attribution.targets import choose_logits
from vlmscope.core.graph import NodeKind
from vlmscope.core.records import generator
from vlmscope.models.base import ModelInputs
from vlmscope.replacement.model import ReplacementModel, Replay, build_replacement
from vlmscope.scope import Scope

FeatureKey = tuple[int, int, int]  # layer, position, feature index


@dataclass(frozen=True)
class Limits:
    """How much is looked at; what is more is sampled from `seed`.

    Attributes:
        targets: at most this many features get a row of edges; total effects need all of them.
        sources: features whose effects are measured.
        positions: positions at which features are changed in the Hugging Face model.
        logits: logit targets.
        batch_size: targets swept at once.
        new_tokens: length of the generated answers.
        seed: names the samples.
    """

    targets: int = 5000
    sources: int = 16
    positions: int = 6
    logits: int = 5
    batch_size: int = 64
    new_tokens: int = 6
    seed: int = 0


@dataclass(frozen=True)
class Subject:
    """A model at one prompt with everything that the checks compare.

    Attributes:
        scope: the model and its transcoders, one for every layer.
        inputs: the prompt with its pictures.
        replacement: the local replacement model there.
        edges: rows of edges of its features (a sample when there are many) and of some logits.
        limits: how much to look at.
        other: the same prompt with other pictures, None without pictures.
    """

    scope: Scope
    inputs: ModelInputs
    replacement: ReplacementModel
    edges: Edges
    limits: Limits
    other: ModelInputs | None = None

    @cached_property
    def matrix(self) -> sparse.csr_matrix:
        """The adjacency matrix `[N, N]`, rows targets, float64 whatever the edges are stored in."""
        n_nodes = len(self.edges.nodes)
        weights = self.edges.weights.astype(np.float64)
        return sparse.csr_matrix((weights, self.edges.indices, self.edges.indptr), shape=(n_nodes, n_nodes))

    @property
    def feature_nodes(self) -> np.ndarray:
        """Nodes of the features that have a row, int64."""
        return self.edges.nodes.of(NodeKind.FEATURE)

    @cached_property
    def rows(self) -> np.ndarray:
        """Nodes that have a row: features, then logits, `[R]` int64."""
        return np.concatenate([self.feature_nodes, self.edges.nodes.of(NodeKind.LOGIT)])

    @cached_property
    def scale(self) -> np.ndarray:
        """Sum of |incoming edges| of every row, `[R]` float64, > 0: what errors are measured against."""
        absolute = np.asarray(abs(self.matrix[self.rows]).sum(1)).ravel()
        return np.where(absolute > 0, absolute, 1.0)

    @cached_property
    def table_rows(self) -> np.ndarray:
        """The feature-table row of every feature node, int64."""
        table = self.replacement.feature_activations
        return np.array([table.row(*self.key(node)) for node in self.feature_nodes], dtype=np.int64)

    @property
    def n_active(self) -> int:
        """How many features are active, with a row or without."""
        return len(self.replacement.feature_activations)

    def key(self, node: int) -> FeatureKey:
        """The (layer, position, feature index) of a feature node."""
        nodes = self.edges.nodes
        return int(nodes.layer[node]), int(nodes.position[node]), int(nodes.index[node])

    def column(self, node: int) -> np.ndarray:
        """The edges from a node into every row, `[R]`."""
        return self.matrix[self.rows][:, [node]].toarray().ravel()

    def read(self, replay: Replay) -> np.ndarray:
        """What a replay gives the rows' targets, `[R]` float64."""
        return np.concatenate(
            [replay.pre_activation.double().numpy(force=True)[self.table_rows], self.centred(replay.logits[-1])]
        )

    def centred(self, logits: torch.Tensor) -> np.ndarray:
        """The logit targets of the unembedding's output at the last position `[V]`: minus its mean, float64."""
        wide = logits.double().numpy(force=True)
        return (wide - wide.mean())[self.edges.nodes.index[self.edges.nodes.of(NodeKind.LOGIT)]]

    @cached_property
    def sources(self) -> np.ndarray:
        """A sample of feature nodes, some of them at the first position, which no one may drop."""
        nodes, rng = self.feature_nodes, generator(self.limits.seed, "sources")
        first = nodes[self.edges.nodes.position[nodes] == 0]
        chosen = [_sample(rng, nodes, self.limits.sources), _sample(rng, first, 1 + self.limits.sources // 4)]
        return np.unique(np.concatenate(chosen))

    @cached_property
    def own_logits(self) -> torch.Tensor:
        """The Hugging Face model's logits `[T, V]`, from a forward of its own without any hook."""
        with torch.no_grad():
            return self.scope.vlm.model(**self.inputs.tensors).logits[0]

    @cached_property
    def own_unembedded(self) -> torch.Tensor:
        """What the Hugging Face model's unembedding gives `[T, V]`: its logits, unless it caps them."""
        if self.replacement.logit_softcap is None:
            return self.own_logits
        found: list[torch.Tensor] = []
        head = self.scope.adapter.lm_head()
        handle = head.register_forward_hook(lambda _module, _args, output: found.append(output[0]))
        try:
            with torch.no_grad():
                self.scope.vlm.model(**self.inputs.tensors)
        finally:
            handle.remove()
        return found[0]

    @cached_property
    def own_pre_activations(self) -> np.ndarray:
        """Pre-activations `[n]` float64 of the active features at the Hugging Face model's own MLP inputs."""
        table = self.replacement.feature_activations
        inputs = capture_mlp(self.scope.adapter, self.inputs.tensors)
        out = np.empty(len(table))
        for layer in range(self.replacement.n_layers):
            mine = np.flatnonzero(table.layer == layer)
            transcoder, x = self.scope.transcoders[layer], inputs[layer][0][0]
            index = torch.from_numpy(table.index[mine]).to(x.device)
            position = torch.from_numpy(table.position[mine]).to(x.device)
            with torch.no_grad():
                read = (x[position].double() * transcoder.W_enc[index].double()).sum(-1) + transcoder.b_enc[
                    index
                ].double()
            out[mine] = read.numpy(force=True)
        return out


def _sample(rng: np.random.Generator, values: np.ndarray, count: int) -> np.ndarray:
    return values if len(values) <= count else rng.choice(values, count, replace=False)


def find_edges(replacement: ReplacementModel, limits: Limits) -> Edges:
    """Rows of edges as `vlmscope.attribution` makes them, of all features or of a sample of `limits.targets`."""
    dtype = "float64" if replacement.errors.dtype == torch.float64 else "float32"
    logits = choose_logits(replacement, 1.0, limits.logits)
    adjoint = Adjoint(replacement)
    every = np.arange(len(replacement.feature_activations))
    chosen = np.sort(_sample(generator(limits.seed, "targets"), every, limits.targets))
    chunks = list(feature_chunks(adjoint, chosen, limits.batch_size, dtype))
    return assemble(replacement, adjoint.columns, chunks, target_chunk(adjoint, logits, dtype), logits, dtype)


def make_subject(
    scope: Scope,
    inputs: ModelInputs,
    other: ModelInputs | None = None,
    limits: Limits | None = None,
    dtype: torch.dtype | None = None,
) -> Subject:
    """Freeze the model at a prompt and find its edges; in float64 call it, and the checks, under `exact_float64`.

    Args:
        scope: the model and its transcoders.
        inputs: the prompt.
        other: the prompt with other pictures.
        limits: how much to look at.
        dtype: of the replacement model; the model's own when None.

    Raises:
        UserError: when the model or the set cannot be represented.
    """
    limits = limits or Limits()
    replacement = build_replacement(scope, inputs, dtype)
    return Subject(scope, inputs, replacement, find_edges(replacement, limits), limits, other)
