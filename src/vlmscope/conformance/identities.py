"""The identities of docs/maths.md as checks.

One identity, checked: what it says, how far it was off, whether that is within its tolerance, and the time taken.

The identities of the attribution graph, each as the largest error found.

Errors of targets are relative to the sum of |incoming edges|, which is what rounding scales with.

Checks of the model and of what acts on it: that pictures matter, that weights are there, that edits and cached
generation in Hugging Face's own modules do what the replacement model says.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from scipy.linalg import solve_triangular
from torch import Tensor

from vlmscope.attribution.adjoint import Adjoint
from vlmscope.attribution.edges import feature_chunks
from vlmscope.conformance.subject import FeatureKey, Subject
from vlmscope.core.records import generator
from vlmscope.interventions.edits import LayerEdit
from vlmscope.interventions.run import base_run, editing, run_edited

TOLERANCE = 1e-9  # of the sum of |incoming edges|, in float64 under `exact_float64`

_Subject = TypeVar("_Subject")
_Args = ParamSpec("_Args")


class Skipped(Exception):
    """Raised by a check that has nothing to look at here; its text says why."""


@dataclass(frozen=True)
class Check:
    """The outcome of one identity.

    Attributes:
        name: short name, as in the table and in `metrics.json`.
        claim: what it says, in one line.
        error: the largest error found (for `at_least`, the effect measured); None when skipped.
        tolerance: what the error may not exceed (for `at_least`, must exceed).
        seconds: time taken.
        at_least: whether `error` must lie above `tolerance` instead of below.
        reason: why it was skipped, "" when it was not.
    """

    name: str
    claim: str
    error: float | None
    tolerance: float
    seconds: float
    at_least: bool = False
    reason: str = ""

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
    name: str, claim: str, tolerance: float = TOLERANCE, *, at_least: bool = False
) -> Callable[[Callable[Concatenate[_Subject, _Args], float]], Callable[Concatenate[_Subject, _Args], Check]]:
    """Turn a function that measures an error, or raises `Skipped`, into one that returns a `Check`.

    Args:
        name: see `Check`.
        claim: see `Check`.
        tolerance: see `Check`.
        at_least: see `Check`.
    """

    def decorate(
        measure: Callable[Concatenate[_Subject, _Args], float],
    ) -> Callable[Concatenate[_Subject, _Args], Check]:
        @wraps(measure)
        def run(subject: _Subject, *args: _Args.args, **kwargs: _Args.kwargs) -> Check:
            start = time.perf_counter()
            error, reason = None, ""
            try:
                error = float(measure(subject, *args, **kwargs))
            except Skipped as skipped:
                reason = str(skipped)
            return Check(name, claim, error, tolerance, time.perf_counter() - start, at_least, reason)

        return run

    return decorate


_SWEPT_AGAIN = 48  # targets whose rows are computed once more, in other batches and orders


@check("parity", "the replayed replacement model is the Hugging Face model")
def parity(subject: Subject) -> float:
    """Replay against plain Hugging Face forwards; relative to the largest logit and pre-activation."""
    replay, pre = subject.replacement.replay(), subject.own_pre_activations
    worst = np.abs(replay.pre_activation.double().numpy(force=True) - pre).max() / np.abs(pre).max()
    # Before the cap too, where there is one: it would flatten an error of a large logit.
    unembedded = replay.logits.double()
    pairs = ((unembedded, subject.own_unembedded), (subject.replacement.capped(unembedded), subject.own_logits))
    for replayed, own in pairs:
        worst = _worse(worst, float((replayed - own.double()).abs().max() / own.double().abs().max()))
    return worst


@check("completeness", "edges into a feature or logit sum to the model's own number")
def completeness(subject: Subject) -> float:
    """Row sums, bias nodes included, against pre-activations and centred logits of Hugging Face's own forwards."""
    own = np.concatenate([subject.own_pre_activations[subject.table_rows], subject.centred(subject.own_unembedded[-1])])
    sums = np.asarray(subject.matrix[subject.rows].sum(1)).ravel()
    stated = subject.edges.nodes.target[subject.rows]
    # What the graph states as its targets, and as its residual, must not hide behind what the edges sum to.
    wrong = np.maximum(np.abs(sums - own), np.abs(stated - own)) / subject.scale
    return float(np.maximum(wrong, subject.edges.residual[subject.rows]).max())


