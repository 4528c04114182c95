"""The identities of the attribution graph, each as the largest error found.

Errors of targets are relative to the sum of |incoming edges|, which is what rounding scales with.
"""

import numpy as np
import torch
from scipy.linalg import solve_triangular

from vlmscope.attribution.adjoint import Adjoint
from vlmscope.attribution.rows import feature_chunks
from vlmscope.conformance.record import Skipped, check
from vlmscope.conformance.subject import Subject
from vlmscope.core.seeds import generator

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
