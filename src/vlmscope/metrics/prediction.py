"""How well some numbers predict others: agreement, rankings, maps, faithfulness, areas. Pure functions of arrays.

*Faithfulness* over the size of a circuit, and its areas CPR and CMD (MIB, arXiv 2504.13151), with m the mean logit
difference over pairs:

    f(k) = (m(circuit of share k) - m(corrupt)) / (m(clean) - m(corrupt))
    CPR = integral of f(k) dk,   CMD = integral of |1 - f(k)| dk

*Integration rule*, that of MIB's published evaluation: the trapezoid rule over the shares 0.001, 0.002, 0.005, 0.01,
0.02, 0.05, 0.1, 0.2, 0.5 and 1 on a linear axis, without the part below 0.001. So CPR is 0.999 and CMD 0 for a circuit
method that is faithful at every size; f may leave [0, 1]. A circuit of share k of N things has floor(k N) of them.

*Area under the ROC curve*: the share of pairs (a wrong case, a right one) in which the wrong one scores higher, ties
counting half (Hanley and McNeil 1982); with strata [n] only pairs within one stratum count.

Legend: K sizes, B pairs, n cases, k numbers per case.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from scipy.stats import rankdata

from vlmscope.core.records import generator
from vlmscope.core.results import Rate
from vlmscope.metrics.rates import RESAMPLES

AGREEMENT_RESAMPLES = 400
SHUFFLES = 50


@dataclass(frozen=True)
class Agreement:
    """Predicted x against measured y over n cases, each number with its bootstrap 95 % interval.

    Attributes:
        pearson, spearman: correlations; `control` is the mean absolute correlation after shuffling x within groups.
        slope: of the line through the origin, sum x y / sum x x; 1 where predictions have the right size.
        same_sign: the share of cases with x != 0 where y has the sign of x.
        error: sum |y - x| / sum |x|, 0 where predictions are exact.
    """

    pearson: Rate
    spearman: Rate
    slope: Rate
    same_sign: Rate
    error: Rate


def agreement(
    predicted: np.ndarray, measured: np.ndarray, groups: Sequence[str] | np.ndarray, seed: int = 0
) -> Agreement:
    """Compare [n] predictions with [n] measurements; whole `groups` [n] are drawn for the intervals.

    A correlation with something constant is 0.
    """
    x, y = np.asarray(predicted, np.float64), np.asarray(measured, np.float64)
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    assert x.size >= 3 and len(names) >= 2, f"an interval needs 3 cases of 2 groups, not {x.size} of {len(names)}"
    members = [np.flatnonzero(group == g) for g in range(len(names))]
    drawn = generator(seed, "agreement")
    resampled = []
    for _ in range(AGREEMENT_RESAMPLES):
        rows = np.concatenate([members[g] for g in drawn.integers(0, len(names), len(names))])
        resampled.append(_numbers(x[rows], y[rows]))
    low, high = np.quantile(np.array(resampled), (0.025, 0.975), axis=0)
    shuffled = []
    for _ in range(SHUFFLES):
        mixed = x.copy()
        for rows in members:
            mixed[rows] = x[drawn.permutation(rows)]
        shuffled.append([abs(pearson(mixed, y)), abs(np.nan_to_num(spearman(mixed, y)))])
    controls = [*np.mean(shuffled, 0).tolist(), None, None, None]
    values = _numbers(x, y)
    return Agreement(*(Rate(values[i], float(low[i]), float(high[i]), x.size, controls[i]) for i in range(len(values))))


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation of [n] and [n]; 0 where either is constant."""
    a, b = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 else 0.0


