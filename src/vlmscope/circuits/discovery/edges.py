"""Edges between nodes in the frozen local replacement model: EAP-IG scores, and circuits of edges run exactly.

At a pair's original the replacement model is affine. With a, a' the values of a source s in the two runs, `J_ts` the
direct effect of s on the pre-activation of t with patterns and norm scales of the original, and `D_s = a_s - a'_s`,

    D_t = sum over s of J_ts D_s + rest_t

`rest_t` is what edges do not carry: the change of patterns, norm scales and supports between the two runs. It is an
edge of its own, from "rest" into t, so that nothing is hidden. EAP-IG's score of an edge (Hanna et al., arXiv
2403.17806) is `J_ts D_s dm/dt`, with the gradient of m averaged over inputs between the sides in the real model; the
scores of the edges into t add up to the score of t as a node.

*Running a circuit E of edges.* A target receives the clean value of a source along an edge in E and the corrupt one
along any other; a source that is a target itself has the value that its own edges in E give it:

    d_t = sum over s with (s, t) in E of J_ts d_s + [(rest, t) in E] rest_t,   m(E) = m(corrupt) + d_answer

with d_s = D_s for embeddings, errors and features that are no targets (their values are given). The empty circuit is
the counterfactual's run and the full one the original's, both exactly; between them the model is linear.

Legend: n instances of candidate features at positions, S source groups, K circuits.
`pair_edges.py` finds the edges of a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

REST = -2  # the source of what edges do not carry
OTHER = -3  # features that are no targets: OTHER - (layer R + role)


@dataclass(frozen=True)
class PairEdges:
    """All edges of one pair. Instances are ordered by layer, so that sources come before targets.

    Attributes:
        node: [n] int64, the node of each instance.
        change: [n], D of it.
        slope: [n], mean dm/dt of it; 1 for the answer, which is the last instance, with node `ANSWER`.
        sources: [S] int64, source groups whose values are given: nodes, `OTHER` groups, and last `REST`.
        given: [n, S], J D summed over the group's members; in the last column the rest.
        inner: [n, n], J_ts D_s between instances, strictly lower triangular.
        corrupt: m of the counterfactual's run, before a cap of the logits.
        clean: m of the original's run.
    """

    node: np.ndarray
    change: np.ndarray
    slope: np.ndarray
    sources: np.ndarray
    given: np.ndarray
    inner: np.ndarray
    corrupt: float
    clean: float


@dataclass(frozen=True)
class EdgeTable:
    """E edges between nodes, over all pairs.

    Attributes:
        source: [E] int64, node numbers, `REST`, or `OTHER` groups.
        target: [E] int64, node numbers or `ANSWER`.
        score: [B, E] float64, EAP-IG's score on each pair.
    """

    source: np.ndarray
    target: np.ndarray
    score: np.ndarray

    def __len__(self) -> int:
        return len(self.source)


def edge_table(pairs: Sequence[PairEdges]) -> EdgeTable:
    """All edges that any pair has, with their scores."""
    tables = [_scores(pair) for pair in pairs]
    keys = sorted({key for table in tables for key in table})
    place = {key: number for number, key in enumerate(keys)}
    score = np.zeros((len(tables), len(keys)))
    for row, table in enumerate(tables):
        score[row, [place[key] for key in table]] = list(table.values())
    source, target = np.array(keys, dtype=np.int64).reshape(-1, 2).T
    return EdgeTable(source, target, score)


def run_edges(pairs: Sequence[PairEdges], circuits: Sequence[set[tuple[int, int]] | None]) -> np.ndarray:
    """m [K, B] of circuits of edges, sets of (source, target); None keeps every edge, also those of no table."""
    return np.stack([_run(pair, circuits) for pair in pairs], axis=1)


def _run(pair: PairEdges, circuits: Sequence[set[tuple[int, int]] | None]) -> np.ndarray:
    """m [K]: instances in order, each from what was found for those before it."""
    sources = np.concatenate([pair.sources, pair.node])
    out = np.empty(len(circuits))
    names, of_node = np.unique(pair.node, return_inverse=True)
    heads, of_source = np.unique(sources, return_inverse=True)
    for place, edges in enumerate(circuits):
        keep = np.full((len(names), len(heads)), edges is None)
        if edges:
            pairs = np.array(sorted(edges), dtype=np.int64)
            known = np.isin(pairs[:, 0], heads) & np.isin(pairs[:, 1], names)
            pairs = pairs[known]
            keep[np.searchsorted(names, pairs[:, 1]), np.searchsorted(heads, pairs[:, 0])] = True
        mask = keep[of_node][:, of_source]
        n_given = len(pair.sources)
        reached = (pair.given * mask[:, :n_given]).sum(1)
        inner = pair.inner * mask[:, n_given:]
        # r = d / D of each instance, by forward substitution: d = given + inner r.
        share = np.zeros(len(pair.node))
        for i in range(len(share)):
            share[i] = (reached[i] + inner[i, :i] @ share[:i]) / pair.change[i]
        out[place] = pair.corrupt + share[-1] * pair.change[-1]
    return out


def _scores(pair: PairEdges) -> dict[tuple[int, int], float]:
    table: dict[tuple[int, int], float] = {}
    for sources, weights in ((pair.sources, pair.given), (pair.node, pair.inner)):
        rows, columns = np.nonzero(weights)
        values = weights[rows, columns] * pair.slope[rows]
        for source, target, value in zip(
            sources[columns].tolist(), pair.node[rows].tolist(), values.tolist(), strict=True
        ):
            table[source, target] = table.get((source, target), 0.0) + value
    return table