@check("direct_effects", "an edge is the direct effect of its source")
def direct_effects(subject: Subject, share: float = 0.7) -> float:
    """Change sampled features by a share of their activation, nothing else responding: targets move by that share of
    the edge, in the affine map of changes and as the difference of two whole replays.
    """
    before, worst = subject.read(subject.replacement.replay()), 0.0
    for source in subject.sources:
        change = {subject.key(source): share * float(subject.edges.nodes.activation[source])}
        expected = share * subject.column(source)
        moved = subject.read(subject.replacement.direct(change))
        replayed = subject.read(subject.replacement.replay(change)) - before
        gap = np.maximum(np.abs(moved - expected), np.abs(replayed - expected))
        worst = _worse(worst, (gap / subject.scale).max())
    return worst


@check("total_effects", "total effects are those of (I - J)^-1 J")
def total_effects(subject: Subject, share: float = -0.4) -> float:
    """Change sampled features, all features responding linearly, against forward substitution in the graph."""
    features = subject.feature_nodes
    if len(features) < subject.n_active:
        raise Skipped(
            f"it needs all {subject.n_active:,} active features, {len(features):,} have a row: allow more targets"
        )
    jacobian = subject.matrix[subject.rows][:, features].toarray() / subject.edges.nodes.activation[features]
    inner = jacobian[: len(features)]
    system = -inner
    worst = 0.0
    for source in subject.sources:
        amount = share * float(subject.edges.nodes.activation[source])
        delta = np.where(features == source, amount, 0.0)
        # Nodes are in the order of computation, so I - J is lower triangular with a diagonal of ones.
        response = solve_triangular(system, inner @ delta, lower=True, unit_diagonal=True, check_finite=False)
        expected = np.concatenate([response, jacobian[len(features) :] @ (delta + response)])
        moved = subject.read(subject.replacement.total({subject.key(source): amount}))
        # Total effects add up over paths, so their rounding is measured against the larger of edge sums and effect.
        worst = _worse(worst, (np.abs(moved - expected) / np.maximum(subject.scale, np.abs(expected))).max())
    return worst


@check("batching", "order and batches of targets change no edge", 1e-12)
def batching(subject: Subject) -> float:
    """Rows of sampled targets one at a time, a few at a time, and shuffled, against all at once."""
    adjoint, rng = Adjoint(subject.replacement), generator(subject.limits.seed, "batching")
    every = np.arange(subject.n_active)
    chosen = np.sort(rng.choice(every, min(_SWEPT_AGAIN, len(every)), replace=False))
    plain = _dense_rows(adjoint, chosen, len(chosen))
    absolute = np.abs(plain).sum(1)
    absolute[absolute == 0] = 1.0
    gaps = [np.abs(_dense_rows(adjoint, chosen, size) - plain).sum(1) / absolute for size in (1, 7)]
    first = np.concatenate([[0], np.cumsum(adjoint.columns.n_features)])
    for layer in range(adjoint.columns.n_layers):
        mine = chosen[(chosen >= first[layer]) & (chosen < first[layer + 1])] - first[layer]
        shuffled = rng.permutation(len(mine))
        which = torch.from_numpy(mine).to(subject.replacement.errors.device)
        straight = adjoint.feature_rows(layer, which)
        mixed = adjoint.feature_rows(layer, which[torch.from_numpy(shuffled).to(which.device)])
        gap = (mixed - straight[torch.from_numpy(shuffled).to(which.device)]).abs().sum(1).double().numpy(force=True)
        gaps.append(gap / absolute[np.searchsorted(chosen, mine[shuffled] + first[layer])])
    return float(np.concatenate(gaps).max())