def _numbers(x: np.ndarray, y: np.ndarray) -> list[float]:
    square, size, signed = float(x @ x), float(np.abs(x).sum()), x != 0
    return [
        pearson(x, y),
        float(np.nan_to_num(spearman(x, y))),
        float(x @ y) / square if square > 0 else 0.0,
        float((np.sign(x) == np.sign(y))[signed].mean()) if signed.any() else 0.0,
        float(np.abs(y - x).sum()) / size if size > 0 else 0.0,
    ]


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation of two lists of scores [N], tied ones at their mean rank; NaN where one of them is constant."""
    ranks = [rankdata(values) - (len(values) + 1) / 2 for values in (first, second)]
    spread = np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float((ranks[0] * ranks[1]).sum() / spread) if spread > 0 else float("nan")


def prior(answers: Sequence[str]) -> float:
    """The share of the most frequent right answer: the accuracy of always giving it, whatever the input."""
    return max(Counter(answers).values()) / len(answers)


def jaccard(first: Collection, second: Collection) -> float:
    """|A and B| / |A or B| of two choices; 1 for two empty ones."""
    a, b = set(first), set(second)
    return len(a & b) / len(a | b) if a | b else 1.0


def mean_jaccard(choices: Sequence[Collection]) -> float:
    """Mean over all pairs of two or more choices."""
    return float(np.mean([jaccard(a, b) for a, b in combinations(choices, 2)]))


def pointing_hit(values: np.ndarray, on_object: np.ndarray) -> float:
    """Whether the largest value lies on the object; where several are largest, the share of them that do.

    Both are of one shape; a random cell would hit as often as the mean of `on_object`.
    """
    flat = np.asarray(values, float).ravel()
    scale = np.abs(flat).max(initial=0.0) or 1.0
    largest = flat >= flat.max() - 1e-9 * scale
    return float(np.asarray(on_object, bool).ravel()[largest].mean())


def share_on(values: np.ndarray, on_object: np.ndarray) -> np.ndarray:
    """`[n]`, the share of each map of `values [n, S]` that lies where `on_object [n, S]`; NaN where a map sums to 0."""
    total, hit = values.sum(1), (values * on_object).sum(1)
    return np.divide(hit, total, out=np.full(len(total), np.nan, total.dtype), where=total > 0)


def trapezoid(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The area under curves `y [.., n]` over `x [n]`, ascending: `[..]`."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    return ((y[..., 1:] + y[..., :-1]) / 2 * np.diff(x)).sum(-1)


SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class FaithfulnessCurve:
    """f over size, with 95 % intervals of a bootstrap over pairs.

    Attributes:
        shares: K shares of all things that a circuit may have.
        counts: K numbers of things.
        rates: f at each size.
        cpr: area under f.
        cmd: area between f and 1.
    """

    shares: tuple[float, ...]
    counts: tuple[int, ...]
    rates: tuple[Rate, ...]
    cpr: Rate
    cmd: Rate


def faithfulness(circuit: np.ndarray, clean: np.ndarray, corrupt: np.ndarray, seed: int = 0) -> Rate:
    """f of one circuit from logit differences [B]: a ratio of means over pairs, with its bootstrap 95 % interval."""
    return _rates(np.asarray(circuit)[None], clean, corrupt, seed)[0]


def faithfulness_curve(
    circuits: np.ndarray, clean: np.ndarray, corrupt: np.ndarray, counts: tuple[int, ...], seed: int = 0
) -> FaithfulnessCurve:
    """The curve of circuits of `counts` members at `SHARES` from their logit differences [K, B], and those of clean and
    corrupt runs [B]; the same pairs are drawn for every size.
    """
    rates = _rates(circuits, clean, corrupt, seed)
    drawn = _resampled(circuits, clean, corrupt, seed)
    values = np.array([rate.value for rate in rates])
    areas = []
    for curve, resampled in ((values, drawn), (np.abs(1 - values), np.abs(1 - drawn))):
        low, high = np.quantile(trapezoid(np.array(SHARES), resampled), (0.025, 0.975))
        areas.append(Rate(float(trapezoid(np.array(SHARES), curve)), float(low), float(high), len(clean)))
    return FaithfulnessCurve(SHARES, tuple(counts), rates, *areas)


def sizes(total: int) -> tuple[int, ...]:
    """floor(share x total) of things for each of `SHARES`."""
    # In floating point 0.29 x 100 falls just below 29.
    return tuple(int(share * total + 1e-9) for share in SHARES)


def _rates(circuits: np.ndarray, clean: np.ndarray, corrupt: np.ndarray, seed: int) -> tuple[Rate, ...]:
    circuits, clean, corrupt = (np.asarray(x, float) for x in (circuits, clean, corrupt))
    whole = clean.mean() - corrupt.mean()
    assert abs(whole) > 0, "clean and corrupt runs have the same mean logit difference: there is nothing to recover"
    values = (circuits.mean(-1) - corrupt.mean()) / whole
    low, high = np.quantile(_resampled(circuits, clean, corrupt, seed), (0.025, 0.975), axis=0)
    return tuple(
        Rate(float(value), float(lower), float(upper), clean.size)
        for value, lower, upper in zip(values, low, high, strict=True)
    )


def _resampled(circuits: np.ndarray, clean: np.ndarray, corrupt: np.ndarray, seed: int) -> np.ndarray:
    """f [RESAMPLES, K] under bootstrap resamples of the pairs."""
    rng = generator(seed, "faithfulness")
    # How often each pair is drawn: the resampled means are products with these counts.
    weights = rng.multinomial(clean.size, np.full(clean.size, 1 / clean.size), RESAMPLES) / clean.size
    low = weights @ corrupt
    return (weights @ np.asarray(circuits, float).T - low[:, None]) / (weights @ clean - low)[:, None]


def _parts(strata: np.ndarray | None, n: int) -> Iterator[np.ndarray]:
    """The rows of each stratum; all n without strata."""
    yield from [np.arange(n)] if strata is None else [np.flatnonzero(strata == name) for name in np.unique(strata)]


def auc(scores: np.ndarray, wrong: np.ndarray, strata: np.ndarray | None = None) -> float:
    """Area under the curve of scores [n] for what is `wrong` [n] bool; nan where no pair can be made."""
    won = pairs = 0.0
    for chosen in _parts(strata, len(scores)):
        bad = wrong[chosen]
        n_bad, n_good = int(bad.sum()), int((~bad).sum())
        if n_bad and n_good:
            won += float(rankdata(scores[chosen])[bad].sum()) - n_bad * (n_bad + 1) / 2
            pairs += n_bad * n_good
    return won / pairs if pairs else float("nan")


def bootstrap_auc(
    scores: np.ndarray,
    wrong: np.ndarray,
    groups: np.ndarray,
    strata: np.ndarray | None = None,
    less: np.ndarray | None = None,
    seed: int = 0,
) -> Rate:
    """The area with its percentile-bootstrap 95 % interval: whole groups [n] (scenes) are drawn, the scores [n] stay.

    With `less` [n], other scores, the value is the difference of the two areas on the same draws.
    """
    names, group = np.unique(groups, return_inverse=True)
    rng = generator(seed, "bootstrap auc")
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)
    weights = np.concatenate([np.ones((1, len(scores))), drawn[:, group]])  # the first row is the data as they are
    won, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for chosen in _parts(strata, len(scores)):
        bad, good = chosen[wrong[chosen]], chosen[~wrong[chosen]]
        order = _in_order(scores, bad, good) - (0 if less is None else _in_order(less, bad, good))
        won += (weights[:, bad] @ order * weights[:, good]).sum(1)
        pairs += weights[:, bad].sum(1) * weights[:, good].sum(1)
    assert pairs[0], "an area needs a wrong and a right case"
    areas = won[pairs > 0] / pairs[pairs > 0]
    low, high = np.quantile(areas[1:], (0.025, 0.975))
    return Rate(float(areas[0]), float(low), float(high), len(scores))


def _in_order(scores: np.ndarray, bad: np.ndarray, good: np.ndarray) -> np.ndarray:
    """[bad, good], 1 where the wrong case scores higher, 0.5 where they are equal."""
    gap = scores[bad][:, None] - scores[good]
    return (gap > 0) + 0.5 * (gap == 0)


def group_folds(groups: np.ndarray, folds: int | None, seed: int = 0) -> np.ndarray:
    """[n], the fold in which each case is tested; a group is never split. None: every group is a fold."""
    names, group = np.unique(groups, return_inverse=True)
    assert len(names) > 1, "cases of one group alone cannot be held out"
    order = generator(seed, "folds").permutation(len(names))
    return order[group] % min(folds or len(names), len(names))


def held_out_scores(
    values: np.ndarray, wrong: np.ndarray, folds: np.ndarray, strata: np.ndarray | None = None
) -> np.ndarray:
    """[n], the log-odds of being wrong that a logistic classifier (C = 1) gives each case, fitted to the other folds.

    Values [n, k] are standardised by the training cases; with strata [n] each counts from its stratum's mean there.
    """
    from sklearn.linear_model import LogisticRegression  # here, as few runs fit one and the import is slow

    scores = np.zeros(len(wrong))
    for fold in np.unique(folds):
        test = folds == fold
        train = ~test
        if wrong[train].all() or not wrong[train].any():
            continue  # nothing to learn: all cases of this fold score alike
        centres = np.broadcast_to(values[train].mean(0), values.shape).copy()
        for rows in _parts(strata, len(values)) if strata is not None else ():
            if train[rows].any():
                centres[rows] = values[rows[train[rows]]].mean(0)
        centred = values - centres
        scale = centred[train].std(0)
        used = scale > 1e-9 * (np.abs(values[train]).max(0) + 1e-12)
        if used.any():
            x = centred[:, used] / scale[used]
            fitted = LogisticRegression(C=1.0, max_iter=1000).fit(x[train], wrong[train])
            scores[test] = fitted.decision_function(x[test])
    return scores


def shuffled_aucs(
    values: np.ndarray,
    wrong: np.ndarray,
    folds: np.ndarray,
    draws: int,
    strata: np.ndarray | None = None,
    seed: int = 0,
    centred: np.ndarray | None = None,
) -> np.ndarray:
    """[draws], the held-out area when the labels of wrong cases are shuffled within strata."""
    rng = generator(seed, "shuffled answers")
    areas: list[float] = []
    for _ in range(draws):
        mixed = wrong.copy()
        for rows in _parts(strata, len(wrong)):
            mixed[rows] = rng.permutation(wrong[rows])
        areas.append(auc(held_out_scores(values, mixed, folds, centred), mixed, strata))
    return np.array(areas)


@dataclass(frozen=True)
class PredictorTest:
    """How well scores of n cases tell which are `wrong` [n] bool.

    Attributes:
        groups: [n], drawn whole for intervals.
        folds: [n], in which fold a classifier is tested on each case.
        centred: [n], values count from their mean within these; None: from that of all.
        compared: [n], a wrong and a right case are a pair only within one of these.
        shuffles: of which cases are wrong, for the control.
    """

    wrong: np.ndarray
    groups: np.ndarray
    folds: np.ndarray
    centred: np.ndarray | None = None
    compared: np.ndarray | None = None
    shuffles: int = SHUFFLES
    seed: int = 0

    def area(self, scores: np.ndarray, less: np.ndarray | None = None) -> Rate:
        """The area of scores [n] as they are, or how far it is above that of other scores `less` (`bootstrap_auc`)."""
        return bootstrap_auc(scores, self.wrong, self.groups, self.compared, less, self.seed)

    def fitted(self, values: np.ndarray) -> tuple[np.ndarray, Rate, float]:
        """Held-out scores [n] of a classifier of values [n, k]; their area, whose control is the mean area of shuffled
        cases; and the 97.5 % quantile of that.
        """
        scores = held_out_scores(values, self.wrong, self.folds, self.centred)
        null = shuffled_aucs(values, self.wrong, self.folds, self.shuffles, self.compared, self.seed, self.centred)
        return scores, replace(self.area(scores), control=float(null.mean())), float(np.quantile(null, 0.975))
