"""The identities of docs/maths.md, measured on a model at one prompt, for users and for the tests.

A check is a function of a `Subject`: the model at one prompt, its replacement model and their edges. It returns the
largest error. Errors of targets are relative to the sum of |incoming edges|, with which rounding grows. `run_cases`
runs all checks on text alone, with one picture and with two.

Legend: N nodes, R rows (features, then logits), n active features, T positions, V vocabulary.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, wraps

import numpy as np
import torch
from PIL import Image
from scipy import sparse
from scipy.linalg import solve_triangular
from torch import Tensor

from vlmscope.activations import capture_mlp
from vlmscope.attribution.adjoint import Adjoint
from vlmscope.attribution.edges import Edges, assemble, feature_chunks, target_chunk
from vlmscope.attribution.heads import HeadSplitter, Place, query_keys, score_parts
from vlmscope.attribution.targets import choose_logits
from vlmscope.core.errors import UserError
from vlmscope.core.graph import NodeKind
from vlmscope.core.records import TOWER, generator
from vlmscope.interventions.edits import LayerEdit
from vlmscope.interventions.run import base_run, editing, run_edited
from vlmscope.models.base import ModelInputs, Stack, exact_float64
from vlmscope.models.checkpoint import is_offloaded
from vlmscope.models.families import adapter_for
from vlmscope.replacement import ReplacementModel, Replay, build_replacement
from vlmscope.scope import Scope
from vlmscope.transcoders.transcoder import Transcoder, TranscoderSet

TOLERANCE = 1e-9  # of the sum of |incoming edges|, in float64 under `exact_float64`
CASES = ("text", "one_picture", "two_pictures")  # the n-th has n pictures
PROMPT = "what is this planet ?"
_SOURCES = (NodeKind.TOKEN, NodeKind.FEATURE, NodeKind.ERROR, NodeKind.BIAS, NodeKind.LEFT_OUT)
_SWEPT_AGAIN = 48  # targets whose rows are computed again in other batches and orders

FeatureKey = tuple[int, int, int]  # layer, position, feature index


@dataclass(frozen=True)
class Limits:
    """Sizes of the checks; where there is more, it is sampled."""

    targets: int = 5000  # at most this many features get a row of edges; total effects need all of them
    sources: int = 16  # features whose effects are measured
    positions: int = 6  # positions at which features are changed in the Hugging Face model
    logits: int = 5  # logit targets
    batch_size: int = 64  # targets swept at once
    new_tokens: int = 6  # length of the generated answers
    seed: int = 0  # names the samples


@dataclass(frozen=True)
class Subject:
    """A model at one prompt with everything that the checks compare."""

    scope: Scope  # the model and its transcoders, one for every layer
    inputs: ModelInputs  # the prompt with its pictures
    replacement: ReplacementModel  # the local replacement model there
    edges: Edges  # rows of edges of its features (a sample when there are many) and of some logits
    limits: Limits
    other: ModelInputs | None = None  # the same prompt with other pictures, None without pictures

    @cached_property
    def matrix(self) -> sparse.csr_matrix:
        """The adjacency matrix `[N, N]`, rows targets, float64 whatever the dtype of the edges."""
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
        """Sum of |incoming edges| of every row, `[R]` float64, > 0: the unit of errors."""
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
        """The rows' targets in a replay, `[R]` float64."""
        return np.concatenate(
            [replay.pre_activation.double().numpy(force=True)[self.table_rows], self.centred(replay.logits[-1])]
        )

    def centred(self, logits: Tensor) -> np.ndarray:
        """The logit targets, minus the mean of the unembedding's output `[V]` at the last position, float64."""
        wide = logits.double().numpy(force=True)
        return (wide - wide.mean())[self.edges.nodes.index[self.edges.nodes.of(NodeKind.LOGIT)]]

    @cached_property
    def sources(self) -> np.ndarray:
        """A sample of feature nodes that includes some at the first position."""
        nodes, rng = self.feature_nodes, generator(self.limits.seed, "sources")
        first = nodes[self.edges.nodes.position[nodes] == 0]
        chosen = [_sample(rng, nodes, self.limits.sources), _sample(rng, first, 1 + self.limits.sources // 4)]
        return np.unique(np.concatenate(chosen))

    @cached_property
    def own_logits(self) -> Tensor:
        """The Hugging Face model's logits `[T, V]`, from a separate forward without any hook."""
        with torch.no_grad():
            return self.scope.vlm.model(**self.inputs.tensors).logits[0]

    @cached_property
    def own_unembedded(self) -> Tensor:
        """The output of the Hugging Face model's unembedding `[T, V]`: its logits, unless it caps them."""
        if self.replacement.logit_softcap is None:
            return self.own_logits
        outputs: list[Tensor] = []
        head = self.scope.adapter.lm_head()
        handle = head.register_forward_hook(lambda _module, _args, output: outputs.append(output[0]))
        try:
            with torch.no_grad():
                self.scope.vlm.model(**self.inputs.tensors)
        finally:
            handle.remove()
        return outputs[0]

    @cached_property
    def own_pre_activations(self) -> np.ndarray:
        """Pre-activations `[n]` float64 of the active features at the Hugging Face model's MLP inputs."""
        table, tower = self.replacement.feature_activations, self.replacement.tower
        # First number, first position, transcoders and layers of each site.
        sites: list[tuple[int, int, TranscoderSet, Stack]] = [(0, 0, self.scope.transcoders, self.scope.adapter)]
        if tower is not None:
            sites.append((TOWER, tower.first_position, tower.transcoders, tower.stack))
        out = np.empty(len(table))
        for first, before, transcoders, stack in sites:
            for layer, (inputs, _) in capture_mlp(stack, self.inputs.tensors).items():
                mine, x = np.flatnonzero(table.layer == first + layer), inputs.flatten(0, 1)
                index = torch.from_numpy(table.index[mine]).to(x.device)
                position = torch.from_numpy(table.position[mine] - before).to(x.device)
                out[mine] = _pre_activations(transcoders[layer], x[position], index)
        return out


@torch.no_grad()
def _pre_activations(transcoder: Transcoder, x: Tensor, index: Tensor) -> np.ndarray:
    """Pre-activations `[n]` float64 of features `[n]` at inputs `[n, d]`."""
    pre = (x.double() * transcoder.W_enc[index].double()).sum(-1)
    return (pre + transcoder.b_enc[index].double()).numpy(force=True)


def make_subject(
    scope: Scope,
    inputs: ModelInputs,
    other: ModelInputs | None = None,
    limits: Limits | None = None,
    dtype: torch.dtype | None = None,
) -> Subject:
    """Freeze the model at a prompt and compute its edges; in float64 call it, and the checks, under `exact_float64`.

    `other` is the prompt with other pictures, `dtype` that of the replacement model, by default the model's own.
    """
    limits = limits or Limits()
    replacement = build_replacement(scope, inputs, dtype)
    return Subject(scope, inputs, replacement, find_edges(replacement, limits), limits, other)


def find_edges(replacement: ReplacementModel, limits: Limits) -> Edges:
    """Rows of edges of all features, or of a sample of `limits.targets`, as `vlmscope.attribution` makes them."""
    dtype = "float64" if replacement.errors.dtype == torch.float64 else "float32"
    logits = choose_logits(replacement, 1.0, limits.logits)
    adjoint = Adjoint(replacement)
    every = np.arange(len(replacement.feature_activations))
    chosen = np.sort(_sample(generator(limits.seed, "targets"), every, limits.targets))
    chunks = list(feature_chunks(adjoint, chosen, limits.batch_size, dtype))
    return assemble(replacement, adjoint.columns, chunks, target_chunk(adjoint, logits, dtype), logits, dtype)


def _sample(rng: np.random.Generator, values: np.ndarray, count: int) -> np.ndarray:
    return values if len(values) <= count else rng.choice(values, count, replace=False)


class Skipped(Exception):
    """Raised by a check that does not apply; its text says why."""


@dataclass(frozen=True)
class Check:
    """The outcome of one identity."""

    name: str  # short name, as in the table and in `metrics.json`
    claim: str  # the identity, in one line
    error: float | None  # the largest error (for `at_least`, the effect measured); None when skipped
    tolerance: float  # what the error may not exceed (for `at_least`, must exceed)
    seconds: float  # time taken
    at_least: bool = False  # whether `error` must lie above `tolerance` instead of below
    reason: str = ""  # why it was skipped, "" when it was not

    @property
    def skipped(self) -> bool:
        """Whether nothing was measured."""
        return self.error is None

    @property
    def held(self) -> bool:
        """Whether it was measured and holds; NaN never does."""
        if self.error is None:
            return False
        return self.error > self.tolerance if self.at_least else self.error <= self.tolerance

    @property
    def failed(self) -> bool:
        """Whether it was measured and does not hold."""
        return not self.skipped and not self.held


def check(
    claim: str, tolerance: float = TOLERANCE, *, at_least: bool = False
) -> Callable[[Callable[..., float]], Callable[..., Check]]:
    """Turn a function that measures an error, or raises `Skipped`, into one that returns a `Check` of its name."""

    def decorate(measure: Callable[..., float]) -> Callable[..., Check]:
        @wraps(measure)
        def run(*args: object, **kwargs: object) -> Check:
            start = time.perf_counter()
            error, reason = None, ""
            try:
                error = float(measure(*args, **kwargs))
            except Skipped as skipped:
                reason = str(skipped)
            return Check(measure.__name__, claim, error, tolerance, time.perf_counter() - start, at_least, reason)

        return run

    return decorate


def _worse(first: float, second: float) -> float:
    """The larger number, NaN when either is NaN, which `max` may drop."""
    return float(np.maximum(first, second))


# The attribution graph


@check("the replayed replacement model is the Hugging Face model")
def parity(subject: Subject) -> float:
    """Replay against plain Hugging Face forwards, relative to the largest logit and pre-activation."""
    replay, pre = subject.replacement.replay(), subject.own_pre_activations
    worst = np.abs(replay.pre_activation.double().numpy(force=True) - pre).max() / np.abs(pre).max()
    # Before the cap too, which flattens an error of a large logit.
    unembedded = replay.logits.double()
    pairs = ((unembedded, subject.own_unembedded), (subject.replacement.capped(unembedded), subject.own_logits))
    for replayed, plain in pairs:
        worst = _worse(worst, float((replayed - plain.double()).abs().max() / plain.double().abs().max()))
    return worst


@check("edges into a feature or logit sum to the model's own number")
def completeness(subject: Subject) -> float:
    """Row sums, bias nodes included, against pre-activations and centred logits of Hugging Face's own forwards."""
    pre_activations = subject.own_pre_activations[subject.table_rows]
    numbers = np.concatenate([pre_activations, subject.centred(subject.own_unembedded[-1])])
    sums = np.asarray(subject.matrix[subject.rows].sum(1)).ravel()
    stated = subject.edges.nodes.target[subject.rows]
    # Correct sums must not hide wrong targets or residuals in the graph.
    wrong = np.maximum(np.abs(sums - numbers), np.abs(stated - numbers)) / subject.scale
    return float(np.maximum(wrong, subject.edges.residual[subject.rows]).max())


@check("an edge is the direct effect of its source")
def direct_effects(subject: Subject, share: float = 0.7) -> float:
    """Change sampled features by a share of their activation, without response: targets move by that share of the edge.

    In the affine map of changes, and as the difference of two whole replays.
    """
    before, worst = subject.read(subject.replacement.replay(last=True)), 0.0
    for source in subject.sources:
        change = {subject.key(source): share * float(subject.edges.nodes.activation[source])}
        expected = share * subject.column(source)
        moved = subject.read(subject.replacement.direct(change))
        replayed = subject.read(subject.replacement.replay(change, last=True)) - before
        gap = np.maximum(np.abs(moved - expected), np.abs(replayed - expected))
        worst = _worse(worst, (gap / subject.scale).max())
    return worst


@check("total effects are those of (I - J)^-1 J")
def total_effects(subject: Subject, share: float = -0.4) -> float:
    """Change sampled features, all responding linearly, against forward substitution in the graph."""
    features = subject.feature_nodes
    if len(features) < subject.n_active:
        raise Skipped(
            f"it needs all {subject.n_active:,} active features, {len(features):,} have a row: allow more targets"
        )
    jacobian = subject.matrix[subject.rows][:, features].toarray() / subject.edges.nodes.activation[features]
    inner, to_logits = jacobian[: len(features)], jacobian[len(features) :]
    worst = 0.0
    for source in subject.sources:
        amount = share * float(subject.edges.nodes.activation[source])
        delta = np.where(features == source, amount, 0.0)
        # Nodes are in the order of computation, so I - J is lower triangular with a diagonal of ones.
        response = solve_triangular(-inner, inner @ delta, lower=True, unit_diagonal=True, check_finite=False)
        expected = np.concatenate([response, to_logits @ (delta + response)])
        moved = subject.read(subject.replacement.total({subject.key(source): amount}))
        # Total effects sum over paths and may exceed the edge sums; rounding grows with the larger of the two.
        worst = _worse(worst, (np.abs(moved - expected) / np.maximum(subject.scale, np.abs(expected))).max())
    return worst


@check("order and batches of targets change no edge", 1e-12)
def batching(subject: Subject) -> float:
    """Rows of sampled targets one at a time, a few at a time, and shuffled, against all at once."""
    adjoint, rng = Adjoint(subject.replacement), generator(subject.limits.seed, "batching")
    every = np.arange(subject.n_active)
    chosen = np.sort(rng.choice(every, min(_SWEPT_AGAIN, len(every)), replace=False))

    def dense_rows(batch_size: int) -> np.ndarray:
        """Rows `[len(chosen), columns]` float64, swept `batch_size` at a time."""
        out, done = np.zeros((len(chosen), adjoint.columns.total)), 0
        for chunk in feature_chunks(adjoint, chosen, batch_size, "float64"):
            lines = done + np.repeat(np.arange(len(chunk.counts)), chunk.counts)
            out[lines, chunk.indices] = chunk.weights
            done += len(chunk.counts)
        return out

    plain = dense_rows(len(chosen))
    absolute = np.abs(plain).sum(1)
    absolute[absolute == 0] = 1.0
    gaps = [np.abs(dense_rows(size) - plain).sum(1) / absolute for size in (1, 7)]
    first = 0
    for level in adjoint.columns.levels:
        mine = chosen[(chosen >= first) & (chosen < first + level.n_features)] - first
        if not len(mine):  # a small sample may leave a layer out
            first += level.n_features
            continue
        shuffled = rng.permutation(len(mine))
        which = torch.from_numpy(mine).to(adjoint.replacement.errors.device)
        order = torch.from_numpy(shuffled).to(which.device)
        rows = adjoint.feature_rows(level.layer, which[order]) - adjoint.feature_rows(level.layer, which)[order]
        gap = rows.abs().sum(1).double().numpy(force=True)
        gaps.append(gap / absolute[np.searchsorted(chosen, mine[shuffled] + first)])
        first += level.n_features
    return float(np.concatenate(gaps).max())


@check("direct edits in Hugging Face's modules = the replacement model")
def direct_mode(subject: Subject) -> float:
    """Random changes of all features of a position, a run per sampled position, relative to the largest change."""
    scope, replacement = subject.scope, subject.replacement
    batch = scope.batch([subject.inputs])
    base = base_run(scope, batch, ["direct"])
    unedited = replacement.replay(last=True).logits[-1].double()
    rng, last = generator(subject.limits.seed, "direct mode"), replacement.n_positions - 1
    others = rng.permutation(last)[: subject.limits.positions - 1]
    gaps, effects = [], []
    for position in [last, *others.tolist()]:
        plan, delta = _random_change(subject, position, rng)
        moved = (run_edited(scope, batch, plan, "direct", base) - base.logits)[0].double()
        change = replacement.direct(delta).logits[-1].double()
        expected = replacement.capped(unedited + change) - replacement.capped(unedited)
        gaps.append(float((moved - expected).abs().max()))
        effects.append(float(expected.abs().max()))
    if max(effects) == 0:
        raise Skipped("no feature of the sampled positions has a direct effect on the logits")
    return float(np.max(gaps) / np.max(effects))


@check("an edge is the sum of its heads, stream and skip paths")
def heads(subject: Subject) -> float:
    """Sampled rows and sources of every kind, those without an edge too, against the edges of the graph."""
    nodes, limits, rng = subject.edges.nodes, subject.limits, generator(subject.limits.seed, "heads")
    above = np.flatnonzero(nodes.layer[subject.feature_nodes] >= 0)  # the tower's own heads are not split
    features = _sample(rng, above, limits.sources)
    rows = np.concatenate([np.sort(features), np.arange(len(subject.feature_nodes), len(subject.rows))])
    sources = np.unique(np.concatenate([_sample(rng, nodes.of(kind), limits.sources) for kind in _SOURCES]))
    row, source = (axis.ravel() for axis in np.meshgrid(rows, sources, indexing="ij"))
    targets = choose_logits(subject.replacement, 1.0, limits.logits)
    splitter = HeadSplitter(subject.replacement, nodes, targets)
    parts = splitter.split(source, subject.rows[row], limits.batch_size)
    edges = subject.matrix[subject.rows[rows]][:, sources].toarray().ravel()
    gap = np.abs(parts.stream + parts.skip + parts.heads.sum((1, 2), dtype=np.float64) - edges)
    return float((gap / subject.scale[row]).max())


@check("a head's score is the sum of its pairs of sources")
def scores(subject: Subject, count: int = 4) -> float:
    """Scores of the model itself, of sampled heads and queries at a key that the query sees, against all pairs."""
    replacement, rng, adjoint = (
        subject.replacement,
        generator(subject.limits.seed, "scores"),
        Adjoint(subject.replacement),
    )
    patterns, worst = replacement.state.patterns, 0.0
    for layer in np.linspace(0, replacement.n_layers - 1, count).astype(int).tolist():
        head, query = int(rng.integers(patterns[layer].n_heads)), int(rng.integers(replacement.n_positions))
        seen = torch.nonzero(patterns[layer].row(head, query))[:, 0].tolist()
        place = Place(layer, head, query, int(rng.choice(seen)))
        found = query_keys(
            score_parts(subject.scope.adapter, replacement, adjoint, place), replacement, adjoint.columns, 1
        )
        worst = _worse(worst, abs(found.total - found.score) / (found.sizes or 1.0))
    return worst


def _random_change(
    subject: Subject, position: int, rng: np.random.Generator
) -> tuple[dict[int, LayerEdit], dict[FeatureKey, float]]:
    """Every active feature at a position times a random factor from 0 to 2, as an edit plan and as changes."""
    plan: dict[int, LayerEdit] = {}
    delta: dict[FeatureKey, float] = {}
    where = torch.zeros(subject.replacement.n_positions, dtype=torch.bool)
    where[position] = True
    for layer, features in enumerate(subject.replacement.features):
        span = slice(features.offsets[position], features.offsets[position + 1])
        index, activation = features.index[span], features.activation[span]
        if not len(index):
            continue
        share = torch.from_numpy(rng.uniform(-1, 1, len(index))).to(activation)
        scale = (1 + share).to(subject.scope.transcoders[layer].W_dec.dtype)
        plan[layer] = LayerEdit(index, torch.zeros_like(scale), scale, where)
        for feature, amount in zip(index.tolist(), (share * activation).tolist(), strict=True):
            delta[layer, position, feature] = amount
    return plan, delta


# The model, and what acts on it


@check("another picture moves the logits", 1e-6, at_least=True)
def soft_tokens(subject: Subject) -> float:
    """The change of the last logits, relative to the largest: identities say nothing if pictures have no effect."""
    if subject.other is None:
        raise Skipped("no picture in the prompt")
    with torch.no_grad():
        changed = subject.scope.vlm.model(**subject.other.tensors).logits[0, -1]
    logits = subject.own_logits[-1]
    return float((changed - logits).abs().max() / logits.abs().max())


@check("cached under an edit of nothing = plain without a cache")
def generation(subject: Subject) -> float:
    """Logits of every generated token, relative to the largest; equal tokens say little of a model that repeats one."""
    adapter, transcoders, count = subject.scope.adapter, subject.scope.transcoders, subject.limits.new_tokens
    where = torch.ones(len(subject.inputs), dtype=torch.bool)
    soft, plan = adapter.soft_token_id(), {}
    for layer in transcoders.layers:
        features = torch.arange(transcoders[layer].config.n_features, device=adapter.device)
        nothing = torch.zeros(len(features), dtype=adapter.dtype, device=adapter.device)
        plan[layer] = LayerEdit(features, nothing, torch.ones_like(nothing), where, nothing)

    @torch.no_grad()
    def answer_logits(use_cache: bool) -> Tensor:
        """Logits of each token of the greedy answer, `[new_tokens, V]`; an end token does not stop it."""
        answer = subject.scope.vlm.model.generate(
            **subject.inputs.tensors,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            # A random model may answer with a soft token, for which the next step would expect a picture.
            suppress_tokens=None if soft is None else [soft],
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return torch.cat(answer.logits)

    with editing(subject.scope, plan):
        cached = answer_logits(use_cache=True)
    plain = answer_logits(use_cache=False)
    return float((cached - plain).abs().max() / plain.abs().max())


@check("every weight is finite, no matrix is all zero", 0.0)
def weights(subject: Subject) -> float:
    """The number of parameters that break this; vectors may be zero: an unused bias, a centred norm."""
    sets = [one for one in (subject.scope.transcoders, subject.scope.tower) if one is not None]
    parameters = [*subject.scope.vlm.model.parameters(), *(p for one in sets for p in one.parameters())]
    return float(sum(not bool(torch.isfinite(p).all()) or (p.ndim > 1 and not bool(p.any())) for p in parameters))


IDENTITIES = (parity, completeness, direct_effects, total_effects, batching, heads, scores, direct_mode)
BEHAVIOUR = (soft_tokens, generation, weights)


# All checks on one model


@dataclass(frozen=True)
class CaseReport:
    """The outcome of all checks at one prompt."""

    case: str  # one of `CASES`
    n_tokens: int  # T, 0 when the model refuses the number of pictures
    n_features: int  # active features
    exact: tuple[Check, ...]  # every check in float64
    # Identity -> error with the forward in the model's dtype and the graph in float32, for information; empty for a
    # float64 model, without identities that were skipped.
    own: dict[str, float]
    seconds: float = 0.0  # time taken, with that of the edges
    reason: str = ""  # why the case was left out, "" when it was not


def in_float64(scope: Scope) -> Scope:
    """Copies of model and transcoders in float64."""
    if is_offloaded(scope.vlm.model):
        raise UserError(
            f"{scope.vlm.name} is offloaded, and the checks copy its weights to float64; use model.offload=none"
        )
    model = copy.deepcopy(scope.vlm.model).double()
    vlm = replace(scope.vlm, model=model, adapter=adapter_for(model))
    tower = None if scope.tower is None else copy.deepcopy(scope.tower).double()
    return Scope(vlm, copy.deepcopy(scope.transcoders).double(), tower=tower)


def own_dtype_errors(
    scope: Scope, inputs: ModelInputs, limits: Limits, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Identity -> error as in `task=trace`: the forward in the model's dtype, the graph in `dtype`.

    Skipped identities are left out.
    """
    subject = make_subject(scope, inputs, None, limits, dtype)
    outcomes = (identity(subject) for identity in IDENTITIES)
    return {outcome.name: outcome.error for outcome in outcomes if outcome.error is not None}


def noise_picture(seed: int) -> Image.Image:
    """A random RGB picture; the identities hold for any."""
    return Image.fromarray(generator(seed, "noise picture").integers(0, 256, (64, 64, 3), dtype=np.uint8))


def run_cases(
    scope: Scope, prompt: str = PROMPT, pictures: Sequence[Image.Image] = (), limits: Limits | None = None
) -> Iterator[CaseReport]:
    """Check a model on text alone and, where it takes pictures, with one and two; random pictures fill up."""
    limits = limits or Limits()
    images = [*pictures, *(noise_picture(number) for number in range(2))][:2]
    others = [noise_picture(number) for number in (2, 3)]
    with exact_float64():
        wide = in_float64(scope)
    refused = 0
    for count, case in enumerate(CASES):
        start = time.perf_counter()
        try:
            own_inputs = scope.vlm.prepare(prompt, images[:count])
        except UserError as error:
            refused += 1
            if refused == len(CASES):
                raise
            yield CaseReport(case, 0, 0, (), {}, reason=str(error))
            continue
        with exact_float64():
            inputs = wide.vlm.prepare(prompt, images[:count])
            other = wide.vlm.prepare(prompt, others[:count]) if count else None
            subject = make_subject(wide, inputs, other, limits)
            exact = tuple(measure(subject) for measure in (*IDENTITIES, *BEHAVIOUR))
        own = own_dtype_errors(scope, own_inputs, limits) if scope.adapter.dtype != torch.float64 else {}
        yield CaseReport(case, len(inputs), subject.n_active, exact, own, time.perf_counter() - start)