def _dense_rows(adjoint: Adjoint, targets: np.ndarray, batch_size: int) -> np.ndarray:
    """Rows `[len(targets), columns]` float64, swept `batch_size` at a time."""
    out, at = np.zeros((len(targets), adjoint.columns.total)), 0
    for chunk in feature_chunks(adjoint, targets, batch_size, "float64"):
        lines = at + np.repeat(np.arange(len(chunk.counts)), chunk.counts)
        out[lines, chunk.indices] = chunk.weights
        at += len(chunk.counts)
    return out


def _worse(one: float, other: float) -> float:
    """The larger, and NaN when either is: a comparison would let NaN pass."""
    return float(np.maximum(one, other))


@check("soft_tokens", "another picture moves the logits", 1e-6, at_least=True)
def soft_tokens(subject: Subject) -> float:
    """The change of the last logits, relative to the largest: an identity would hold idly if pictures did nothing."""
    if subject.other is None:
        raise Skipped("no picture in the prompt")
    with torch.no_grad():
        other = subject.scope.vlm.model(**subject.other.tensors).logits[0, -1]
    own = subject.own_logits[-1]
    return float((other - own).abs().max() / own.abs().max())


@check("weights", "every weight is finite, no matrix is all zero", 0.0)
def weights(subject: Subject) -> float:
    """How many parameters of model and transcoders break this. A vector may be zero: an unused bias, a centred norm."""
    named = [*subject.scope.vlm.model.named_parameters(), *subject.scope.transcoders.named_parameters()]
    bad = [
        name
        for name, parameter in named
        if not bool(torch.isfinite(parameter).all()) or (parameter.ndim > 1 and not bool(parameter.any()))
    ]
    return float(len(bad))


@check("direct_mode", "direct edits in Hugging Face's modules = the replacement model")
def direct_mode(subject: Subject) -> float:
    """Random changes of all features of sampled positions, each position a run; relative to the largest change."""
    scope = subject.scope
    batch = scope.batch([subject.inputs])
    base = base_run(scope, batch, ["direct"])
    replacement = subject.replacement
    unedited = replacement.replay().logits[-1].double()
    rng, last = generator(subject.limits.seed, "direct mode"), subject.replacement.n_positions - 1
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


def _random_change(
    subject: Subject, position: int, rng: np.random.Generator
) -> tuple[dict[int, LayerEdit], dict[FeatureKey, float]]:
    """Every active feature at a position times a factor of its own between 0 and 2, for either implementation."""
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


@check("generation", "cached under an edit of nothing = plain without a cache")
def generation(subject: Subject) -> float:
    """Logits of every generated token, relative to the largest: equal tokens alone would say little, since a model may
    repeat one word whatever is done to it.
    """
    adapter, transcoders = subject.scope.adapter, subject.scope.transcoders
    where = torch.ones(len(subject.inputs), dtype=torch.bool)
    plan = {}
    for layer in transcoders.layers:
        features = torch.arange(transcoders[layer].config.n_features, device=adapter.device)
        nothing = torch.zeros(len(features), dtype=adapter.dtype, device=adapter.device)
        plan[layer] = LayerEdit(features, nothing, torch.ones_like(nothing), where, nothing)
    with editing(subject.scope, plan):
        cached = _answer_logits(subject, use_cache=True)
    plain = _answer_logits(subject, use_cache=False)
    return float((cached - plain).abs().max() / plain.abs().max())


@torch.no_grad()
def _answer_logits(subject: Subject, *, use_cache: bool) -> Tensor:
    """`[new_tokens, V]`, what each token of the greedy answer was chosen by; an end token does not end it."""
    count = subject.limits.new_tokens
    soft = subject.scope.adapter.soft_token_id()
    answer = subject.scope.vlm.model.generate(
        **subject.inputs.tensors,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        # A random model may answer with a soft token, which the next step would take for a picture that was not given.
        suppress_tokens=None if soft is None else [soft],
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.cat(answer.logits)
