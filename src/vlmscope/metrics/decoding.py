"""Facts in features' activations: readouts, tuning curves, selectivity, depth. Pure functions of arrays.

A feature is *selective* for a concept when it fires on at least a share of the concept's cases and its mean there is at
least `ratio` times its mean over the cases of all other concepts (a case counts with 0 where the feature is silent).
With r_k the share of an effect that layers 0 .. k recover together (k = 0 .. L - 1), its *depth* is the mean layer

    depth = sum_k k (r_k - r_{k-1}) / r_{L-1} = sum_{k < L-1} (1 - r_k / r_{L-1})

Legend: n (or N) training cases, m held-out cases, F (or M) features, c classes of a fact, C levels of a number or
concepts, L layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from vlmscope.core.records import generator
from vlmscope.core.results import Rate
from vlmscope.metrics.rates import RESAMPLES, benjamini_hochberg, bootstrap_mean, permutation_p, share_rate


def held_out_r2(test: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """[F], 1 - squared error of `predicted` [m, F] over that of the mean of `test` [m, F] itself; 0 if it is constant.

    The held-out mean, not the training one: a feature that fires once in training and never again would else be
    explained by any model whose cells are mostly empty.
    """
    error = ((test - predicted) ** 2).sum(0)
    spread = ((test - test.mean(0)) ** 2).sum(0)
    # What varies by rounding alone is constant.
    varies = spread > 1e-8 * (test**2).sum(0)
    return np.where(varies, 1 - error / np.where(varies, spread, 1), 0.0)


def class_means(train: np.ndarray, codes: np.ndarray, test_codes: np.ndarray) -> np.ndarray:
    """[m, F], each held-out case (class `test_codes` [m]) predicted by the mean of its class in `train` [n, F] of
    classes `codes` [n]; by the overall mean for a new class.
    """
    size = int(max(codes.max(), test_codes.max())) + 1
    counts = np.bincount(codes, minlength=size)
    onehot = np.eye(size, dtype=train.dtype)[codes]
    means = onehot.T @ train / np.maximum(counts, 1)[:, None]
    means[counts == 0] = train.mean(0)
    return means[test_codes]


def explained_by(
    kinds: Mapping[str, Sequence[str]], train: np.ndarray, seen: pd.DataFrame, test: np.ndarray, new: pd.DataFrame
) -> dict[str, np.ndarray]:
    """Held-out R^2 [F] of each kind of model, which predicts activations from some facts of the scenes.

    One fact predicts the mean of its value; of several the terms add up, by least squares: a level for each value of a
    whole number, a slope for any other. `kinds` names facts, columns of `seen` and `new`.
    """
    scores = {}
    for kind, facts in kinds.items():
        if len(facts) == 1 and not _is_slope(seen[facts[0]]):
            predicted = class_means(train, seen[facts[0]].to_numpy(), new[facts[0]].to_numpy())
        else:
            weights = np.linalg.lstsq(_design(facts, seen, seen, new), train, rcond=None)[0]
            predicted = _design(facts, new, seen, new) @ weights
        scores[kind] = held_out_r2(test, predicted)
    return scores


def _design(facts: Sequence[str], table: Any, seen: Any, new: Any) -> np.ndarray:
    """[n, ..], terms of the facts of a table, which is `seen` or `new`; a constant where there are slopes alone."""
    slopes = [fact for fact in facts if _is_slope(seen[fact])]
    columns = [] if len(slopes) < len(facts) else [np.ones((len(table), 1))]
    for fact in facts:
        values = table[fact].to_numpy()
        if fact in slopes:
            columns.append(((values - seen[fact].mean()) / seen[fact].std(ddof=0))[:, None])
        else:
            columns.append(np.eye(int(max(seen[fact].max(), new[fact].max())) + 1)[values])
    return np.concatenate(columns, 1)


def _is_slope(fact: Any) -> bool:
    return fact.dtype.kind == "f"


def linear_accuracy(train: np.ndarray, codes: np.ndarray, test: np.ndarray, test_codes: np.ndarray) -> np.ndarray:
    """[m] bool, which held-out cases a linear readout of activations classifies rightly (`linear_prediction` of one-hot
    classes; the largest output is the answer). If no feature varies, the answer is the most frequent class.
    """
    classes = np.eye(int(max(codes.max(), test_codes.max())) + 1)[codes]
    return linear_prediction(train, classes, test).argmax(1) == test_codes


def linear_prediction(train: np.ndarray, targets: np.ndarray, test: np.ndarray) -> np.ndarray:
    """[m, t], held-out targets as ridge regression on standardised features reads them off.

    `train` [n, F], `targets` [n, t], `test` [m, F]; the penalty is 1 % of the mean squared norm of a case.
    """
    train, test = train.astype(np.float64), test.astype(np.float64)
    scale = train.std(0)
    used = scale > 1e-5 * np.abs(train).max(0)  # what varies by rounding alone is constant
    mean, scale = train[:, used].mean(0), scale[used]
    x = (train[:, used] - mean) / scale
    # The dual form: n by n, since there may be more features than cases.
    gram = x @ x.T
    penalty = 0.01 * np.trace(gram) / len(x) if used.any() else 1.0
    dual = np.linalg.solve(gram + penalty * np.eye(len(x)), targets - targets.mean(0))
    return ((test[:, used] - mean) / scale) @ (x.T @ dual) + targets.mean(0)


def simplest(scores: Mapping[str, np.ndarray], least: float, share: float = 0.9) -> np.ndarray:
    """[F] names: the first model (model -> held-out R^2 [F], simplest first) whose R^2 is at least `share` of the best
    one's; "" where the best is below `least`.
    """
    best = np.max(list(scores.values()), axis=0)
    kinds = np.full(len(best), "", dtype=object)
    for name in reversed(list(scores)):
        kinds[(best >= least) & (scores[name] >= share * best)] = name
    return kinds


SLACK = 0.05  # of a curve's range, by which a step may go the wrong way
Q = 0.01  # false discovery rate of tuned features
UP, DOWN, PEAK, OTHER = "up", "down", "peak", "other"


def tuning_curves(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """[C, F], mean of `values [N, F]` at each of the C different `levels [N]`, ascending."""
    _, codes = np.unique(levels, return_inverse=True)
    counts = np.bincount(codes)
    return (np.eye(len(counts), dtype=values.dtype)[codes].T @ values) / counts[:, None]


def rank_correlation(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """[F], Spearman's rho of each column of `values [N, F]` with `x [N]`; 0 where either is constant."""
    ranks = stats.rankdata(values, axis=0)
    x_ranks = stats.rankdata(x)
    ranks -= ranks.mean(0)
    x_ranks -= x_ranks.mean()
    norms = np.sqrt((ranks**2).sum(0)) * np.sqrt((x_ranks**2).sum())
    return np.divide(x_ranks @ ranks, norms, out=np.zeros(values.shape[1]), where=norms > 0)


