"""How well numbers tell wrong cases from right ones: held-out logistic scores, areas, intervals and shuffled controls.

The area under the ROC curve is the share of pairs (a wrong case, a right one) in which the wrong one scores higher,
ties counting half (Hanley and McNeil 1982); with strata [n] only pairs within one count. Shapes: n cases, k numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression

from vlmscope.core.intervention import Rate
from vlmscope.core.records import generator
from vlmscope.metrics.causal import RESAMPLES


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
    resamples: int = RESAMPLES,
) -> Rate:
    """The area with its percentile-bootstrap 95 % interval: whole groups [n] (scenes) are drawn, the scores [n] stay.

    With `less` [n], other scores, the value is the difference of the two areas on the same draws.
    """
    names, of = np.unique(groups, return_inverse=True)
    rng = generator(seed, "bootstrap auc")
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), resamples)
    weights = np.concatenate([np.ones((1, len(scores))), drawn[:, of]])  # the first row is the data as they are
    won, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for chosen in _parts(strata, len(scores)):
        bad, good = chosen[wrong[chosen]], chosen[~wrong[chosen]]
        order = _in_order(scores, bad, good) - (0 if less is None else _in_order(less, bad, good))
        won += (weights[:, bad] @ order * weights[:, good]).sum(1)
        pairs += weights[:, bad].sum(1) * weights[:, good].sum(1)
    if not pairs[0]:
        raise ValueError("an area needs a wrong and a right case")
    areas = won[pairs > 0] / pairs[pairs > 0]
    low, high = np.quantile(areas[1:], (0.025, 0.975))
    return Rate(float(areas[0]), float(low), float(high), len(scores))


def _in_order(scores: np.ndarray, bad: np.ndarray, good: np.ndarray) -> np.ndarray:
    """[bad, good], 1 where the wrong case scores higher, 0.5 where they are equal."""
    gap = scores[bad][:, None] - scores[good]
    return (gap > 0) + 0.5 * (gap == 0)


def group_folds(groups: np.ndarray, folds: int | None, seed: int = 0) -> np.ndarray:
    """[n], the fold in which each case is tested; a group is never split. None: every group is a fold."""
    names, of = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise ValueError("cases of one group alone cannot be held out")
    order = generator(seed, "folds").permutation(len(names))
    return order[of] % min(folds or len(names), len(names))


def held_out_scores(
    values: np.ndarray, wrong: np.ndarray, folds: np.ndarray, strata: np.ndarray | None = None
) -> np.ndarray:
    """[n], the log-odds of being wrong that a logistic classifier (C = 1) gives each case, fitted to the other folds.

    Values [n, k] are standardised by the training cases; with strata [n] each counts from its stratum's mean there.
    """
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
    """[draws], the held-out area when it is shuffled within strata which cases are wrong."""
    rng = generator(seed, "shuffled answers")
    found: list[float] = []
    for _ in range(draws):
        mixed = wrong.copy()
        for rows in _parts(strata, len(wrong)):
            mixed[rows] = rng.permutation(wrong[rows])
        found.append(auc(held_out_scores(values, mixed, folds, centred), mixed, strata))
    return np.array(found)
