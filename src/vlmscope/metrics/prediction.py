"""How well some numbers predict which answers are wrong, on cases that were not fitted. Pure functions of arrays.

The area under the ROC curve is the share of pairs (a wrong case, a right one) in which the wrong one scores higher,
ties counting half (Hanley and McNeil 1982). With strata only pairs within one count, so that what tells the strata
apart helps nobody.

Legend: n cases, k numbers a case.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vlmscope.core.intervention import Rate
from vlmscope.core.seeds import generator
from vlmscope.metrics.causal import RESAMPLES


def auc(scores: np.ndarray, wrong: np.ndarray, strata: np.ndarray | None = None) -> float:
    """Area under the curve of scores [n] for what is `wrong` [n] bool; nan where no pair can be made.

    Args:
        scores: higher for what is thought wrong.
        wrong: what is.
        strata: [n] names; pairs of one stratum count alone.
    """
    from scipy.stats import rankdata

    won = pairs = 0.0
    for chosen in _parts(strata, len(scores)):
        bad = wrong[chosen]
        n_bad, n_good = int(bad.sum()), int((~bad).sum())
        if n_bad and n_good:
            won += float(rankdata(scores[chosen])[bad].sum()) - n_bad * (n_bad + 1) / 2
            pairs += n_bad * n_good
    return won / pairs if pairs else float("nan")


def _parts(strata: np.ndarray | None, n: int) -> Iterator[np.ndarray]:
    if strata is None:
        yield np.arange(n)
        return
    for name in np.unique(strata):
        yield np.flatnonzero(strata == name)


def bootstrap_auc(
    scores: np.ndarray,
    wrong: np.ndarray,
    groups: np.ndarray,
    strata: np.ndarray | None = None,
    less: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Rate:
    """The area with its percentile-bootstrap 95 % interval; whole groups (scenes) are drawn, the scores stay.

    Args:
        scores: [n].
        wrong: [n] bool.
        groups: [n] names; cases of one group hang together.
        strata: as for `auc`.
        less: [n] other scores: the value is then the difference of the two areas, on the same draws.
        seed: of the draws.
        resamples: how many.

    Raises:
        ValueError: no pair of a wrong and a right case.
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
    """[n], the fold in which each case is tested; a group is never split. None: every group is a fold.

    Raises:
        ValueError: fewer than two groups.
    """
    names, of = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        raise ValueError("cases of one group alone cannot be held out")
    order = generator(seed, "folds").permutation(len(names))
    return order[of] % min(folds or len(names), len(names))


def held_out_scores(
    values: np.ndarray, wrong: np.ndarray, folds: np.ndarray, strata: np.ndarray | None = None, penalty: float = 1.0
) -> np.ndarray:
    """[n], the log-odds of being wrong that a logistic classifier gives each case, fitted to the other folds.

    Args:
        values: [n, k], standardised with the mean and deviation of the training cases.
        wrong: [n] bool.
        folds: [n], of `group_folds`.
        strata: [n] names; each value then counts from its stratum's mean over training cases (over all of these where
            the stratum is new).
        penalty: of the squared weights, as `1 / C` of scikit-learn.
    """
    from sklearn.linear_model import LogisticRegression

    scores = np.zeros(len(wrong))
    for fold in np.unique(folds):
        test = folds == fold
        train = ~test
        if wrong[train].all() or not wrong[train].any():
            continue  # nothing to learn: all cases of this fold score alike
        centred = values - _centres(values, train, strata)
        scale = centred[train].std(0)
        used = scale > 1e-9 * (np.abs(values[train]).max(0) + 1e-12)
        if not used.any():
            continue
        x = centred[:, used] / scale[used]
        fitted = LogisticRegression(C=1.0 / penalty, max_iter=1000).fit(x[train], wrong[train])
        scores[test] = fitted.decision_function(x[test])
    return scores


def _centres(values: np.ndarray, train: np.ndarray, strata: np.ndarray | None) -> np.ndarray:
    """[n, k], what each case's values count from."""
    overall = values[train].mean(0)
    centres = np.broadcast_to(overall, values.shape).copy()
    if strata is not None:
        for rows in _parts(strata, len(values)):
            known = rows[train[rows]]
            centres[rows] = values[known].mean(0) if len(known) else overall
    return centres


def shuffled_aucs(
    values: np.ndarray,
    wrong: np.ndarray,
    folds: np.ndarray,
    draws: int,
    strata: np.ndarray | None = None,
    seed: int = 0,
    centred: np.ndarray | None = None,
) -> np.ndarray:
    """[draws], the held-out area when it is shuffled which cases are wrong.

    Args:
        values: [n, k].
        wrong: [n] bool.
        folds: [n].
        draws: how many.
        strata: [n] names, within which is shuffled and compared; over all cases when None.
        seed: of the draws.
        centred: [n] names, as the strata of `held_out_scores`.
    """
    rng = generator(seed, "shuffled answers")
    found: list[float] = []
    for _ in range(draws):
        mixed = wrong.copy()
        for rows in _parts(strata, len(wrong)):
            mixed[rows] = rng.permutation(wrong[rows])
        found.append(auc(held_out_scores(values, mixed, folds, centred), mixed, strata))
    return np.array(found)