def partial_correlation(first: np.ndarray, second: np.ndarray, between: float) -> np.ndarray:
    """[F], what is left of correlations `first` [F] with one quantity when another, of correlations `second` [F] and
    correlated with it by `between`, is held fixed.
    """
    spread = np.sqrt(np.clip((1 - second**2) * (1 - between**2), 1e-12, None))
    return (first - second * between) / spread


def level_p(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """[F], p-values of a one-way analysis of variance: does the mean of `values [N, F]` differ between `levels [N]`?

    1 where a feature never varies, 0 where it varies between levels alone.
    """
    names, codes = np.unique(levels, return_inverse=True)
    curves = tuning_curves(values.astype(np.float64), levels)
    counts = np.bincount(codes)[:, None]
    mean = values.mean(0, dtype=np.float64)
    between = (counts * (curves - mean) ** 2).sum(0)
    within = ((values - curves[codes]) ** 2).sum(0)
    freedom = len(values) - len(names)
    varies = between + within > 1e-8 * (values.astype(np.float64) ** 2).sum(0)
    ratio = np.where(varies, np.inf, 0.0)
    np.divide(between / (len(names) - 1), within / freedom, out=ratio, where=varies & (within > 0))
    return np.where(varies, stats.f.sf(ratio, len(names) - 1, freedom), 1.0)


def tuned(codes: Mapping[int, np.ndarray], levels: np.ndarray) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Features whose activations, layer -> [N, F], depend on a number [N], by analysis of variance with a false
    discovery rate of `Q` over all layers.

    Returns:
        Layer -> [F] the shape of the tuning curve: "up", "down", "peak <level>", or "" of the others; and layer -> [F]
        the share of variance that the number explains.
    """
    p = np.concatenate([level_p(code, levels) for code in codes.values()])
    sure = np.split(benjamini_hochberg(p) <= Q, np.cumsum([code.shape[1] for code in codes.values()])[:-1])
    names, strength = {}, {}
    for (layer, code), passed in zip(codes.items(), sure, strict=True):
        curves = tuning_curves(code, levels)
        kinds = curve_kinds(curves)
        peaked = np.array([f"{PEAK} {np.unique(levels)[top]}" for top in curves.argmax(0)], dtype=object)
        column = np.where(kinds == PEAK, peaked, kinds)
        column[~passed | (kinds == OTHER)] = ""
        names[layer] = column
        strength[layer] = curves.var(0) / np.maximum(code.var(0), 1e-12)
    return names, strength


def held_out_tuning(
    names: Mapping[int, np.ndarray], codes: Mapping[int, np.ndarray], levels: np.ndarray, other: np.ndarray
) -> dict[str, Rate]:
    """Whether the tuning that `tuned` names, layer -> [F], holds on other cases: of activations, layer -> [N, F], the
    number `levels` [N], and `other` [N], a quantity correlated with it, such as painted area.

    Returns:
        `<kind>/holds`, the share of features with the same kind of curve; of those that go up or down, signed so that a
        feature going down counts positive, `monotone/rho` (rank correlation with the number), `rho_at_equal_area`
        (partial, `other` held fixed) and `same_sign_at_equal_area`. What has no feature is left out.
    """
    holds: dict[str, list[bool]] = {kind: [] for kind in (UP, DOWN, PEAK)}
    between = float(rank_correlation(levels[:, None].astype(float), other)[0])
    monotone: list[np.ndarray] = []
    for layer, shapes in names.items():
        chosen, lines = np.flatnonzero(shapes != ""), np.flatnonzero(np.isin(shapes, (UP, DOWN)))
        kinds = curve_kinds(tuning_curves(codes[layer][:, chosen], levels))
        for name, kind in zip(shapes[chosen], kinds, strict=True):
            holds[name.split()[0]].append(bool(kind == name.split()[0]))
        rho, rho_other = (rank_correlation(codes[layer][:, lines], x) for x in (levels, other))
        sign = np.where(shapes[lines] == UP, 1.0, -1.0)
        monotone.append(np.stack([rho * sign, partial_correlation(rho, rho_other, between) * sign]))
    metrics = {f"{kind}/holds": share_rate(hits) for kind, hits in holds.items() if hits}
    rho, equal = np.concatenate(monotone, 1)
    if len(rho):
        metrics |= {"monotone/rho": bootstrap_mean(rho), "monotone/rho_at_equal_area": bootstrap_mean(equal)}
        metrics["monotone/same_sign_at_equal_area"] = share_rate(equal > 0)
    return metrics


def accuracy_across(
    train: np.ndarray,
    levels: np.ndarray,
    groups: np.ndarray,
    test: np.ndarray,
    test_levels: np.ndarray,
    test_groups: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Hits of linear readouts of a number, each fitted to the training cases of one group, on held-out cases of that
    group and of the others.
    """
    same, others = [], []
    for value in np.unique(groups):
        rows, inside = groups == value, test_groups == value
        right = linear_accuracy(train[rows], levels[rows], test, test_levels)
        same.append(right[inside])
        others.append(right[~inside])
    return np.concatenate(same), np.concatenate(others)


def curve_kinds(curves: np.ndarray) -> np.ndarray:
    """[F] names of the shape of `curves [C, F]`: up, down, peak (one maximum, not at an end), or other.

    A curve goes up when no step goes down by more than `SLACK` of its range, and it peaks when it goes up to its
    maximum and down from there. A constant one is other.
    """
    count, width = curves.shape
    span = curves.max(0) - curves.min(0)
    steps = np.diff(curves, axis=0)
    rising, falling = steps >= -SLACK * span, steps <= SLACK * span
    top = curves.argmax(0)
    step = np.arange(count - 1)[:, None]
    single = np.where(step < top, rising, falling).all(0)
    kinds = np.full(width, OTHER, dtype=object)
    varies = span > 0
    # Order matters: within the slack, a curve that goes up or down throughout may have its maximum inside.
    kinds[varies & single & (top > 0) & (top < count - 1)] = PEAK
    kinds[varies & rising.all(0)] = UP
    kinds[varies & falling.all(0)] = DOWN
    return kinds


_EXACT = 8  # concepts up to which all orders of their names are tried
_DRAWS = 10_000  # orders that are drawn when there are more


@dataclass(frozen=True)
class Rule:
    """When a feature is selective: `ratio` > 1 and `fires`, a share of the concept's cases."""

    ratio: float = 2.0
    fires: float = 0.5


@dataclass(frozen=True)
class Contrast:
    """Each feature on each concept, [C, M] float64: mean, mean over all other concepts, share of cases that fire."""

    mean: np.ndarray
    rest: np.ndarray
    rate: np.ndarray

    def selective(self, rule: Rule) -> np.ndarray:
        """[C, M] bool."""
        return (self.rate >= rule.fires) & (self.mean > 0) & (self.mean >= rule.ratio * self.rest)


def contrast(values: np.ndarray, labels: np.ndarray, n_concepts: int) -> Contrast:
    """Compare concepts: `values` [N, M] >= 0; `labels` [N] in 0 .. C - 1, each concept with a case."""
    member = (labels == np.arange(n_concepts)[:, None]).astype(np.float32)
    counts = member.sum(1, keepdims=True)
    sums = (member @ values).astype(np.float64)
    rate = (member @ (values > 0).astype(np.float32)) / counts
    rest = (sums.sum(0) - sums) / (len(labels) - counts)
    return Contrast(sums / counts, rest, rate.astype(np.float64))


def shuffled(values: np.ndarray, labels: np.ndarray, n_concepts: int, count: int, seed: int) -> Iterator[Contrast]:
    """The contrast under `count` random orders of the labels, as if each case showed another's concept."""
    rng = generator(seed, "shuffled labels")
    for _ in range(count):
        yield contrast(values, rng.permutation(labels), n_concepts)


def contrast_p(observed: Contrast, null: Iterator[Contrast]) -> np.ndarray:
    """[C, M], one-sided p-value of each difference of mean and rest under shuffled labels."""
    gap = observed.mean - observed.rest
    draws, larger = 0, np.zeros(gap.shape)
    for draw in null:
        draws += 1
        # A sum in another order must not turn an equal difference into a smaller one.
        larger += draw.mean - draw.rest >= gap - 1e-6 * np.abs(gap)
    return (larger + 1) / (draws + 1)


def matching_p(table: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Whether a table of coincidences [C, C] of the same concepts is heavier on its diagonal than under other names.

    Columns are put in every other order (a random 10,000 of them above eight concepts): the number that each row and
    each column adds up to stays, only who belongs to whom is lost. Returns the mean of the diagonal's sum over orders,
    and the one-sided p-value of that which was seen.
    """
    count = len(table)
    rows = np.arange(count)
    if count <= _EXACT:
        orders = np.array(list(permutations(range(count))))
        sums = table[rows, orders].sum(1)
        return float(sums.mean()), float((sums >= table.trace()).mean())
    rng = generator(seed, "matching")
    sums = np.array([table[rows, rng.permutation(count)].sum() for _ in range(_DRAWS)])
    return float(sums.mean()), float(permutation_p(np.asarray(table.trace()), sums))


def mean_depth(curves: np.ndarray) -> float:
    """Depth, in layers, of the mean of cumulative curves [n, L]."""
    mean = curves.mean(0)
    return float((1 - mean[:-1] / mean[-1]).sum())


def bootstrap_depth(curves: np.ndarray, less: np.ndarray | None = None, seed: int = 0) -> Rate:
    """Depth of curves [n, L] with its bootstrap 95 % interval over cases; with `less` [n, L] of the same cases, the
    difference of the two depths on the same draws.
    """

    def value(rows: np.ndarray) -> float:
        depth = mean_depth(curves[rows])
        return depth if less is None else depth - mean_depth(less[rows])

    n = len(curves)
    drawn = [value(rows) for rows in generator(seed, "bootstrap depth").integers(0, n, (RESAMPLES, n))]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Rate(value(np.arange(n)), float(low), float(high), n)
